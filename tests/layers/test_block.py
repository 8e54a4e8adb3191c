"""Blocks in a row: deferring their last additions changes neither what they compute nor what others see of them."""

import copy
import pickle
from functools import partial

import pytest
import torch
from timm.layers import create_feature_extractor
from torch import nn
from torch.export import export, unflatten
from torch.nn.modules.module import register_module_forward_hook

from vmamba.layers import BlockSequence, BranchNorm, DepthwiseConv2d, Mlp, PositionalBlock, PreNormBlock, run_blocks
from vmamba.models._hierarchical import Stage
from vmamba.ops import add_layer_norm

DIM = 8


def make_block(mlp=True, drop_path=0.0, cls=PreNormBlock):
    """A block whose norms differ from those of other blocks."""
    block = cls(DIM, DepthwiseConv2d(DIM), mlp=Mlp(DIM, 2 * DIM) if mlp else None, drop_path=drop_path)
    for norm in [block.norm1, block.norm2] if mlp else [block.norm1]:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return block


def make_blocks(count=3, **kwargs):
    torch.manual_seed(0)
    return BlockSequence(*(make_block(**kwargs) for _ in range(count)))


def make_map(dtype=torch.float32):
    values = torch.randn(4, 5, 3, DIM, generator=torch.Generator().manual_seed(1))
    return values.to(dtype).requires_grad_()


def one_by_one(blocks, x):
    """PreNormBlocks by the book."""
    for block in blocks:
        x = x + block.drop_path(block.mixer(block.norm1(x)))
        if block.mlp is not None:
            x = x + block.drop_path(block.mlp(block.norm2(x)))
    return x


@pytest.fixture
def additions(monkeypatch):
    """Grows with every addition that a norm makes."""
    made = []

    def add(*args):
        made.append("addition")
        return add_layer_norm(*args)

    monkeypatch.setattr("vmamba.layers.norm.add_layer_norm", add)
    return made


@pytest.fixture
def called(monkeypatch):
    """Grows by the block with every call of a PreNormBlock."""
    blocks, forward = [], PreNormBlock.forward

    def note(block, x):
        blocks.append(block)
        return forward(block, x)

    monkeypatch.setattr(PreNormBlock, "forward", note)
    return blocks


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("mlp", [True, False])
def test_a_row_is_its_blocks_one_by_one(mlp, precision, drop_path, additions):
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    blocks = make_blocks(mlp=mlp, drop_path=drop_path).to(dtype).train()
    results = []
    for run in (blocks, partial(one_by_one, blocks)):
        x = make_map(dtype)
        torch.manual_seed(2)  # for the branches that are dropped
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            y = run(x)
        results.append((y, torch.autograd.grad(y.float().square().sum(), (x, *blocks.parameters()))))
    (found, gradients), (expected, wanted) = results
    assert len(additions) == (5 if mlp else 2)  # all but the last one
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("mlp", [True, False])
def test_a_block_alone(mlp):
    blocks, x = make_blocks(1, mlp=mlp), make_map()
    expected = one_by_one(blocks, x)
    assert torch.equal(blocks[0](x), expected)
    assert torch.equal(run_blocks(blocks, x), expected)
    torch.testing.assert_close(sum(blocks[0].branches(x / 4, 3 * x / 4)), expected)


def test_a_sequence_is_a_sequential():
    blocks, x = make_blocks(), make_map()
    assert blocks.state_dict().keys() == nn.Sequential(*blocks).state_dict().keys()
    for copied in (copy.deepcopy(blocks), pickle.loads(pickle.dumps(blocks))):
        assert torch.equal(copied(x), blocks(x))
    assert isinstance(blocks[1:], BlockSequence)
    assert torch.equal(blocks[1:](blocks[:1](x)), blocks(x))


# ---------------------------------------------------------------------------------------------------------------------
# Who watches a block sees it called
# ---------------------------------------------------------------------------------------------------------------------


def test_hooks_see_what_a_block_takes_and_returns():
    blocks, x = make_blocks(4), make_map()
    seen = []
    blocks[1].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    blocks[2].register_forward_hook(lambda block, inputs, output: seen.append(output))
    blocks[3].register_full_backward_hook(lambda block, gradients, _: seen.append(gradients[0]))

    y = blocks(x)
    y.square().sum().backward()

    first = one_by_one(blocks[:1], x)
    third = one_by_one(blocks[1:3], first)
    last = one_by_one(blocks[3:], third)
    assert all(torch.equal(a, b) for a, b in zip((*seen[:2], y), (first, third, last), strict=True))
    torch.testing.assert_close(seen[2], torch.autograd.grad(last.square().sum(), third)[0])


def nothing(*args):
    """A hook that does nothing."""


WATCHERS = {
    "forward pre-hook": lambda block: block.register_forward_pre_hook(nothing),
    "forward hook": lambda block: block.register_forward_hook(nothing),
    "backward pre-hook": lambda block: block.register_full_backward_pre_hook(nothing),
    "backward hook": lambda block: block.register_full_backward_hook(nothing),
    "forward put over its own": lambda block: setattr(block, "forward", block.forward),
    "compiled call": lambda block: block.compile(backend="eager"),
    "hook on its norm": lambda block: block.norm1.register_forward_hook(nothing),
    "another norm": lambda block: setattr(block, "norm1", nn.LayerNorm(DIM)),
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_watched_block_is_called(watcher, called):
    torch.compiler.reset()
    blocks, x = make_blocks(), make_map()
    WATCHERS[watcher](blocks[1])
    assert torch.equal(blocks(x), one_by_one(blocks, x))
    assert called == [blocks[1]]


def test_a_norm_of_a_subclass_norms_in_its_way(called):
    class Doubled(BranchNorm):
        def _norm(self, x, dtype):
            return 2 * super()._norm(x, dtype)

    blocks, x = make_blocks(), make_map()
    blocks[1].norm1 = Doubled(DIM)
    assert torch.equal(blocks(x), one_by_one(blocks, x))
    assert called == [blocks[1]]


def test_all_blocks_are_called_under_a_global_hook(called):
    blocks = make_blocks()
    with register_module_forward_hook(nothing):
        blocks(make_map())
    assert called == [*blocks]


def test_a_block_with_a_forward_of_its_own_is_called():
    blocks, x = make_blocks(), make_map()
    positional = make_block(cls=PositionalBlock)
    expected = one_by_one(blocks[2:], positional(one_by_one(blocks[:2], x)))
    blocks.insert(2, positional)
    assert torch.equal(blocks(x), expected)


# ---------------------------------------------------------------------------------------------------------------------
# In a stage
# ---------------------------------------------------------------------------------------------------------------------


def test_a_checkpointed_stage_agrees(additions):
    stage = Stage(DIM, make_blocks(drop_path=0.5)).train()
    results, made = [], []
    for stage.grad_checkpointing in (False, True):
        x = make_map()
        torch.manual_seed(2)
        additions.clear()
        y = stage(x)
        made.append(len(additions))
        results.append((y, torch.autograd.grad(y.square().sum(), (x, *stage.parameters()))))
    assert made == [5, 3]  # each block is called to be checkpointed
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("mlp", [True, False])
def test_a_stage_compiles_into_one_graph(mlp, additions):
    torch.compiler.reset()
    stage, x = Stage(DIM, make_blocks(mlp=mlp)), make_map()
    y = torch.compile(stage, fullgraph=True, backend="eager")(x)
    assert len(additions) == (5 if mlp else 2)
    expected = one_by_one(stage.blocks, x)
    assert torch.equal(y, expected)
    found, wanted = (torch.autograd.grad(z.square().sum(), (x, *stage.parameters())) for z in (y, expected))
    torch.testing.assert_close(found, wanted)


def test_a_graph_of_fx_knows_the_blocks():
    stage, x = Stage(DIM, make_blocks()).eval(), make_map()
    features = create_feature_extractor(stage, ["blocks.0", "blocks.1"])(x)
    for name, count in (("blocks.0", 1), ("blocks.1", 2)):
        assert torch.equal(features[name], one_by_one(stage.blocks[:count], x))


@torch.no_grad()
def test_a_trace_knows_the_blocks():
    stage, x = Stage(DIM, make_blocks()).eval(), make_map()
    traced = torch.jit.trace(stage, x)
    assert torch.equal(traced(x + 1), one_by_one(stage.blocks, x + 1))
    assert "norm1" not in traced.blocks.code  # it calls blocks, not their parts


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_stage_agrees(strict):
    stage, x = Stage(DIM, make_blocks()).eval(), make_map()
    program = export(stage, (x,), strict=strict)
    names = {name for node in program.graph.nodes for name, _ in node.meta.get("nn_module_stack", {}).values()}
    assert strict or "blocks.1" in names
    for exported in (program.module(), unflatten(program)):
        assert torch.equal(exported(x), one_by_one(stage.blocks, x))
