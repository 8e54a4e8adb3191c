"""A block as one operator, in training one node of autograd's graph, against its layers called one by one."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.ops.scan_cases import relative_error
from vmamba.layers import SS2D, Mlp, PreNormBlock, run_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of gradients that the layers round to 16 bits
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def make_blocks(dim=96, count=2, drop_path=0.0, **mixer):
    torch.manual_seed(0)
    with torch.device("cuda"):
        blocks = nn.ModuleList(
            PreNormBlock(dim, SS2D(dim, **mixer), Mlp(dim, 2 * dim), drop_path=drop_path) for _ in range(count)
        )
        for parameter in blocks.parameters():
            if parameter.dim() == 1:  # or all norms and biases were alike
                nn.init.normal_(parameter, std=0.5)
    return blocks


def make_map(dim=96, batch=3, height=15, width=12):
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn(batch, height, width, dim, device="cuda", generator=generator).requires_grad_()


def by_layers(blocks):
    """The same blocks, each with a hook on a layer, which has to be called then."""
    for block in blocks:
        block.mixer.out_norm.register_forward_hook(lambda *_: None)
    return blocks


def is_one_node(y):
    """Whether the last block was one: its sum is of two results of the same node."""
    (node, _), (other, _) = y.grad_fn.next_functions
    return node is other and node.name() == "_BlockBackward"


def results(blocks, x, dtype=torch.bfloat16, run=run_blocks):
    torch.manual_seed(2)  # for the branches that are dropped
    with torch.autocast("cuda", dtype):
        y = run(blocks, x)
    weights = torch.linspace(-1, 1, y.numel(), device="cuda").view(y.shape).to(y.dtype)
    return y, torch.autograd.grad(y, (x, *blocks.parameters()), weights)


def assert_agree(blocks, x, dtype):
    found, gradients = results(blocks, x, dtype)
    again, twice = results(blocks, x, dtype)
    assert is_one_node(found)
    expected, wanted = results(by_layers(blocks), x, dtype)
    assert not is_one_node(expected)
    assert torch.equal(found, again) and all(torch.equal(a, b) for a, b in zip(gradients, twice, strict=True))
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    for got, want in zip(gradients, wanted, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert relative_error(got, want) < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize(
    ("dim", "mixer"),
    [(96, {}), (64, {"ssm_ratio": 2.0}), (128, {"d_state": 3}), (384, {}), (768, {"ssm_ratio": 0.5})],
    ids=str,
)
def test_it_is_the_layers(dim, mixer, drop_path, dtype):
    assert_agree(make_blocks(dim, drop_path=drop_path, **mixer).train(), make_map(dim), dtype)


@dtypes
@pytest.mark.parametrize("dim", [64, 96])
def test_with_the_fused_mlp(dim, dtype):
    assert_agree(make_blocks(dim), make_map(dim, batch=6, height=56, width=56), dtype)


@dtypes
def test_maps_of_16_bits_and_of_any_layout(dtype):
    blocks = make_blocks(count=3)
    with torch.no_grad():
        x = make_map().to(dtype)
    assert_agree(blocks, x.requires_grad_(), dtype)
    blocks = make_blocks()
    transposed = make_map().detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert not transposed.is_contiguous()
    assert_agree(blocks, transposed, dtype)


def test_one_of_the_results_may_be_all_that_is_used():
    (block,) = make_blocks(count=1)
    x, branch = make_map(), make_map().detach().bfloat16().requires_grad_()
    for used in (0, 1):
        gradients = []
        for layer in (block, *by_layers([block])):
            with torch.autocast("cuda", torch.bfloat16):
                y = layer.branches(x, branch)[used]
            gradients.append(torch.autograd.grad(y.float().square().sum(), (x, branch, block.mixer.in_proj.weight)))
            block.mixer.out_norm._forward_hooks.clear()
        assert all(relative_error(got, want) < 1e-2 for got, want in zip(*gradients, strict=True))


@dtypes
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dim", [192, 384])
def test_inference(dim, mode, dtype):
    blocks, x = make_blocks(dim), make_map(dim, batch=8, height=40, width=40)

    def run():
        torch.cuda.reset_peak_memory_stats()
        with mode(), torch.autocast("cuda", dtype):
            return run_blocks(blocks, x), torch.cuda.max_memory_allocated()

    found, peak = run()
    by_layers(blocks)
    expected, peak_of_layers = run()
    assert torch.equal(found, expected)
    assert peak <= peak_of_layers


def test_recomputed_and_offloaded():
    blocks, x = make_blocks(), make_map()
    _, wanted = results(blocks, x)

    _, recomputed = results(blocks, x, run=partial(checkpoint, run_blocks, use_reentrant=False))
    with torch.autograd.graph.save_on_cpu():
        _, offloaded = results(blocks, x)
    for gradients in (recomputed, offloaded):
        assert all(torch.equal(got, want) for got, want in zip(gradients, wanted, strict=True))


def test_as_a_cuda_graph():
    blocks, x = make_blocks(), make_map()
    expected, wanted = results(blocks, x)
    expected = expected.detach()  # or the parameters' nodes outlive it, with the stream of this one
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(blocks, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, gradients = results(blocks, x)
    for kept in (found, *gradients):
        kept.data.zero_()
    graph.replay()
    assert torch.equal(found, expected)
    assert all(torch.equal(got, want) for got, want in zip(gradients, wanted, strict=True))


def test_what_it_refuses():
    (block,) = make_blocks(count=1)
    x = make_map()
    with torch.autocast("cuda", torch.bfloat16):
        stream, branch = block.branches(x)
        y = block(x)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()
    stream.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        branch.float().sum().backward()
