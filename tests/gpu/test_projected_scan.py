"""The joint operator of a projection and a scan on a GPU, against the two apart."""

import pytest
import torch

from tests.ops.scan_cases import relative_error
from vmamba.layers import SelectiveSSM
from vmamba.ops import get_route

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

KINDS = [
    (4, 1, 96, "merged"),
    (4, 1, 384, "merged"),
    (4, 16, 64, "merged"),
    (2, 3, 40, "steps"),
    (1, 20, 33, "merged"),
    (1, 2, 64, "steps"),  # ten features, which in 16 bits are aligned
]
kinds = pytest.mark.parametrize(("directions", "states", "dim", "result"), KINDS)


def make(directions, states, dim, batch=3, height=17, width=14):
    torch.manual_seed(0)
    ssm = SelectiveSSM(dim, 6, states, directions, device="cuda")
    torch.nn.init.normal_(ssm.dt_weight)
    u = torch.randn(batch, height * width, dim, device="cuda", requires_grad=True)
    return ssm, u, get_route("cross", height, width, u.device)[:directions]


def results(ssm, u, route, result, autocast):
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        y = ssm(u, route, result)
    torch.manual_seed(1)
    return y, *torch.autograd.grad(y, [u, *ssm.parameters()], torch.randn_like(y))


def apart(ssm):
    """The same with a hook on the projection, which is then called."""
    ssm.x_proj.register_forward_hook(lambda *_: None)
    return ssm


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_parts_are_parts_of_a_gradient(directions, states, dim, result, dtype):
    ssm, u, route = make(directions, states, dim)
    with torch.no_grad():
        u = u.to(dtype)
        rest = (-ssm.A_log.exp(), ssm.D, ssm.dt_weight, ssm.dt_bias, route, result)
        every = 16 if states == 1 else 64
        y, checkpoints, params = torch.ops.vmamba.projected_scan(
            u, ssm.x_proj.weight.to(dtype), *rest, torch.float32, every
        )
        du, dparams, *others = torch.ops.vmamba.selective_scan_rows_backward(y, checkpoints, u, params, *rest, every)
        A, *shared, route, result = rest
        dt, B, C = params.split([6, states, states], -1)
        wanted = torch.ops.vmamba.selective_scan_backward(
            y, checkpoints, u, dt, A, B, C, *shared, route, None, None, True, result, every
        )
    assert torch.equal(dparams, torch.cat([wanted[1], wanted[3], wanted[4]], -1))
    found = (du, *others)
    assert all(torch.equal(a, b) for a, b in zip(found, (wanted[i] for i in (0, 2, 5, 6, 7)), strict=True))


@kinds
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_agrees_with_the_two_apart(directions, states, dim, result, autocast, compiled):
    torch.compiler.reset()
    ssm, u, route = make(directions, states, dim)
    function = torch.compile(ssm, fullgraph=True) if compiled else ssm
    found = results(function, u, route, result, autocast)
    assert compiled or "projected_scan" in found[0].grad_fn.name()
    wanted = results(apart(ssm), u, route, result, autocast)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype and relative_error(got, want) < (1e-5 if autocast is None else 1e-2)


def test_twice_the_same():
    ssm, u, route = make(*KINDS[0][:3])
    first, second = (results(ssm, u, route, "merged", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_it_refuses():
    ssm, u, route = make(*KINDS[0][:3])
    with torch.no_grad():
        rest = (-ssm.A_log.exp(), ssm.D, ssm.dt_weight, ssm.dt_bias, route, "merged")
        y, checkpoints, params = torch.ops.vmamba.projected_scan(u, ssm.x_proj.weight, *rest, torch.float32, 16)
        with pytest.raises(RuntimeError, match=r"params must be \(batch, L, K, 8\)"):
            torch.ops.vmamba.selective_scan_rows_backward(y, checkpoints, u, params[..., :7], *rest, 16)
        with pytest.raises(RuntimeError, match="params must be"):
            torch.ops.vmamba.selective_scan_rows_backward(y, checkpoints, u, params[:, :, 0], *rest, 16)
