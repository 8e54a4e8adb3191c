"""The CUDA kernels of a narrow MLP, against PyTorch's operators in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.scan_cases import relative_error
from vmamba.layers import SS2D, Mlp, PreNormBlock
from vmamba.ops import mlp

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3}
FORWARD, BACKWARD = torch.ops.vmamba.mlp_forward, torch.ops.vmamba.mlp_backward
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# All weights in shared memory at once on some GPUs, a few chunks at a time on all.
widths = pytest.mark.parametrize("hidden", [32, 96, 384, 1024])


def operands(rows, channels, hidden, dtype):
    """x, weights and biases as the kernels take them, with hidden values and results of about one."""
    torch.manual_seed(hidden)

    def normal(*shape):
        return torch.randn(shape, device="cuda")

    return (
        normal(rows, channels).to(dtype),
        (normal(hidden, channels) / channels**0.5).to(dtype),
        normal(hidden),
        (normal(channels, hidden) / hidden**0.5).to(dtype),
        normal(channels),
    )


def exactly(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def in_float64(*tensors):
    return [t.double() for t in tensors]


def backward(grad, x, weight1, bias1, weight2):
    return BACKWARD(grad, x, weight1, weight1.t().contiguous(), bias1, weight2.t().contiguous())


def check_backward(grad, x, weight1, bias1, weight2):
    found = backward(grad, x, weight1, bias1, weight2)
    leaf = x.double().requires_grad_()
    hidden = F.linear(leaf, *in_float64(weight1, bias1))
    hidden.retain_grad()
    activation = F.gelu(hidden)
    F.linear(activation, weight2.double()).backward(grad.double())
    wanted = leaf.grad, activation.detach(), hidden.grad, hidden.grad.flatten(0, -2).sum(0)
    for name, got, want in zip(("dx", "activation", "dhidden", "dbias1"), found, wanted, strict=True):
        assert got.shape == want.shape and got.dtype == (torch.float32 if name == "dbias1" else x.dtype)
        assert relative_error(got, want) < (1e-5 if name == "dbias1" else TOLERANCE[x.dtype]), name
    assert all(torch.equal(a, b) for a, b in zip(found, backward(grad, x, weight1, bias1, weight2), strict=True))


@dtypes
@widths
@pytest.mark.parametrize("channels", [64, 96, 128])
@pytest.mark.parametrize("rows", [1, 17, 255, 70001])
def test_forward(rows, channels, hidden, dtype):
    inputs = operands(rows, channels, hidden, dtype)
    y = FORWARD(*inputs)
    assert y.dtype == dtype and y.shape == inputs[0].shape
    assert relative_error(y, exactly(*in_float64(*inputs))) < TOLERANCE[dtype]
    assert torch.equal(y, FORWARD(*inputs))


@dtypes
@widths
@pytest.mark.parametrize("channels", [64, 96])
@pytest.mark.parametrize("rows", [1, 17, 191, 70001])
def test_backward(rows, channels, hidden, dtype):
    x, weight1, bias1, weight2, _ = operands(rows, channels, hidden, dtype)
    check_backward(torch.randn_like(x), x, weight1, bias1, weight2)


@dtypes
def test_gelu_of_every_magnitude(dtype):
    x = torch.linspace(-12, 12, 64 * 4001, device="cuda").to(dtype).view(-1, 64)
    unit, zero = torch.eye(64, device="cuda", dtype=dtype), torch.zeros(64, device="cuda")
    rounding = {torch.bfloat16: 2**-8 + 3e-4, torch.float16: 2**-11 + 1e-5}[dtype]
    want = F.gelu(x.double())
    assert ((FORWARD(x, unit, zero, unit, zero) - want).abs() <= rounding * want.abs() + 3e-7).all()
    _, activation, slope, _ = backward(torch.ones_like(x), x, unit, zero, unit)
    assert ((activation - want).abs() <= rounding * want.abs() + 1e-6).all()
    want = torch.ops.aten.gelu_backward(torch.ones_like(want), x.double())
    assert ((slope - want).abs() <= rounding * want.abs() + 1e-6).all()


def test_what_is_not_finite():
    """A NaN stays one, in its own row."""
    x, *weights = operands(40, 64, 256, torch.bfloat16)
    x[7, 3], x[21, 60] = float("nan"), float("inf")
    y = FORWARD(x, *weights)
    rows = y.isnan().any(1).nonzero().flatten().tolist()
    assert 7 in rows and set(rows) <= {7, 21} and not y[21].isfinite().all()


@dtypes
def test_no_rows(dtype):
    x, weight1, bias1, weight2, bias2 = operands(0, 96, 384, dtype)
    assert FORWARD(x, weight1, bias1, weight2, bias2).shape == x.shape
    dx, activation, dhidden, dbias1 = backward(x, x, weight1, bias1, weight2)
    assert dx.shape == x.shape and activation.shape == dhidden.shape == (0, 384)
    assert torch.equal(dbias1, torch.zeros(384, device="cuda"))


def test_maps_and_views():
    x, weight1, bias1, weight2, bias2 = operands(2 * 5 * 7, 96, 384, torch.bfloat16)
    want = FORWARD(x, weight1, bias1, weight2, bias2)
    maps = x.view(2, 5, 7, 96)
    assert torch.equal(FORWARD(maps, weight1, bias1, weight2, bias2), want.view(2, 5, 7, 96))
    wide = torch.cat([maps, maps], -1)[..., 96:]
    assert torch.equal(FORWARD(wide, weight1, bias1, weight2, bias2), want.view(2, 5, 7, 96))
    buffer = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)
    shifted = buffer[1:].view_as(x).copy_(x)
    assert shifted.data_ptr() % 16
    assert torch.equal(FORWARD(shifted, weight1, bias1, weight2.t().contiguous().t(), bias2), want)


def test_maps_of_more_than_2_to_the_31_hidden_elements():
    rows = 2**31 // 384 + 1000
    x, weight1, bias1, weight2, bias2 = operands(1000, 96, 384, torch.bfloat16)
    large = x[:1].expand(rows, 96).contiguous()
    large[-1000:] = x
    y, want = FORWARD(large, weight1, bias1, weight2, bias2), FORWARD(x, weight1, bias1, weight2, bias2)
    assert torch.equal(y[-1000:], want) and y[:-1000].eq(want[0]).all()
    del y
    dx, activation, dhidden, _ = backward(large, large, weight1, bias1, weight2)
    wanted = backward(x, x, weight1, bias1, weight2)
    for got, want in zip((dx, activation, dhidden), wanted, strict=False):
        assert torch.equal(got[-1000:], want) and torch.equal(got[-1001], want[0])


def leaves(channels=96, dtype=torch.float32):
    inputs = operands(2 * 96 * 96, channels, 4 * channels, dtype)
    return [t.to(dtype).requires_grad_() for t in (inputs[0].view(2, 96, 96, channels), *inputs[1:])]


def results(function, inputs, autocast):
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        y = function(*inputs)
    torch.manual_seed(0)
    return y, *torch.autograd.grad(y, inputs, torch.randn_like(y))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_no_further_from_the_truth_than_three_layers(autocast, compiled):
    torch.compiler.reset()
    inputs = leaves(dtype=torch.float32 if autocast else torch.bfloat16)
    function = torch.compile(mlp, fullgraph=True) if compiled else mlp
    found, theirs = results(function, inputs, autocast), results(exactly, inputs, autocast)
    assert compiled or "eager_mlp" in found[0].grad_fn.name()
    truth = exactly(*(double := [t.detach().double().requires_grad_() for t in inputs]))
    torch.manual_seed(0)
    wanted = truth, *torch.autograd.grad(truth, double, torch.randn_like(found[0]).double())
    for got, their, want in zip(found, theirs, wanted, strict=True):
        assert got.dtype == their.dtype
        assert relative_error(got, want) < 1.5 * relative_error(their, want) + 1e-4


@pytest.mark.parametrize("asked", [[0], [1, 2], [3, 4], [0, 3]], ids=str)
def test_some_gradients_only(asked):
    inputs = leaves(dtype=torch.bfloat16)
    wanted = results(mlp, inputs, None)
    inputs = [t.detach().requires_grad_(i in asked) for i, t in enumerate(inputs)]
    y = mlp(*inputs)
    torch.manual_seed(0)
    found = torch.autograd.grad(y, [inputs[i] for i in asked], torch.randn_like(y))
    assert all(torch.equal(got, wanted[1 + i]) for got, i in zip(found, asked, strict=True))


def test_captured_in_a_graph():
    x, weight1, bias1, weight2, bias2 = operands(999, 96, 384, torch.bfloat16)

    def both():
        return FORWARD(x, weight1, bias1, weight2, bias2), *backward(x, x, weight1, bias1, weight2)

    want = both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    for _ in range(2):
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("side", "fused"), [(7, False), (96, True)])
def test_an_mlp_uses_it_where_there_are_enough_positions(side, fused, training):
    torch.manual_seed(0)
    layer = Mlp(96, 384).cuda().train(training)
    x = torch.randn(2, side, side, 96, device="cuda")
    with torch.profiler.profile() as profile, torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(training):
        layer(x)
    assert any("mlp_forward" in event.name for event in profile.events()) == fused


def test_there_is_no_second_derivative():
    inputs = leaves(64, torch.bfloat16)
    (gradient,) = torch.autograd.grad(mlp(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


def test_what_it_refuses():
    x, weight1, bias1, weight2, bias2 = operands(8, 64, 128, torch.bfloat16)
    with pytest.raises(RuntimeError, match="does not serve 64 channels with 40"):
        FORWARD(x, weight1[:40], bias1[:40], weight2[:, :40], bias2)
    with pytest.raises(RuntimeError, match=r"weight1 \(hidden, channels\)"):
        FORWARD(x[:, :32], weight1, bias1, weight2, bias2)
    with pytest.raises(RuntimeError, match=r"weight2 must be \(64, 128\)"):
        FORWARD(x, weight1, bias1, weight1, bias2)
    with pytest.raises(RuntimeError, match="bias2 must be 64 numbers in float32"):
        FORWARD(x, weight1, bias1, weight2, bias2.bfloat16())
    with pytest.raises(RuntimeError, match="weight1 must have the dtype of x"):
        FORWARD(x, weight1.half(), bias1, weight2, bias2)
    with pytest.raises(RuntimeError, match="bfloat16 and float16"):
        FORWARD(x.float(), weight1.float(), bias1, weight2.float(), bias2)
    with pytest.raises(RuntimeError, match="grad must have the shape"):
        backward(x[:4], x, weight1, bias1, weight2)
    wide, *weights, _ = operands(8, 128, 128, torch.bfloat16)
    with pytest.raises(RuntimeError, match="no backward for 128 channels"):
        backward(wide, wide, *weights)


# -- A residual branch ------------------------------------------------------------------------------------------------

RESIDUAL = torch.ops.vmamba.mlp_residual
NOTHING = (None, None, 0.0, None)  # to be done with a branch


def normal(*shape):
    return torch.randn(shape, device="cuda")


def residual_operands(rows, channels, hidden, x_dtype, dtype):
    """The stream, a branch, the norm and the projection at its end, the norm before the MLP, and the MLP's weights."""
    branch, *weights = operands(rows, channels, hidden, dtype)
    stream = (3 * normal(rows, channels) + 1).to(x_dtype)
    norms = [(normal(channels), normal(channels), 1e-3) for _ in range(2)]
    projection = (normal(channels, channels) / channels**0.5).to(dtype)
    return stream, 2 * branch + 1, (*norms[0], projection), (*norms[1], *weights)


def residual_truth(x, branch, end, rest):
    x, branch, *rest = (t.double() if isinstance(t, torch.Tensor) else t for t in (x, branch, *end, *rest))
    weight, bias, eps, projection, norm_weight, norm_bias, norm_eps, *weights = rest
    if projection is not None:
        branch = F.linear(F.layer_norm(branch, weight.shape, weight, bias, eps), projection)
    total = x if branch is None else x + branch
    return total + exactly(F.layer_norm(total, norm_weight.shape, norm_weight, norm_bias, norm_eps), *weights)


@dtypes
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("hidden", [32, 384, 1024])
@pytest.mark.parametrize("channels", [64, 96, 128])
@pytest.mark.parametrize("rows", [1, 17, 255, 70001])
def test_residual(rows, channels, hidden, wide, dtype):
    x, branch, end, rest = residual_operands(rows, channels, hidden, torch.float32 if wide else dtype, dtype)
    for given in ((None, NOTHING), (branch, NOTHING), (branch, end)):
        y = RESIDUAL(x, given[0], *given[1], *rest)
        assert y.dtype == x.dtype and y.shape == x.shape
        # What is added, which is what the kernel rounds.
        truth = residual_truth(x, *given, rest)
        assert relative_error(y - x.double(), truth - x) < TOLERANCE[dtype] * (1 if wide else 3)
        assert torch.equal(y, RESIDUAL(x, given[0], *given[1], *rest))


def test_residual_rows_do_not_meet():
    """A NaN stays in its own row, and what is not there is not read."""
    x, branch, end, rest = residual_operands(40, 96, 384, torch.float32, torch.bfloat16)
    want = RESIDUAL(x, branch, *end, *rest)
    x[7, 3] = branch[9, 2] = float("nan")
    y = RESIDUAL(x, branch, *end, *rest)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [7, 9]
    assert torch.equal(y[10:], want[10:]) and torch.equal(RESIDUAL(x[10:], branch[10:], *end, *rest), want[10:])
    assert RESIDUAL(x[:0], branch[:0], *end, *rest).shape == (0, 96)


def test_residual_of_maps_and_views():
    x, branch, end, rest = residual_operands(2 * 5 * 7, 64, 256, torch.float32, torch.bfloat16)
    want = RESIDUAL(x, branch, *end, *rest).view(2, 5, 7, 64)
    maps, wide = x.view(2, 5, 7, 64), torch.cat([branch, branch], -1)[:, 64:].view(2, 5, 7, 64)
    assert torch.equal(RESIDUAL(maps, wide, *end, *rest), want)
    buffer = torch.empty(x.numel() + 1, device="cuda")
    assert torch.equal(RESIDUAL(buffer[1:].view_as(x).copy_(x), branch, *end, *rest), want.flatten(0, 2))


def test_residual_captured_in_a_graph():
    x, branch, end, rest = residual_operands(999, 96, 384, torch.float32, torch.bfloat16)
    want = RESIDUAL(x, branch, *end, *rest)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = RESIDUAL(x, branch, *end, *rest)
    graph.replay()
    assert torch.equal(found, want)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_block_is_no_further_from_the_truth_than_its_parts(autocast, compiled):
    torch.compiler.reset()
    torch.manual_seed(0)
    block = PreNormBlock(96, SS2D(96), Mlp(96, 384)).cuda().eval()
    x = normal(2, 96, 96, 96)
    expected = block(x)
    dtype = torch.float32 if autocast else torch.bfloat16
    block, x = block.to(dtype), x.to(dtype)
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        with torch.profiler.profile() as profile:
            y = (torch.compile(block, fullgraph=True) if compiled else block)(x)
        total, normed = block.norm2(x, block.mixer(block.norm1(x)))
        parts = total + block.mlp(normed)
    names = {event.name for event in profile.events()}
    assert any("mlp_residual" in name for name in names)
    assert y.dtype == parts.dtype
    assert relative_error(y, expected) < 1.2 * relative_error(parts, expected) + 1e-4


def test_what_a_residual_branch_refuses():
    x, branch, end, rest = residual_operands(8, 64, 128, torch.float32, torch.bfloat16)
    with pytest.raises(RuntimeError, match="branch must have the shape of x"):
        RESIDUAL(x, branch[:4], *end, *rest)
    with pytest.raises(RuntimeError, match="branch must have the dtype of weight1"):
        RESIDUAL(x, branch.float(), *end, *rest)
    with pytest.raises(RuntimeError, match="x must be float32 or have the dtype of weight1"):
        RESIDUAL(x.half(), branch, *end, *rest)
    with pytest.raises(RuntimeError, match="norm_bias must be 64 numbers in float32"):
        RESIDUAL(x, branch, *end, rest[0], rest[1][:8], *rest[2:])
    with pytest.raises(RuntimeError, match="takes a branch and the parameters of its norm"):
        RESIDUAL(x, None, *end, *rest)
    with pytest.raises(RuntimeError, match=r"projection must be \(64, 64\)"):
        RESIDUAL(x, branch, *end[:3], end[3][:32], *rest)
