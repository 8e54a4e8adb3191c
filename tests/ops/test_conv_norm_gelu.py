"""The first layers of a stem as one operator: what surrounds the CUDA kernel, with PyTorch in its place."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import create_feature_extractor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.standing_in import standing_in
from vmamba.layers import ConvStem

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor to a Python")  # by torch.jit.trace


def kernel(image, weight, bias, norm_weight, norm_bias, eps, stride, out_dtype):
    assert {t.dtype for t in (weight, bias, norm_weight, norm_bias)} == {torch.float32}
    x = F.conv2d(image.float(), weight, bias, stride, padding=1).permute(0, 2, 3, 1)
    return F.gelu(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)).to(out_dtype).contiguous()


@pytest.fixture
def kernels():
    with standing_in("conv_norm_gelu", conv_norm_gelu=kernel):
        yield


def make(dim=96, in_chans=3, **options):
    torch.manual_seed(0)
    stem = ConvStem(in_chans, dim, **options)
    for p in stem.norm1.parameters():
        nn.init.normal_(p)
    return stem.requires_grad_(False), torch.randn(2, in_chans, 13, 18)


def in_parts(stem, image):
    x = stem.act(stem.norm1(stem.conv1(image.permute(0, 2, 3, 1))))
    return stem.norm2(stem.conv2(x))


def is_fused(stem, image):
    with torch.profiler.profile() as profile:
        stem(image)
    return any("conv_norm_gelu" in event.name for event in profile.events())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
@pytest.mark.parametrize("strides", [(2, 2), (1, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_stem_agrees(memory_format, strides, precision, compiled):
    torch.compiler.reset()
    stem, image = make(strides=strides)
    image = image.contiguous(memory_format=memory_format)
    expected = in_parts(stem, image)
    if precision == "bfloat16":
        stem, image = stem.bfloat16(), image.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        assert is_fused(stem, image)
        dtype = in_parts(stem, image).dtype
        y = (torch.compile(stem, fullgraph=True) if compiled else stem)(image)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"dim": 64}, True),
        ({"dim": 128}, True),
        ({"dim": 32}, False),
        ({"in_chans": 1}, False),
        ({"in_chans": 4}, False),
    ],
    ids=str,
)
def test_what_is_served(options, fused):
    assert is_fused(*make(**options)) == fused


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("asks", ["image", "conv1", "norm1"])
def test_what_is_asked_for_gradients_is_computed_in_parts(asks):
    stem, image = make()
    (image if asks == "image" else getattr(stem, asks)).requires_grad_()
    assert not is_fused(stem, image)
    stem(image).sum().backward()
    with torch.no_grad():
        assert is_fused(stem, image)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "change",
    [
        lambda stem: stem.conv1.register_forward_hook(lambda *_: None),
        lambda stem: stem.norm1.register_forward_pre_hook(lambda *_: None),
        lambda stem: stem.act.register_forward_hook(lambda *_: None),
        lambda stem: setattr(stem, "act", nn.GELU("tanh")),
        lambda stem: setattr(stem, "act", nn.SiLU()),
    ],
    ids=["convolution's hook", "norm's pre-hook", "activation's hook", "tanh", "activation"],
)
def test_a_stem_calls_what_is_not_plain(change):
    stem, image = make()
    change(stem)
    assert not is_fused(stem, image)
    torch.testing.assert_close(stem(image), in_parts(stem, image))


@pytest.mark.usefixtures("kernels")
def test_a_traced_stem_shows_its_parts():
    stem, image = make()
    assert "conv_norm_gelu" not in str(torch.jit.trace(stem, image, check_trace=False).inlined_graph)
    nodes = [node.target for node in create_feature_extractor(stem, return_nodes=["conv2"]).graph.nodes]
    assert {"conv1", "norm1", "conv2"} <= set(nodes)


@pytest.mark.usefixtures("kernels")
def test_what_is_registered():
    stem, image = make()
    operands = (image, *(p.detach() for layer in (stem.conv1, stem.norm1) for p in layer.parameters()), 1e-5, 2)
    torch.library.opcheck(torch.ops.vmamba.conv_norm_gelu, (*operands, torch.bfloat16))
    with FlopCounterMode(display=False) as counter:
        torch.ops.vmamba.conv_norm_gelu(*operands, torch.bfloat16)
    assert counter.get_total_flops() == 2 * 27 * 48 * (2 * 7 * 9)
    y = torch.ops.vmamba.conv_norm_gelu(image.clone().requires_grad_(), *operands[1:], torch.bfloat16)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        y.sum().backward()
