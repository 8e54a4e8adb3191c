"""The CUDA kernel of a stem's first layers, against PyTorch's operators in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.scan_cases import relative_error
from vmamba.layers import ConvStem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3}
KERNEL = torch.ops.vmamba.conv_norm_gelu
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def operands(size, channels=48, dtype=torch.float32):
    torch.manual_seed(channels)

    def normal(*shape):
        return torch.randn(shape, device="cuda")

    return normal(*size).to(dtype), normal(channels, 3, 3, 3), *(normal(channels) for _ in range(3)), 1e-3


def exactly(image, weight, bias, norm_weight, norm_bias, eps, stride, dtype):
    """In float64, of operands that are rounded as the tensor cores take them."""
    x = F.conv2d(image.to(dtype).double(), weight.to(dtype).double(), bias.double(), stride, padding=1)
    x = F.layer_norm(x.permute(0, 2, 3, 1), norm_weight.shape, norm_weight.double(), norm_bias.double(), eps)
    return F.gelu(x)


@dtypes
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("channels", [32, 48, 64])
@pytest.mark.parametrize("size", [(1, 3, 1, 1), (2, 3, 7, 10), (3, 3, 64, 33), (2, 3, 224, 224)], ids=str)
def test_forward(size, channels, stride, wide, dtype):
    inputs = operands(size, channels, torch.float32 if wide else dtype)
    y, want = KERNEL(*inputs, stride, dtype), exactly(*inputs, stride, dtype)
    assert y.dtype == dtype and y.shape == want.shape and y.is_contiguous()
    assert relative_error(y, want) < TOLERANCE[dtype]
    assert torch.equal(y, KERNEL(*inputs, stride, dtype))


def test_images_and_weights_of_any_layout():
    image, weight, *rest = operands((2, 3, 33, 40))
    want = KERNEL(image, weight, *rest, 2, torch.bfloat16)
    last = torch.channels_last
    padded = F.pad(image, (3, 2, 1, 0), value=float("nan"))[:, :, 1:, 3:-2]
    for x in (image.contiguous(memory_format=last), padded, torch.cat([image, image], 1)[:, 3:]):
        assert torch.equal(KERNEL(x, weight.contiguous(memory_format=last), *rest, 2, torch.bfloat16), want)
    one = image[:1].expand(4, -1, -1, -1)
    assert torch.equal(KERNEL(one, weight, *rest, 2, torch.bfloat16), want[:1].expand(4, -1, -1, -1))


def test_a_pixel_that_is_not_a_number_stays_where_it_is_seen():
    image, *rest = operands((2, 3, 16, 16))
    image[0, 1, 5, 6] = float("nan")
    y = KERNEL(image, *rest, 1, torch.bfloat16)
    seen = torch.zeros(2, 16, 16, dtype=torch.bool, device="cuda")
    seen[0, 4:7, 5:8] = True
    assert torch.equal(y.isnan().any(-1), seen)


def test_maps_of_more_than_2_to_the_31_elements():
    image, *rest = operands((1, 3, 512, 512), 64)
    many = image.expand(520, -1, -1, -1)
    y = KERNEL(many, *rest, 2, torch.bfloat16)
    assert y.numel() > 2**31
    assert torch.equal(y[-1:], KERNEL(image, *rest, 2, torch.bfloat16)) and torch.equal(y[0], y[-1])


def test_captured_in_a_graph():
    inputs = operands((2, 3, 32, 32))
    want = KERNEL(*inputs, 2, torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = KERNEL(*inputs, 2, torch.bfloat16)
    graph.replay()
    assert torch.equal(found, want)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_stem_is_no_further_from_the_truth_than_its_layers(autocast, compiled):
    torch.compiler.reset()
    torch.manual_seed(0)
    stem = ConvStem(3, 96).cuda()
    image = torch.randn(2, 3, 61, 64, device="cuda")
    expected = stem.double()(image.double())
    dtype = torch.float32 if autocast else torch.bfloat16
    stem, image = stem.to(dtype), image.to(dtype)
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        with torch.profiler.profile() as profile:
            y = (torch.compile(stem, fullgraph=True) if compiled else stem)(image)
        parts = stem.norm2(stem.conv2(stem.act(stem.norm1(stem.conv1(image.permute(0, 2, 3, 1))))))
    assert any("conv_norm_gelu" in event.name for event in profile.events())
    assert y.dtype == parts.dtype
    assert relative_error(y, expected) < 1.2 * relative_error(parts, expected) + 1e-4


def test_what_it_refuses():
    image, weight, *rest = operands((2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="does not serve 40 channels"):
        KERNEL(image, weight[:40], *rest, 2, torch.bfloat16)
    with pytest.raises(RuntimeError, match="x must be images"):
        KERNEL(image[:, :2], weight, *rest, 2, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"weight must be \(channels, 3, 3, 3\), in float32"):
        KERNEL(image, weight.bfloat16(), *rest, 2, torch.bfloat16)
    with pytest.raises(RuntimeError, match="norm_weight must be float32, one per channel"):
        KERNEL(image, weight, rest[0], rest[1][:8], *rest[2:], 2, torch.bfloat16)
    with pytest.raises(RuntimeError, match="16 bits of one dtype"):
        KERNEL(image.half(), weight, *rest, 2, torch.bfloat16)
    with pytest.raises(RuntimeError, match="stride must be positive"):
        KERNEL(image, weight, *rest, 0, torch.bfloat16)
