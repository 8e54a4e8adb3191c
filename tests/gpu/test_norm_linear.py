"""The CUDA kernel of a linear layer behind a LayerNorm, against PyTorch's operators in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.scan_cases import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3}
KERNEL = torch.ops.vmamba.norm_linear
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def operands(rows, channels, out_channels, dtype, wide=True):
    torch.manual_seed(channels)

    def normal(*shape):
        return torch.randn(shape, device="cuda")

    x = (3 * normal(rows, channels) + 1).to(torch.float32 if wide else dtype)
    return x, normal(channels), normal(channels), 1e-3, (normal(out_channels, channels) / channels**0.5).to(dtype)


def exactly(x, norm_weight, norm_bias, eps, weight):
    normed = F.layer_norm(x.double(), norm_weight.shape, norm_weight.double(), norm_bias.double(), eps)
    return F.linear(normed, weight.double())


@dtypes
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("out_channels", [32, 96, 192, 384])
@pytest.mark.parametrize("channels", [64, 96, 128])
@pytest.mark.parametrize("rows", [1, 17, 255, 70001])
def test_forward(rows, channels, out_channels, wide, dtype):
    inputs = operands(rows, channels, out_channels, dtype, wide)
    y = KERNEL(*inputs)
    assert y.dtype == dtype and y.shape == (rows, out_channels)
    assert relative_error(y, exactly(*inputs)) < TOLERANCE[dtype]
    assert torch.equal(y, KERNEL(*inputs))


def test_rows_do_not_meet():
    """A NaN stays in its own row, and what is not there is not read."""
    x, *rest = operands(40, 96, 96, torch.bfloat16)
    want = KERNEL(x, *rest)
    x[7, 3] = float("nan")
    y = KERNEL(x, *rest)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [7]
    assert torch.equal(y[8:], want[8:]) and torch.equal(KERNEL(x[8:], *rest), want[8:])
    assert KERNEL(x[:0], *rest).shape == (0, 96)


def test_maps_views_and_graphs():
    x, *rest, weight = operands(2 * 5 * 7, 64, 96, torch.bfloat16)
    want = KERNEL(x, *rest, weight).view(2, 5, 7, 96)
    wide = torch.cat([x, x], -1)[:, 64:].view(2, 5, 7, 64)
    shifted = torch.empty(x.numel() + 1, device="cuda")[1:].view(2, 5, 7, 64).copy_(wide)
    for maps in (x.view(2, 5, 7, 64), wide, shifted):
        assert torch.equal(KERNEL(maps, *rest, weight.t().contiguous().t()), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = KERNEL(x, *rest, weight)
    graph.replay()
    assert torch.equal(found.view(want.shape), want)


def test_what_it_refuses():
    x, norm_weight, norm_bias, eps, weight = operands(8, 64, 64, torch.bfloat16)
    with pytest.raises(RuntimeError, match="does not serve 64 channels to 40"):
        KERNEL(x, norm_weight, norm_bias, eps, weight[:40])
    with pytest.raises(RuntimeError, match=r"weight \(out_channels, channels\)"):
        KERNEL(x[:, :32], norm_weight, norm_bias, eps, weight)
    with pytest.raises(RuntimeError, match="norm_bias must be float32, one per channel"):
        KERNEL(x, norm_weight, norm_bias[:8], eps, weight)
    with pytest.raises(RuntimeError, match="weight must have 16 bits"):
        KERNEL(x, norm_weight, norm_bias, eps, weight.float())
    with pytest.raises(RuntimeError, match="weight must have 16 bits"):
        KERNEL(x.half(), norm_weight, norm_bias, eps, weight)
