"""LayerNorm in any dtype against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.scan_cases import relative_error
from tests.ops.standing_in import standing_in
from vmamba.layers import BranchNorm, LayerNorm, ScanNorm
from vmamba.ops import add_layer_norm, layer_norm

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_agrees_with_float64(dtype, out_dtype):
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 7, 20) + 1).to(dtype)
    weight, bias = torch.randn(20), torch.randn(20)
    got = layer_norm(x, weight, bias, 1e-5, out_dtype)
    assert got.dtype == (out_dtype or dtype)
    want = F.layer_norm(x.double(), (20,), weight.double(), bias.double(), 1e-5)
    assert relative_error(got, want) < TOLERANCE[torch.float32 if out_dtype and dtype != torch.float64 else got.dtype]


@pytest.mark.parametrize("norm", [LayerNorm, BranchNorm])
def test_the_modules_are_torchs_layer_norm(norm):
    torch.manual_seed(0)
    ours, theirs = norm(24, eps=1e-3), torch.nn.LayerNorm(24, eps=1e-3)
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 24)
    assert torch.equal(ours(x), theirs(x))


def test_dtypes_under_autocast():
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert LayerNorm(8)(x).dtype == torch.float32
        assert BranchNorm(8)(x.float()).dtype == torch.bfloat16
    assert LayerNorm(8)(x.float()).dtype == BranchNorm(8)(x.float()).dtype == torch.float32
    assert ScanNorm(8)(x.float(), torch.bfloat16).dtype == torch.bfloat16


def test_float16_results_survive_a_sum_beyond_its_range():
    y = torch.full((1, 2, 8), 1e5)
    y[..., 0] = -1e5
    assert ScanNorm(8)(y, torch.float16).isfinite().all()


@pytest.fixture
def kernels():
    """The operators on the CPU, by PyTorch's operators, so that what surrounds the CUDA kernels runs here."""

    def normed(x, weight, bias, eps, out_dtype):
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        return y.to(out_dtype), mean.flatten(), rstd.flatten()

    def gradients(grad, x, weight, mean, rstd):
        rows = (*x.shape[:-1], 1)
        return torch.ops.aten.native_layer_norm_backward(
            grad.to(x.dtype), x, weight.shape, mean.view(rows), rstd.view(rows), weight, weight, [True, True, True]
        )

    def added(x, branch, *rest):
        total = x + branch
        return total, *normed(total, *rest)

    def gradients_of_added(grad_sum, grad, total, weight, mean, rstd):
        dx, dweight, dbias = gradients(grad, total, weight, mean, rstd)
        return dx + grad_sum, (dx + grad_sum).to(grad.dtype), dweight, dbias

    with standing_in(
        "layer_norm",
        layer_norm=normed,
        layer_norm_backward=gradients,
        add_layer_norm=added,
        add_layer_norm_backward=gradients_of_added,
    ):
        yield


def leaves():
    torch.manual_seed(0)
    shapes = (2, 5, 8), (2, 5, 8), (8,), (8,)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.usefixtures("kernels")
def test_gradients_of_the_operator():
    x, _, weight, bias = leaves()
    got, want = layer_norm(x, weight, bias), F.layer_norm(x, (8,), weight, bias)
    assert "eager_layer_norm" in got.grad_fn.name()
    found, wanted = (torch.autograd.grad(y.square().sum(), (x, weight, bias)) for y in (got, want))
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_gradients_of_the_operator_that_adds_a_branch(used):
    x, branch, weight, bias = leaves()
    got = add_layer_norm(x, branch, weight, bias)
    want = x + branch, F.layer_norm(x + branch, (8,), weight, bias)
    assert "eager_add_layer_norm" in got[0].grad_fn.name()
    sums = [sum(y.square().sum() for y, use in zip(ys, used, strict=True) if use) for ys in (got, want)]
    inputs = (x, branch, weight, bias)
    found, wanted = (torch.autograd.grad(s, inputs, allow_unused=True, materialize_grads=True) for s in sums)
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("kernels")
def test_the_operators_have_no_second_derivative():
    x, branch, weight, bias = leaves()
    for y in (layer_norm(x, weight, bias), add_layer_norm(x, branch, weight, bias)[1]):
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiable once"):
            gradient.sum().backward()
