"""When a block is one operator, what goes in and what comes out; with something countable in the kernels' place."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.standing_in import standing_in
from vmamba.layers import SS2D, BranchNorm, GatedSS2D, LayerNorm, Mlp, PreNormBlock, ScanNorm
from vmamba.ops import record_scans
from vmamba.ops.block import BlockWeights

DIM = 32


class Kernel:
    """The operators' stand-in: what it was called with, and gradients that tell whose they are."""

    def __init__(self):
        self.calls = []

    def forward(self, x, branch, weights, route, factors1, factors2, eps, dtype, checkpoint_steps, fused_mlp):
        self.calls.append((x, branch, BlockWeights(*weights), factors1, factors2, eps, dtype, fused_mlp))
        total = x + (x if branch is None else branch)
        results = [total.to(dtype) * 2, total]
        return [*results, total.clone(), x[:1].clone()] if checkpoint_steps else results

    def backward(self, grad_total, grad_branch, kept, weights, route, factors1, factors2, had_branch, steps):
        total, stream, first = kept
        assert torch.equal(stream, self.calls[-1][0] if self.calls[-1][1] is None else total)
        assert torch.equal(first, self.calls[-1][0][:1])
        gradients = [torch.full_like(weight, i) for i, weight in enumerate(weights)]
        return [*gradients, grad_total + 2 * grad_branch, *([grad_branch.clone()] if had_branch else [])]


@pytest.fixture
def kernel():
    kernel = Kernel()
    with standing_in("block", block_forward=kernel.forward, block_backward=kernel.backward):
        yield kernel


def make_block(mixer=None, drop_path=0.0):
    torch.manual_seed(0)
    return PreNormBlock(DIM, mixer or SS2D(DIM), Mlp(DIM, 2 * DIM), drop_path)


def make_map(batch=2):
    return torch.randn(batch, 3, 5, DIM, requires_grad=True)


def call(block, x, branch=None, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype):
        return block.branches(x, branch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_branch", [False, True])
def test_what_goes_in_and_what_comes_out(kernel, with_branch, dtype):
    block, x = make_block(), make_map()
    for eps, norm in zip((1e-3, 1e-4, 1e-2), (block.norm1, block.mixer.out_norm, block.norm2), strict=True):
        norm.eps = eps
    branch = torch.randn(x.shape).to(dtype).requires_grad_() if with_branch else None
    total, out = call(block, x, branch, dtype)
    ((_, _, weights, *factors, eps, computed, fused_mlp),) = kernel.calls
    assert total.dtype == torch.float32 and out.dtype == dtype
    assert total.grad_fn is out.grad_fn
    assert factors == [None, None] and eps == [1e-3, 1e-4, 1e-2] and computed == dtype and not fused_mlp

    (total.sum() + 3 * out.sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 7))
    assert branch is None or torch.equal(branch.grad, torch.full_like(branch, 3))
    ssm, mlp = block.mixer.ssm, block.mlp
    own = {
        "norm1_weight": block.norm1.weight,
        "norm1_bias": block.norm1.bias,
        "in_proj": block.mixer.in_proj.weight,
        "conv": block.mixer.conv.weight,
        "x_proj": ssm.x_proj.weight,
        "A_log": ssm.A_log,
        "D": ssm.D,
        "dt_weight": ssm.dt_weight,
        "dt_bias": ssm.dt_bias,
        "out_norm_weight": block.mixer.out_norm.weight,
        "out_norm_bias": block.mixer.out_norm.bias,
        "out_proj": block.mixer.out_proj.weight,
        "norm2_weight": block.norm2.weight,
        "norm2_bias": block.norm2.bias,
        "fc1_weight": mlp.fc1.weight,
        "fc1_bias": mlp.fc1.bias,
        "fc2_weight": mlp.fc2.weight,
        "fc2_bias": mlp.fc2.bias,
    }
    assert len(own) == len(list(block.parameters()))
    for i, (name, given) in enumerate(weights._asdict().items()):
        assert torch.equal(given, own[name]) and torch.equal(own[name].grad, torch.full_like(own[name], i))


def test_results_that_nothing_depends_on(kernel):
    block, x = make_block(), make_map()
    for used, gradient in ((0, 1.0), (1, 2.0)):
        (found,) = torch.autograd.grad(call(block, x)[used].float().sum(), x)
        assert torch.equal(found, torch.full_like(x, gradient))


def test_images_are_dropped_as_by_the_layers(kernel):
    block, x = make_block(drop_path=0.5).train(), make_map(batch=64)
    torch.manual_seed(3)
    call(block, x)
    torch.manual_seed(3)
    for factors in kernel.calls[0][3:5]:
        assert factors.shape == (64, 1, 1) and factors.dtype == torch.bfloat16
        assert torch.equal(factors.flatten(), block.drop_path(torch.ones(64, dtype=torch.bfloat16)))
    call(block.eval(), x)
    assert kernel.calls[1][3:5] == (None, None)


def put(owner, **attributes):
    for name, value in attributes.items():
        setattr(owner, name, value)


LAYERS = {
    "norm1": lambda block: block.norm1,
    "mixer": lambda block: block.mixer,
    "in_proj": lambda block: block.mixer.in_proj,
    "conv": lambda block: block.mixer.conv,
    "ssm": lambda block: block.mixer.ssm,
    "x_proj": lambda block: block.mixer.ssm.x_proj,
    "out_norm": lambda block: block.mixer.out_norm,
    "out_proj": lambda block: block.mixer.out_proj,
    "drop_path": lambda block: block.drop_path,
    "norm2": lambda block: block.norm2,
    "mlp": lambda block: block.mlp,
    "fc1": lambda block: block.mlp.fc1,
    "act": lambda block: block.mlp.act,
    "fc2": lambda block: block.mlp.fc2,
}
OTHERS = {
    "another norm": lambda block: put(block, norm1=LayerNorm(DIM)),
    "a norm of another class": lambda block: put(
        block.mixer, out_norm=type("Own", (ScanNorm,), {"forward": forward})(DIM)
    ),
    "another mixer": lambda block: put(block, mixer=GatedSS2D(DIM)),
    "a mixer with a scan of its own": lambda block: put(block, mixer=type("Own", (SS2D,), {"scan": SS2D.scan})(DIM)),
    "another activation": lambda block: put(block.mlp, act=nn.SiLU()),
    "dropout": lambda block: put(block.mlp, drop1=nn.Dropout(0.1)),
    "a bias more": lambda block: put(block.mixer, in_proj=nn.Linear(DIM, DIM)),
    "a wider kernel": lambda block: put(
        block.mixer, conv=type(block.mixer.conv)(DIM, 5, bias=False, activation="silu")
    ),
    "no activation": lambda block: put(block.mixer.conv, activation=None),
    "a frozen weight": lambda block: block.mixer.out_proj.requires_grad_(False),
    "one of 16 bits": lambda block: block.mlp.fc1.bfloat16(),
    "weights in another order": lambda block: put(
        block.mlp.fc2.weight, data=block.mlp.fc2.weight.data.t().contiguous().t()
    ),
    "features that are no packs": lambda block: put(block, mlp=Mlp(DIM, 20)),
    "a weight made of others": lambda block: nn.utils.parametrizations.weight_norm(block.mlp.fc1),
}


def forward(norm, y, dtype):
    return ScanNorm.forward(norm, y, dtype)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_is_watched_is_called(kernel, layer):
    block, x, seen = make_block(drop_path=0.5).eval(), make_map(), []
    LAYERS[layer](block).register_forward_hook(lambda *_: seen.append(layer))
    call(block, x)
    assert seen and not kernel.calls


@pytest.mark.parametrize("change", OTHERS)
def test_other_blocks_run_by_their_layers(kernel, change):
    block, x = make_block(), make_map()
    OTHERS[change](block)
    call(block, x)
    assert not kernel.calls


def test_without_a_gradient_nothing_is_kept(kernel):
    block, x = make_block().requires_grad_(False), make_map()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            total, out = call(block, x)
        assert torch.equal(total, 2 * x) and not total.requires_grad and not out.requires_grad
    assert len(kernel.calls) == 2


def test_who_lists_operators_sees_those_of_the_layers(kernel):
    block, x = make_block(), make_map()
    with FlopCounterMode(display=False) as counter:
        call(block, x)
    with record_scans() as scans:
        call(block, x)
    assert counter.get_total_flops() > 0 and len(scans) == 1
    assert not kernel.calls


def test_other_dtypes_run_by_the_layers(kernel):
    block, x = make_block(), make_map()
    block.branches(x)
    call(block, x.bfloat16(), x)  # a branch that is wider than the stream
    assert not kernel.calls


def test_stochastic_depth_of_another_kind(kernel):
    class Halves(DropPath):
        def forward(self, x):
            return x / 2

    block, x = make_block(), make_map()
    block.drop_path = Halves()
    call(block, x)
    assert not kernel.calls and isinstance(block.norm1, BranchNorm)
