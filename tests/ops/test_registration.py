"""What registration promises: opcheck, torch.compile, export, autocast, FLOPs, meta tensors."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.scan_cases import Case, named, relative_error
from tests.ops.test_selective_scan import as_dtype
from vmamba.ops import get_route, selective_scan

CHECKED = ["plain", "vanilla_stage", "full_dt_shared", "everything_at_once", "steps", "states"]


def arguments(case: Case, *, requires_grad: bool, checkpoint_steps: int) -> tuple:
    """The positional arguments of the raw operators."""
    inputs = {key: x.requires_grad_(requires_grad) for key, x in as_dtype(case, torch.float32).items()}
    tables = case.tables()
    names = ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias")
    return (
        *(inputs.get(name) for name in names),
        *(tables.get(name) for name in ("route", "param_route", "reset")),
        case.softplus,
        case.result,
        torch.float32,
        checkpoint_steps,
    )


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name):
    case = named(name)
    torch.library.opcheck(torch.ops.vmamba.selective_scan, arguments(case, requires_grad=True, checkpoint_steps=64))
    torch.library.opcheck(
        torch.ops.vmamba.selective_scan_forward, arguments(case, requires_grad=False, checkpoint_steps=0)
    )


def test_opcheck_of_the_backward():
    args = arguments(named("plain"), requires_grad=False, checkpoint_steps=64)
    out, checkpoints = torch.ops.vmamba.selective_scan_forward(*args)
    torch.library.opcheck(
        torch.ops.vmamba.selective_scan_backward,
        (torch.randn_like(out), checkpoints, *args[:13], 64),
    )


def block(u, x, A, D, dt_weight, dt_bias, height: int, width: int):
    """What a model does around the scan."""
    rank, states = dt_weight.shape[-1], A.shape[-1]
    dt, B, C = x.split([rank, states, states], dim=-1)
    route = get_route("cross", height, width, u.device)
    return selective_scan(u, dt, A, B, C, D, dt_weight=dt_weight, dt_bias=dt_bias, route=route)


def block_inputs(height: int, width: int, batch: int = 2, D: int = 6, K: int = 4, R: int = 3, N: int = 1):
    L = height * width
    torch.manual_seed(0)
    return [
        torch.randn(batch, L, D), torch.randn(batch, L, K, R + 2 * N), -torch.rand(K, D, N), torch.randn(K, D),
        torch.randn(K, D, R), torch.randn(K, D),
    ]  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_to_one_graph(backend, grad):
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for height, width in [(3, 4), (5, 3), (7, 6)]:  # the second size turns dynamic
        inputs = [x.requires_grad_(grad) for x in block_inputs(height, width)]
        want, got = block(*inputs, height, width), compiled(*inputs, height, width)
        assert relative_error(got, want) < 1e-6
        if grad:
            wanted = torch.autograd.grad(want.square().sum(), inputs)
            found = torch.autograd.grad(got.square().sum(), inputs)
            assert all(relative_error(g, w) < 1e-5 for g, w in zip(found, wanted, strict=True))


def test_exports_with_dynamic_batch_and_size():
    class Block(torch.nn.Module):
        def forward(self, image, x, A, D, dt_weight, dt_bias):
            height, width = image.shape[1:3]
            return block(image.flatten(1, 2), x.flatten(1, 2), A, D, dt_weight, dt_bias, height, width)

    def inputs(height, width, batch):
        u, x, *params = block_inputs(height, width, batch)
        return (u.unflatten(1, (height, width)), x.unflatten(1, (height, width)), *params)

    batch, height, width = (torch.export.Dim(name, min=2, max=4096) for name in ("batch", "height", "width"))
    on_map = {0: batch, 1: height, 2: width}
    with torch.no_grad():
        exported = torch.export.export(
            Block(), inputs(4, 5, 2), dynamic_shapes=[on_map, on_map, None, None, None, None]
        ).module()
        for size in [(4, 5, 2), (6, 3, 3), (9, 7, 5)]:
            assert relative_error(exported(*inputs(*size)), Block()(*inputs(*size))) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_activations_and_leaves_parameters(dtype):
    case = named("vmamba_stage")
    inputs = as_dtype(case, torch.float32)
    mixed = {**inputs, "dt": inputs["dt"].to(dtype), "B": inputs["B"].to(dtype)}
    leaves = {key: x.requires_grad_() for key, x in mixed.items()}
    with torch.autocast("cpu", dtype=dtype):
        got = case.run(leaves)
        with torch.no_grad():
            assert torch.equal(case.run(leaves), got)
    rounded = {key: x.detach() for key, x in as_dtype(case, dtype).items()}
    assert torch.equal(got, case.run(rounded))
    got.sum().backward()
    assert all(x.grad.dtype == x.dtype for x in leaves.values())


def test_flops_of_the_recurrence():
    """9 B L D N + B L D over all directions, as papers count, and 2 R per element for the low-rank step."""
    inputs = block_inputs(4, 5, batch=3, D=6, K=4, R=3, N=2)
    elements = 3 * 20 * 4 * 6
    forward = elements * (9 * 2 + 1 + 2 * 3)
    with FlopCounterMode(display=False) as counter:
        block(*inputs, 4, 5)
    assert counter.get_total_flops() == forward
    leaves = [x.requires_grad_() for x in inputs]
    with FlopCounterMode(display=False) as counter:
        block(*leaves, 4, 5).sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_runs_on_meta_tensors():
    inputs = [x.to("meta") for x in block_inputs(4, 5)]
    out = block(*inputs, 4, 5)
    assert out.device.type == "meta" and out.shape == (2, 20, 6)


def test_survives_activation_checkpointing():
    inputs = [x.requires_grad_() for x in block_inputs(4, 5)]
    plain = torch.autograd.grad(block(*inputs, 4, 5).square().sum(), inputs)
    out = torch.utils.checkpoint.checkpoint(block, *inputs, 4, 5, use_reentrant=False)
    again = torch.autograd.grad(out.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_there_is_no_second_derivative():
    inputs = [x.requires_grad_() for x in block_inputs(4, 5)]
    (first,) = torch.autograd.grad(block(*inputs, 4, 5).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        first.sum().backward()
    case = arguments(named("plain"), requires_grad=True, checkpoint_steps=64)
    (first,) = torch.autograd.grad(
        torch.ops.vmamba.selective_scan(*case)[0].square().sum(), case[:1], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="differentiable once"):
        first.sum().backward()
