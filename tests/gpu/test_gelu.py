"""The CUDA kernels of GELU and of its backward with the bias's gradient, against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.scan_cases import relative_error
from vmamba.layers import Mlp
from vmamba.ops import linear_gelu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


forward, backward = torch.ops.vmamba.gelu_forward, torch.ops.vmamba.gelu_backward


def exactly(grad, x):
    """In float64: the gradient, and its sums over the rows."""
    dx = torch.ops.aten.gelu_backward(grad.double(), x.double())
    return dx, dx.flatten(0, -2).sum(0)


def check(grad, x):
    dx, dbias = backward(grad, x)
    want, sums = exactly(grad, x)
    assert dx.dtype == x.dtype and dbias.dtype == torch.float32 and dx.shape == x.shape
    assert relative_error(dx, want) < TOLERANCE[x.dtype]
    assert relative_error(dbias, sums) < 2e-6
    assert all(torch.equal(a, b) for a, b in zip(backward(grad, x), (dx, dbias), strict=True))


@pytest.mark.parametrize("rows", [1, 3, 31, 12007])
@pytest.mark.parametrize("hidden", [8, 104, 384, 1000, 1536, 3072, 3080, 6152])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients(rows, hidden, dtype):
    torch.manual_seed(hidden)
    # Not around zero, so that sums do not cancel.
    check(
        1 + torch.randn(rows, hidden, device="cuda").to(dtype), (2 * torch.randn(rows, hidden, device="cuda")).to(dtype)
    )


@pytest.mark.parametrize("shape", [(1, 8), (3, 104), (12007, 1000), (0, 64), (2, 3, 5, 48)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forward(shape, dtype):
    torch.manual_seed(0)
    x = (2 * torch.randn(shape, device="cuda")).to(dtype)
    y = forward(x)
    assert y.dtype == dtype and relative_error(y, F.gelu(x.double())) < TOLERANCE[dtype]
    assert torch.equal(torch.ops.vmamba.gelu(x, x.flatten()[:0]), y)


def test_more_rows_than_the_blocks_hold_at_once():
    check(*torch.randn(2, 1_000_003, 8, device="cuda", dtype=torch.bfloat16).abs())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_magnitude(dtype):
    x = torch.linspace(-12, 12, 8 * 4001, device="cuda").to(dtype).view(-1, 8)
    dx, _ = backward(torch.ones_like(x), x)
    rounding = {torch.float32: 2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    want, _ = exactly(torch.ones_like(x), x)
    assert ((dx - want).abs() <= rounding * want.abs() + 2e-7).all()
    rounding = {torch.float32: 4e-7, torch.bfloat16: 2**-8 + 3e-4, torch.float16: 2**-11 + 1e-5}[dtype]
    want = F.gelu(x.double())
    assert ((forward(x) - want).abs() <= rounding * want.abs() + 3e-7).all()


def test_no_rows():
    x = torch.randn(0, 64, device="cuda")
    dx, dbias = backward(x, x)
    assert dx.shape == x.shape and torch.equal(dbias, torch.zeros(64, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views(dtype):
    torch.manual_seed(0)
    buffer = torch.randn(1 + 96 * 12, device="cuda").to(dtype)
    x = buffer[1:].view(12, 96)
    assert x.data_ptr() % 16
    check(torch.ones(1, device="cuda", dtype=dtype).expand(12, 96), x)
    check(torch.randn(96, 12, device="cuda").to(dtype).t(), x)


def test_maps_of_more_than_2_to_the_31_elements():
    rows, hidden = 2**31 // 512 + 3, 512
    x = torch.ones(rows, hidden, device="cuda", dtype=torch.bfloat16)
    x[-1] = 0
    dx, dbias = backward(x, x)
    slope = exactly(x[:1], x[:1])[0][0, 0].item()
    assert dx[-1].eq(0).all() and torch.equal(dx[0], dx[-2])
    torch.testing.assert_close(dbias, torch.full_like(dbias, slope * (rows - 1)), rtol=1e-4, atol=0)


def leaves(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (2, 9, 7, 24), (96, 24), (96,)
    return [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_linear_gelu(autocast, compiled, monkeypatch):
    torch.compiler.reset()
    # torch 2.11 caches compiled graphs on disk by a key without autocast's dtype: one of bfloat16 would serve float16
    monkeypatch.setattr(torch._functorch.config, "enable_autograd_cache", False)
    inputs = leaves()
    function = torch.compile(linear_gelu, fullgraph=True) if compiled else linear_gelu

    def results(function, inputs):
        y = function(*inputs)
        torch.manual_seed(0)
        return y, *torch.autograd.grad(y, inputs, torch.randn_like(y))

    def plainly(x, weight, bias):
        return F.gelu(F.linear(x, weight, bias))

    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        found, theirs = results(function, inputs), results(plainly, inputs)
    assert compiled or "eager_gelu" in found[0].grad_fn.name()
    double = [t.detach().double().requires_grad_() for t in inputs]
    truth = plainly(*double)
    torch.manual_seed(0)
    grad = torch.randn_like(found[0])  # as rounded as theirs
    wanted = truth, *torch.autograd.grad(truth, double, grad.double())
    for name, got, their, want in zip(("y", "dx", "dweight", "dbias"), found, theirs, wanted, strict=True):
        assert got.dtype == their.dtype
        ours, errs = relative_error(got, want), relative_error(their, want)
        assert ours < 1.5 * errs + 1e-6, f"{name}: {ours:.2e}, PyTorch {errs:.2e}"


def test_captured_in_a_graph():
    grad, x = torch.randn(2, 999, 384, device="cuda", dtype=torch.bfloat16).unbind()
    want = backward(grad, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = backward(grad, x)
    for _ in range(2):
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def gradients_of(mlp, x):
    with torch.autocast("cuda", torch.bfloat16):
        y = mlp(x)
    return y, torch.autograd.grad(y.float().square().mean(), [x, *mlp.parameters()])


@pytest.mark.parametrize("compiled", [False, True])
def test_an_mlp_with_the_kernel_agrees(compiled):
    torch.compiler.reset()
    torch.manual_seed(0)
    ours, theirs = Mlp(48, 192).cuda(), Mlp.__base__(48, 192).cuda()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 14, 14, 48, device="cuda", requires_grad=True)
    got, found = gradients_of(torch.compile(ours, fullgraph=True) if compiled else ours, x)
    want, wanted = gradients_of(theirs, x)
    assert relative_error(got, want.double()) < 1e-2
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and relative_error(a, b.double()) < 1e-2


def test_hooks_on_the_first_layer_are_called():
    mlp, seen = Mlp(48, 192).cuda(), []
    mlp.fc1.register_forward_hook(lambda *_: seen.append("fc1"))
    mlp(torch.randn(2, 7, 7, 48, device="cuda"))
    assert seen == ["fc1"]


def test_there_is_no_second_derivative():
    inputs = leaves()
    (gradient,) = torch.autograd.grad(linear_gelu(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


def test_what_it_refuses():
    x = torch.randn(4, 16, device="cuda")
    with pytest.raises(RuntimeError, match="multiples of 8 numbers"):
        forward(x[:1, :12])
    with pytest.raises(RuntimeError, match="multiples of 8"):
        backward(x[:, :12], x[:, :12])
    with pytest.raises(RuntimeError, match="shape and dtype"):
        backward(x.half(), x)
    with pytest.raises(RuntimeError, match="shape and dtype"):
        backward(x[:2], x)
