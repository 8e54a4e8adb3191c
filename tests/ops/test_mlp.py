"""A narrow MLP as one operator: what surrounds the CUDA kernels, with PyTorch in their place."""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import create_feature_extractor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.standing_in import standing_in
from vmamba.layers import SS2D, GatedSS2D, Mlp, PreNormBlock, run_blocks
from vmamba.ops import mlp

module = sys.modules["vmamba.ops.mlp"]  # the package has a function of that name
CHANNELS, HIDDEN = 64, 96


def plainly(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def forward(x, weight1, bias1, weight2, bias2):
    assert bias1.dtype == bias2.dtype == torch.float32
    return plainly(x, weight1, bias1.to(x.dtype), weight2, bias2.to(x.dtype))


def backward(grad, x, weight1, weight1_t, bias1, weight2_t):
    assert weight1_t.is_contiguous() and weight2_t.is_contiguous()
    hidden = F.linear(x, weight1, bias1.to(x.dtype))
    dhidden = torch.ops.aten.gelu_backward(grad @ weight2_t.t(), hidden)
    return dhidden @ weight1_t.t(), F.gelu(hidden), dhidden, dhidden.float().flatten(0, -2).sum(0)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(module, "_FEWEST_POSITIONS", 8)
    with standing_in("mlp", mlp=forward, mlp_forward=forward, mlp_backward=backward):
        yield


def leaves(dtype=torch.float32, channels=CHANNELS, hidden=HIDDEN):
    torch.manual_seed(0)
    shapes = (2, 5, 3, channels), (hidden, channels), (hidden,), (channels, hidden), (channels,)
    return [(torch.randn(shape) / shape[-1] ** 0.5).to(dtype).requires_grad_() for shape in shapes]


def results(function, inputs):
    y = function(*inputs)
    return y, *torch.autograd.grad(y.square().sum(), [t for t in inputs if t.requires_grad])


def test_without_the_kernel_it_is_torchs():
    inputs = leaves()
    y = mlp(*inputs)
    assert y.grad_fn.name() == plainly(*inputs).grad_fn.name() and torch.equal(y, plainly(*inputs))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype):
    inputs = leaves(dtype)
    found, wanted = results(mlp, inputs), results(plainly, inputs)
    assert "eager_mlp" in found[0].grad_fn.name()
    assert [g.dtype for g in found] == [dtype] * 6
    tolerance = {} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.usefixtures("kernels")
def test_gradients_under_autocast_have_the_dtypes_of_the_parameters():
    inputs = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(*inputs).dtype == torch.bfloat16
        found, wanted = results(mlp, inputs), results(plainly, inputs)
    assert all(g.dtype == torch.float32 for g in found[1:])
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).norm() < 2e-2 * want.norm()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("asked", [[0], [1], [2], [3, 4], [0, 4]], ids=str)
def test_some_gradients_only(asked):
    inputs = [t.detach().requires_grad_(i in asked) for i, t in enumerate(leaves())]
    torch.testing.assert_close(results(mlp, inputs), results(plainly, inputs))


@pytest.mark.usefixtures("kernels")
def test_without_gradients():
    inputs = leaves()
    with torch.no_grad():
        y = mlp(*inputs)
    assert y.grad_fn is None and torch.equal(y, plainly(*inputs))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("sizes", "training", "served"),
    [
        ((64, 32), True, True),
        ((96, 384), True, True),
        ((96, 1024), True, True),
        ((96, 1056), True, False),
        ((96, 40), True, False),
        ((128, 512), True, False),
        ((128, 512), False, True),
        ((192, 768), False, False),
    ],
    ids=str,
)
def test_what_is_served(sizes, training, served):
    inputs = leaves(torch.bfloat16, *sizes)
    with torch.set_grad_enabled(training):
        assert module.serves_mlp(*inputs) == served


@pytest.mark.usefixtures("kernels")
def test_few_positions_are_left_to_torch():
    x, *weights = leaves()
    assert module.serves_mlp(x[:1, :2, :4], *weights) is False and module.serves_mlp(x[:1], *weights)


@pytest.mark.usefixtures("kernels")
def test_two_dtypes_are_refused_as_ever():
    x, *weights = leaves()
    with pytest.raises(RuntimeError, match="same dtype"):
        mlp(x.bfloat16(), *weights)


@pytest.mark.usefixtures("kernels")
def test_what_is_registered():
    x, weight1, bias1, weight2, bias2 = leaves()
    torch.library.opcheck(torch.ops.vmamba.mlp, (x, weight1, bias1, weight2, bias2))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.vmamba.mlp_forward, (x, weight1, bias1, weight2, bias2))
        transposed = weight1.t().contiguous(), bias1, weight2.t().contiguous()
        operands = [t.detach() for t in (torch.ones_like(x), x, weight1, *transposed)]
        torch.library.opcheck(torch.ops.vmamba.mlp_backward, operands)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend):
    torch.compiler.reset()
    inputs = leaves()
    compiled = torch.compile(mlp, fullgraph=True, backend=backend)
    torch.testing.assert_close(results(compiled, inputs), results(plainly, inputs))


@pytest.mark.usefixtures("kernels")
def test_floating_point_operations_are_those_of_two_layers():
    inputs, counts = leaves(), []
    for function in (mlp, plainly):
        with FlopCounterMode(display=False) as counter:
            function(*inputs).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.usefixtures("kernels")
def test_there_is_no_second_derivative():
    inputs = leaves()
    for function in (mlp, lambda *inputs: torch.ops.vmamba.mlp(*inputs)):
        (gradient,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiable once"):
            gradient.sum().backward()


# -- The layer --------------------------------------------------------------------------------------------------------


def is_fused(layer, x):
    y = layer(x)  # without which the graph is gone
    return "eager_mlp" in y.grad_fn.name()


def layers(**options):
    """Ours, and timm's with its weights."""
    torch.manual_seed(0)
    ours, theirs = Mlp(CHANNELS, HIDDEN, **options), Mlp.__base__(CHANNELS, HIDDEN, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_agrees(compiled):
    torch.compiler.reset()
    ours, theirs = layers()
    x = leaves()[0]
    assert is_fused(ours, x)
    function = torch.compile(ours, fullgraph=True) if compiled else ours
    found, wanted = (
        (y := f(x), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
        for f, layer in ((function, ours), (theirs, theirs))
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("kernels")
def test_dropout_is_applied_in_training_and_fused_out_of_it():
    ours, theirs = layers(drop=0.5)
    x = leaves()[0]
    assert not is_fused(ours, x) and is_fused(ours.eval(), x)
    ours.train()
    torch.manual_seed(0)
    y = ours(x)
    torch.manual_seed(0)
    assert torch.equal(y, theirs(x))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.fc2.register_forward_hook(lambda *_: None),
        lambda layer: layer.drop1.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.act.register_full_backward_hook(lambda *_: None),
        lambda layer: setattr(layer.fc2, "forward", layer.fc2.forward),
        lambda layer: setattr(layer, "fc2", nn.Linear(HIDDEN, CHANNELS, bias=False)),
        lambda layer: setattr(layer, "fc2", nn.Linear(HIDDEN, CHANNELS + 8)),
        lambda layer: setattr(layer, "norm", nn.LayerNorm(HIDDEN)),
        lambda layer: setattr(layer, "act", nn.GELU("tanh")),
    ],
    ids=["hook", "pre-hook", "backward hook", "forward", "no bias", "width", "norm", "tanh"],
)
def test_a_layer_calls_what_is_not_plain(change):
    layer = Mlp(CHANNELS, HIDDEN)
    x = leaves()[0]
    assert is_fused(layer, x)
    change(layer)
    assert not is_fused(layer, x)


# -- A residual branch ------------------------------------------------------------------------------------------------


def norm_plainly(x, weight, bias, eps, dtype):
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(dtype)


def residual_kernel(x, branch, branch_weight, branch_bias, branch_eps, projection, weight, bias, eps, *weights):
    weight1, bias1, weight2, bias2 = weights
    dtype = weight1.dtype
    assert x.dtype in (dtype, torch.float32)
    assert {t.dtype for t in (branch, projection, weight2) if t is not None} <= {dtype}
    assert {t.dtype for t in (branch_weight, branch_bias, weight, bias, bias1, bias2) if t is not None} == {
        torch.float32
    }
    if projection is not None:
        branch = F.linear(norm_plainly(branch, branch_weight, branch_bias, branch_eps, dtype), projection)
    total = x if branch is None else x + branch
    y = plainly(norm_plainly(total, weight, bias, eps, dtype), weight1, bias1.to(dtype), weight2, bias2.to(dtype))
    return (total + y).to(x.dtype)


@pytest.fixture
def residual_kernels(kernels):
    with standing_in("mlp", mlp_residual=residual_kernel):
        yield


def block(mixer=None, **options):
    torch.manual_seed(0)
    mixer = nn.Linear(CHANNELS, CHANNELS) if mixer is None else mixer(CHANNELS)
    block = PreNormBlock(CHANNELS, mixer, Mlp(CHANNELS, HIDDEN), **options).eval()
    for norm in (block.norm2, getattr(mixer, "out_norm", block.norm1)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return block


def ends_in_one_pass(block, x):
    return block.branches(x)[1] is None


@pytest.mark.usefixtures("residual_kernels")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("mixer", [None, SS2D])
@torch.no_grad()
def test_a_block_ends_in_one_pass(mixer, precision, compiled):
    torch.compiler.reset()
    ours, x = block(mixer), leaves()[0].detach()
    expected = x + ours.mixer(ours.norm1(x))
    expected = (expected + ours.mlp(ours.norm2(expected))).double()
    if precision == "bfloat16":
        ours, x = ours.bfloat16(), x.bfloat16()
    run = torch.compile(run_blocks, fullgraph=True) if compiled else run_blocks
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        assert ends_in_one_pass(ours, x)
        y, alone = run([ours, nn.Identity()], x), ours(x)
    assert y.dtype == alone.dtype == x.dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if precision == "float32" else {"rtol": 3e-2, "atol": 3e-2}
    for got in (y, alone):
        torch.testing.assert_close(got.double(), expected, **tolerance)


@pytest.mark.usefixtures("residual_kernels")
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_channels_are_mixed_in_one_pass(compiled, monkeypatch):
    torch.compiler.reset()
    ours, x, called = block(), leaves()[0].detach(), []
    expected = x + ours.mlp(ours.norm2(x))
    monkeypatch.setattr(Mlp, "residual", lambda mlp, *args, f=Mlp.residual: called.append(mlp) or f(mlp, *args))
    torch.testing.assert_close(ours.mix_channels(x), expected)
    assert called == [ours.mlp]


@pytest.mark.usefixtures("residual_kernels")
@torch.no_grad()
def test_stochastic_depth_is_applied_in_training_and_fused_out_of_it():
    ours, x = block(drop_path=0.5), leaves()[0].detach()
    assert ends_in_one_pass(ours, x)
    assert not ends_in_one_pass(ours.train(), x)


@pytest.mark.usefixtures("residual_kernels")
@pytest.mark.parametrize("trained", ["all", "mixer", "norm1", "x"])
def test_a_block_that_is_asked_for_gradients_is_computed_in_parts(trained):
    """Of whatever: an MLP may be frozen behind a mixer that is not."""
    ours, x = block(SS2D).requires_grad_(trained == "all").bfloat16(), leaves()[0].detach().bfloat16()
    wanted = ours if trained == "all" else x if trained == "x" else getattr(ours, trained)
    wanted.requires_grad_()
    ours(x).sum().backward()
    assert all(t.grad is not None for t in ([x] if trained == "x" else wanted.parameters()))
    with torch.no_grad():
        assert ends_in_one_pass(ours, x)


@pytest.mark.usefixtures("residual_kernels")
@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.norm2.register_forward_hook(lambda *_: None),
        lambda block: block.mlp.register_forward_pre_hook(lambda *_: None),
        lambda block: block.mlp.fc1.register_forward_hook(lambda *_: None),
        lambda block: block.drop_path.register_forward_hook(lambda *_: None),
        lambda block: setattr(block, "drop_path", nn.Dropout()),
        lambda block: setattr(block, "norm2", nn.LayerNorm(CHANNELS)),
        lambda block: setattr(block, "mlp", nn.Identity()),
    ],
    ids=["norm's hook", "MLP's pre-hook", "layer's hook", "drop path's hook", "drop path", "norm", "no MLP"],
)
@torch.no_grad()
def test_a_block_calls_what_is_not_plain(change):
    ours, x = block(), leaves()[0].detach()
    assert ours._ends_in_one_pass(x)
    change(ours)
    assert not ours._ends_in_one_pass(x)


@pytest.mark.usefixtures("residual_kernels")
@pytest.mark.parametrize(
    "change",
    [
        lambda mixer: mixer.out_norm.register_forward_hook(lambda *_: None),
        lambda mixer: mixer.out_proj.register_forward_pre_hook(lambda *_: None),
        lambda mixer: mixer.in_proj.register_forward_hook(lambda *_: None),
        lambda mixer: mixer.register_forward_hook(lambda *_: None),
        lambda mixer: setattr(mixer, "out_proj", nn.Linear(CHANNELS, CHANNELS, bias=True).bfloat16()),
        lambda mixer: mixer.half(),
    ],
    ids=["norm's hook", "projection's pre-hook", "first projection's hook", "hook", "bias", "float16"],
)
@torch.no_grad()
def test_a_mixer_ends_itself_where_somebody_could_tell(change):
    mixer, x = block(SS2D).bfloat16().mixer, leaves()[0].detach().bfloat16()
    assert mixer.end(x) is not None
    change(mixer)
    assert mixer.end(x.to(mixer.in_proj.weight.dtype)) is None


@pytest.mark.usefixtures("residual_kernels")
@pytest.mark.parametrize("mixer", [partial(SS2D, ssm_ratio=2.0), GatedSS2D])
@torch.no_grad()
def test_a_wider_or_gated_mixer_ends_itself(mixer, monkeypatch):
    ours, x, projections = block(mixer).bfloat16(), leaves()[0].detach().bfloat16(), []
    residual = Mlp.residual
    monkeypatch.setattr(Mlp, "residual", lambda *args: projections.append(args[4:]) or residual(*args))
    torch.testing.assert_close(ours(x), ours.mix_channels(ours.mix_positions(x)), rtol=3e-2, atol=3e-2)
    assert projections == [(), ()]


@pytest.mark.usefixtures("residual_kernels")
@torch.no_grad()
def test_a_traced_block_shows_its_parts():
    ours, x = block().requires_grad_(False), leaves()[0].detach()
    traced = torch.jit.trace(ours, x, check_trace=False)
    assert "mlp_residual" not in str(traced.inlined_graph)
    nodes = [node.target for node in create_feature_extractor(ours, return_nodes=["mlp"]).graph.nodes]
    assert {"norm2", "mlp"} <= set(nodes)


@pytest.mark.usefixtures("residual_kernels")
def test_what_is_registered_for_a_branch():
    x, *weights = (t.detach() for t in leaves())
    norm, no_norm = (torch.randn(CHANNELS), torch.randn(CHANNELS), 1e-5), (None, None, 0.0)
    projection = torch.randn(CHANNELS, CHANNELS)
    residual, products = torch.ops.vmamba.mlp_residual, 4 * x.numel() * HIDDEN
    for branch, end, flops in (
        (None, (*no_norm, None), products),
        (x, (*no_norm, None), products),
        (x, (*norm, projection), products + 2 * x.numel() * CHANNELS),
    ):
        torch.library.opcheck(residual, (x, branch, *end, *norm, *weights))
        with FlopCounterMode(display=False) as counter:
            residual(x, branch, *end, *norm, *weights)
        assert counter.get_total_flops() == flops
    y = residual(x.clone().requires_grad_(), x, *no_norm, None, *norm, *weights)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        y.sum().backward()
