"""Operators made differentiable for eager mode: here PyTorch's own LayerNorm, with its formula as the derivative."""

import pytest
import torch
import torch.nn.functional as F

from vmamba.ops.eager import differentiable

CHANNELS = 6


def setup_context(ctx, inputs, output):
    x, _shape, weight, bias, _eps = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])


def backward(ctx, grad, grad_mean, grad_rstd):
    assert grad_mean is None and grad_rstd is None, "zeros were made for outputs without a gradient"
    x, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, x, [CHANNELS], mean, rstd, weight, bias, [True, True, True]
    )
    return dx, None, dweight, dbias, None


layer_norm = differentiable(torch.ops.aten.native_layer_norm, setup_context, backward)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return [t.requires_grad_() for t in (torch.randn(4, CHANNELS), torch.randn(CHANNELS), torch.randn(CHANNELS))]


def test_result_and_gradients(inputs):
    x, weight, bias = inputs
    got, mean, rstd = layer_norm(x, [CHANNELS], weight, bias, 1e-5)
    want = F.layer_norm(x, (CHANNELS,), weight, bias)
    assert torch.equal(got, want)
    assert got.grad_fn.name() == "eager_native_layer_normBackward"
    assert not mean.requires_grad and not rstd.requires_grad
    found, wanted = (torch.autograd.grad(y.square().sum(), inputs) for y in (got, want))
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_a_gradient_with_a_graph_goes_through_the_operators(inputs):
    x, weight, bias = inputs
    (got,) = torch.autograd.grad(layer_norm(x, [CHANNELS], weight, bias, 1e-5)[0].sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(F.layer_norm(x, (CHANNELS,), weight, bias).sum(), x, create_graph=True)
    assert got.requires_grad
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), weight)[0] for y in (got, want)))
