"""The CUDA LayerNorm against PyTorch's in float64, result and gradients."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.scan_cases import relative_error
from vmamba.ops import add_layer_norm, layer_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
TYPES = [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16),
]  # fmt: skip


@pytest.mark.parametrize("channels", [4, 48, 96, 132, 192, 384, 768, 1024, 1536])
@pytest.mark.parametrize(("dtype", "out_dtype"), TYPES, ids=str)
def test_result_and_gradients(channels, dtype, out_dtype):
    torch.manual_seed(channels)
    x = (2 * torch.randn(3, 7, 11, channels, device="cuda") + 1).to(dtype).requires_grad_()
    weight = torch.randn(channels, device="cuda", requires_grad=True)
    bias = torch.randn(channels, device="cuda", requires_grad=True)
    got = layer_norm(x, weight, bias, 1e-5, out_dtype)
    assert "eager_layer_norm" in got.grad_fn.name()
    grad = torch.randn_like(got)
    found = torch.autograd.grad(got, (x, weight, bias), grad)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = F.layer_norm(exact[0], (channels,), exact[1], exact[2], 1e-5)
    wanted = torch.autograd.grad(want, exact, grad.double())
    assert got.dtype == out_dtype
    assert relative_error(got, want) < TOLERANCE[out_dtype]
    for name, gradient, right in zip(("x", "weight", "bias"), found, wanted, strict=True):
        assert relative_error(gradient, right) < TOLERANCE[dtype if name == "x" else torch.float32], name
    with torch.no_grad():
        assert torch.equal(layer_norm(x, weight, bias, 1e-5, out_dtype), got)
    again = torch.autograd.grad(layer_norm(x, weight, bias, 1e-5, out_dtype), (x, weight, bias), grad)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("channels", [3, 97, 2048])
def test_widths_without_a_kernel_go_through_torch(channels):
    x = torch.randn(5, channels, device="cuda")
    got = layer_norm(x, torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda"))
    assert relative_error(got, F.layer_norm(x.double(), (channels,))) < 2e-6


@pytest.mark.parametrize("channels", [4, 96, 132, 768])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_branch_added_on_the_way_in(channels, autocast):
    torch.manual_seed(channels)
    x = torch.randn(3, 5, 7, channels, device="cuda", requires_grad=True)
    branch = torch.randn(3, 5, 7, channels, device="cuda", dtype=autocast or torch.float32, requires_grad=True)
    weight = torch.randn(channels, device="cuda", requires_grad=True)
    bias = torch.randn(channels, device="cuda", requires_grad=True)
    inputs = (x, branch, weight, bias)
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        total, normed = add_layer_norm(*inputs)
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(add_layer_norm(*inputs), (total, normed), strict=True))
    assert "eager_add_layer_norm" in total.grad_fn.name() and normed.dtype == branch.dtype and total.dtype == x.dtype
    grads = torch.randn_like(total), torch.randn_like(normed)
    found = torch.autograd.grad((total, normed), inputs, grads)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want_total = exact[0] + exact[1]
    want = F.layer_norm(want_total, (channels,), exact[2], exact[3], 1e-5)
    wanted = torch.autograd.grad((want_total, want), exact, [g.double() for g in grads])
    assert torch.equal(total, x + branch)
    assert relative_error(normed, want) < TOLERANCE[normed.dtype]
    for name, gradient, right in zip(("x", "branch", "weight", "bias"), found, wanted, strict=True):
        tolerance = TOLERANCE[branch.dtype if name == "branch" else torch.float32]
        assert relative_error(gradient, right) < tolerance, name


@pytest.mark.parametrize("training", [False, True])
def test_compiled_norms_agree(training):
    torch.manual_seed(0)
    x, branch = (torch.randn(2, 9, 96, device="cuda", requires_grad=training) for _ in range(2))
    weight = torch.randn(96, device="cuda", requires_grad=training)
    bias = torch.randn(96, device="cuda", requires_grad=training)

    def norms(x, branch):
        total, normed = add_layer_norm(x, branch, weight, bias)
        return total + layer_norm(normed, weight, bias)

    compiled = torch.compile(norms, fullgraph=True)
    with torch.set_grad_enabled(training):
        got, want = compiled(x, branch), norms(x, branch)
    assert relative_error(got, want.double()) < 2e-6
    if training:
        grad = torch.randn_like(want)
        inputs = (x, branch, weight, bias)
        pairs = zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True)
        assert all(relative_error(a, b.double()) < 2e-6 for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_that_start_in_the_middle_of_a_pack(dtype):
    torch.manual_seed(0)
    channels, buffer = 96, torch.randn(1 + 96 * 12, device="cuda")
    x = buffer[1:].view(12, channels).to(dtype)
    x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(12, channels)
    weight, bias = buffer[1 : 1 + channels], buffer[3 : 3 + channels]
    assert x.data_ptr() % (4 * x.element_size()) and weight.data_ptr() % 16
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    got = layer_norm(*inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = F.layer_norm(exact[0], (channels,), exact[1], exact[2])
    assert relative_error(got, want) < TOLERANCE[dtype]
    grad = torch.cat([got.new_zeros(1), torch.randn_like(got).flatten()])[1:].view_as(got)
    found, wanted = torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, exact, grad.double())
    for name, gradient, right in zip(("x", "weight", "bias"), found, wanted, strict=True):
        assert relative_error(gradient, right) < TOLERANCE[dtype if name == "x" else torch.float32], name
