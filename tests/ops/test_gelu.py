"""A linear layer and GELU as one: what surrounds the CUDA kernel, with PyTorch in its place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.ops.standing_in import standing_in
from vmamba.layers import Mlp
from vmamba.ops import linear_gelu


@pytest.fixture
def kernels():
    def gradients(grad, x):
        dx = torch.ops.aten.gelu_backward(grad, x)
        return dx, dx.float().flatten(0, -2).sum(0)

    with standing_in("gelu", gelu=lambda x, bias: F.gelu(x), gelu_forward=F.gelu, gelu_backward=gradients):
        yield


def leaves(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 5, 6), (8, 6), (8,))]


def plainly(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias))


def gradients_of(function, inputs):
    return torch.autograd.grad(function(*inputs).square().sum(), inputs)


def test_without_the_kernel_it_is_torchs():
    inputs = leaves()
    y = linear_gelu(*inputs)
    assert y.grad_fn.name() == "GeluBackward0" and torch.equal(y, plainly(*inputs))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype):
    inputs = leaves(dtype)
    y = linear_gelu(*inputs)
    assert y.grad_fn.name() == "eager_geluBackward" and torch.equal(y, plainly(*inputs))
    found, wanted = gradients_of(linear_gelu, inputs), gradients_of(plainly, inputs)
    assert [g.dtype for g in found] == [dtype] * 3
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("kernels")
def test_gradients_under_autocast_have_the_dtypes_of_the_parameters():
    inputs = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_gelu(*inputs).dtype == torch.bfloat16
        found, wanted = gradients_of(linear_gelu, inputs), gradients_of(plainly, inputs)
    assert all(g.dtype == torch.float32 for g in found)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-1)


@pytest.mark.usefixtures("kernels")
def test_without_a_gradient_of_the_bias_it_is_torchs():
    x, weight, bias = leaves()
    assert linear_gelu(x, weight, bias.detach()).grad_fn.name() == "GeluBackward0"


@pytest.mark.parametrize("compiled", [False, True])
def test_without_any_gradient_the_kernel_is_called(compiled):
    torch.compiler.reset()
    inputs, calls = leaves(), []

    def seen(x):
        calls.append(x.shape)
        return F.gelu(x)

    function = torch.compile(linear_gelu, fullgraph=True) if compiled else linear_gelu
    with standing_in("gelu", gelu_forward=seen), torch.no_grad():
        torch.testing.assert_close(function(*inputs), plainly(*inputs))
    assert calls == [(2, 5, 8)]


@pytest.mark.usefixtures("kernels")
def test_the_gradient_of_the_bias_alone():
    x, weight, bias = leaves()
    (found,), (wanted,) = (
        torch.autograd.grad(function(x.detach(), weight.detach(), bias).square().sum(), bias)
        for function in (linear_gelu, plainly)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("kernels")
def test_what_is_registered():
    bias = leaves()[2]
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.vmamba.gelu, (hidden, bias))
    torch.library.opcheck(torch.ops.vmamba.gelu_forward, (hidden.detach(),))
    torch.library.opcheck(torch.ops.vmamba.gelu_backward, (hidden.detach(), hidden.detach()))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend):
    torch.compiler.reset()
    inputs = leaves()
    compiled = torch.compile(linear_gelu, fullgraph=True, backend=backend)
    torch.testing.assert_close(gradients_of(compiled, inputs), gradients_of(plainly, inputs))


@pytest.mark.usefixtures("kernels")
def test_there_is_no_second_derivative():
    x, weight, bias = leaves()
    for function in (linear_gelu, lambda x, weight, bias: torch.ops.vmamba.gelu(F.linear(x, weight), bias)):
        (gradient,) = torch.autograd.grad(function(x, weight, bias).square().sum(), bias, create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiable once"):
            gradient.sum().backward()


def mlps(**options):
    """Ours, and timm's with its weights."""
    torch.manual_seed(0)
    ours, theirs = Mlp(6, 8, **options), Mlp.__base__(6, 8, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def results(mlp, x):
    torch.manual_seed(0)  # of the dropout
    y = mlp(x)
    return y, torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])


def is_fused(mlp, x):
    """Whether the node of GELU in the graph is ours."""
    y = mlp(x)  # without which the graph is gone
    nodes, names = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [next_node for next_node, _ in node.next_functions if next_node is not None]
    return "eager_geluBackward" in names


def test_an_mlp_without_the_kernel_is_timms():
    x = torch.randn(2, 3, 4, 6, requires_grad=True)
    (y, found), (expected, wanted) = (results(mlp, x) for mlp in mlps(drop=0.5))
    assert torch.equal(y, expected) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("options", [{}, {"drop": 0.5}, {"norm_layer": nn.LayerNorm}], ids=str)
def test_an_mlp_with_the_kernel_agrees(options):
    x = torch.randn(2, 3, 4, 6, requires_grad=True)
    ours, theirs = mlps(**options)
    assert is_fused(ours, x)
    torch.testing.assert_close(results(ours, x), results(theirs, x))


@pytest.mark.usefixtures("kernels")
def test_a_compiled_mlp_agrees():
    torch.compiler.reset()
    x = torch.randn(2, 3, 4, 6, requires_grad=True)
    ours, theirs = mlps()
    seen = []

    def look(graph, inputs):
        seen.append(graph.code)
        return graph

    torch.compile(ours, fullgraph=True, backend=look)(x)
    assert "torch.ops.vmamba.gelu" in seen[0]
    torch.testing.assert_close(results(torch.compile(ours, fullgraph=True), x), results(theirs, x))


class OtherLinear(nn.Linear):
    """As an adapter's would be."""

    def forward(self, x):
        return super().forward(x) + 0


def frozen_bias(mlp):
    mlp.fc1.bias.requires_grad_(False)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: mlp.fc1.register_forward_hook(lambda *_: None),
        lambda mlp: mlp.fc1.register_forward_pre_hook(lambda *_: None),
        lambda mlp: mlp.act.register_full_backward_hook(lambda *_: None),
        lambda mlp: setattr(mlp, "fc1", OtherLinear(6, 8)),
        lambda mlp: setattr(mlp, "fc1", nn.Linear(6, 8, bias=False)),
        lambda mlp: setattr(mlp.fc1, "forward", mlp.fc1.forward),
        lambda mlp: setattr(mlp, "act", nn.GELU("tanh")),
        lambda mlp: setattr(mlp, "act", nn.SiLU()),
        frozen_bias,
    ],
    ids=["hook", "pre-hook", "backward hook", "class", "no bias", "forward", "tanh", "act", "frozen bias"],
)
def test_an_mlp_calls_what_is_not_plain(change):
    mlp = Mlp(6, 8)
    x = torch.randn(2, 3, 4, 6)
    assert is_fused(mlp, x)
    change(mlp)
    assert not is_fused(mlp, x)


@pytest.mark.usefixtures("kernels")
def test_hooks_see_what_they_would():
    mlp, x, seen = Mlp(6, 8), torch.randn(2, 3, 4, 6), []
    mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    mlp(x)
    assert torch.equal(seen[0], mlp.fc1(x))
    seen.clear()
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        plain = Mlp(6, 8)
        plain(x)
    finally:
        hook.remove()
    assert plain.fc1 in seen and plain.act in seen
