"""A linear layer behind a LayerNorm as one operator: what surrounds the CUDA kernel, with PyTorch in its place."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.standing_in import standing_in
from vmamba.layers import SS2D, Mlp, PreNormBlock, run_blocks
from vmamba.ops.layer_norm import Norm
from vmamba.ops.norm_linear import norm_linear, serves_norm_linear

CHANNELS = 64


def normed(x, weight, bias, eps, dtype):
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(dtype)


def kernel(x, norm_weight, norm_bias, eps, weight):
    assert norm_weight.dtype == norm_bias.dtype == torch.float32
    return F.linear(normed(x, norm_weight, norm_bias, eps, weight.dtype), weight)


def residual_kernel(x, branch, branch_weight, branch_bias, branch_eps, projection, weight, bias, eps, *weights):
    assert projection is not None
    weight1, bias1, weight2, bias2 = (w.to(projection.dtype) for w in weights)
    branch = F.linear(normed(branch, branch_weight, branch_bias, branch_eps, projection.dtype), projection)
    total = x + branch
    y = normed(total, weight, bias, eps, projection.dtype)
    return (total + F.linear(F.gelu(F.linear(y, weight1, bias1)), weight2, bias2)).to(x.dtype)


@pytest.fixture
def kernels():
    with standing_in("norm_linear", norm_linear=kernel):
        yield


@pytest.fixture
def all_kernels(kernels, monkeypatch):
    monkeypatch.setattr(
        sys.modules["vmamba.ops.mlp"], "_FEWEST_POSITIONS", 1
    )  # the package has a function of that name
    with standing_in("mlp", mlp_residual=residual_kernel):
        yield


def operands(dtype=torch.float32, channels=CHANNELS, out_channels=96):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 3, channels), torch.randn(out_channels, channels) / channels**0.5
    return x.to(dtype), Norm(torch.randn(channels).to(dtype), torch.randn(channels).to(dtype), 1e-5), weight.to(dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_it_is_both_layers(precision):
    x, norm, weight = operands(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        assert serves_norm_linear(x, norm, weight)
        y = norm_linear(x, norm, weight)
        wanted = F.linear(F.layer_norm(x, (CHANNELS,), *norm), weight)
    assert y.dtype == wanted.dtype
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("channels", "out_channels", "served"),
    [(64, 32, True), (96, 192, True), (128, 384, True), (128, 416, False), (96, 40, False), (192, 192, False)],
)
def test_what_is_served(channels, out_channels, served):
    x, norm, weight = operands(torch.bfloat16, channels, out_channels)
    assert serves_norm_linear(x, norm, weight) == served
    assert not serves_norm_linear(x[..., :32], norm, weight)
    assert not serves_norm_linear(x.float(), norm, weight)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("asks", [0, 1, 2])
def test_what_is_asked_for_gradients_is_not_served(asks):
    x, norm, weight = operands()
    (x, norm.bias, weight)[asks].requires_grad_()
    assert not serves_norm_linear(x, norm, weight)
    with torch.no_grad():
        assert serves_norm_linear(x, norm, weight)


@pytest.mark.usefixtures("kernels")
def test_what_is_registered():
    x, norm, weight = operands()
    torch.library.opcheck(torch.ops.vmamba.norm_linear, (x, *norm, weight))
    with FlopCounterMode(display=False) as counter:
        torch.ops.vmamba.norm_linear(x, *norm, weight)
    assert counter.get_total_flops() == 2 * x.numel() * 96
    y = torch.ops.vmamba.norm_linear(x.clone().requires_grad_(), *norm, weight)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        y.sum().backward()


# -- A block ----------------------------------------------------------------------------------------------------------


def block():
    torch.manual_seed(0)
    return PreNormBlock(CHANNELS, SS2D(CHANNELS), Mlp(CHANNELS, 96)).requires_grad_(False).eval()


def begins_in_one_pass(block, x):
    with torch.profiler.profile() as profile, torch.no_grad():
        block(x)
    return any("norm_linear" in event.name for event in profile.events())


@pytest.mark.usefixtures("all_kernels")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
@torch.no_grad()
def test_a_block_begins_and_ends_in_one_pass(precision, compiled):
    torch.compiler.reset()
    blocks, x = [block(), block(), nn.Identity()], operands()[0]
    expected = x
    for layer in blocks[:2]:
        expected = expected + layer.mixer(layer.norm1(expected))
        expected = expected + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.norm2(expected))))
    if precision == "bfloat16":
        blocks, x = [layer.bfloat16() for layer in blocks], x.bfloat16()
    run = torch.compile(run_blocks, fullgraph=True) if compiled else run_blocks
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        assert begins_in_one_pass(blocks[0], x)
        y = run(blocks, x)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.float(), expected, rtol=4e-2, atol=4e-2)


@pytest.mark.usefixtures("all_kernels")
def test_a_block_calls_its_first_norm_where_somebody_listens():
    ours, x = block().bfloat16(), operands(torch.bfloat16)[0]
    assert begins_in_one_pass(ours, x)
    ours.norm1.register_forward_hook(lambda *_: None)
    assert not begins_in_one_pass(ours, x)
