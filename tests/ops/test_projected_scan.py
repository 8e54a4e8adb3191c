"""A projection and a scan as one: the operator, on a CPU, and when it takes their place."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.standing_in import standing_in
from vmamba.layers import SelectiveSSM
from vmamba.ops import get_route, record_scans
from vmamba.ops.projected_scan import projected_scan

KINDS = [(1, 1, "merged"), (4, 1, "merged"), (4, 3, "merged"), (2, 2, "steps")]


def make(directions=4, states=2, dim=12, batch=2):
    torch.manual_seed(0)
    ssm = SelectiveSSM(dim, 3, states, directions)
    torch.nn.init.normal_(ssm.dt_weight)
    u = torch.randn(batch, 5 * 7, dim, requires_grad=True)
    return ssm, u, get_route("cross", 5, 7, u.device)[:directions]


def results(ssm, u, route, result="merged"):
    y = ssm(u, route, result)
    torch.manual_seed(1)
    return y, *torch.autograd.grad(y, [u, *ssm.parameters()], torch.randn_like(y))


def is_joint(ssm, u, route, result="merged"):
    y = ssm(u, route, result)
    return "projected_scan" in (y if y._base is None else y._base).grad_fn.name()


@pytest.fixture
def joint():
    with standing_in("projected_scan"):
        yield


@pytest.mark.parametrize(("directions", "states", "result"), KINDS)
def test_gradients_are_those_of_the_two(directions, states, result):
    ssm, u, route = make(directions, states)
    wanted = results(ssm, u, route, result)
    with standing_in("projected_scan"):
        assert is_joint(ssm, u, route, result)
        found = results(ssm, u, route, result)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("joint")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_gradients_have_the_dtypes_of_the_parameters(dtype):
    ssm, u, route = make()
    wanted = results(ssm, u, route)
    with torch.autocast("cpu", dtype):
        found = results(ssm, u, route)
    assert all(x.dtype == torch.float32 for x in found)
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).norm() < 0.03 * want.norm()


@pytest.mark.usefixtures("joint")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend):
    torch.compiler.reset()
    ssm, u, route = make()
    wanted = results(ssm, u, route)
    y = torch.compile(ssm, fullgraph=True, backend=backend)(u, route)
    torch.manual_seed(1)
    found = y, *torch.autograd.grad(y, [u, *ssm.parameters()], torch.randn_like(y))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("joint")
def test_it_is_in_the_graph():
    torch.compiler.reset()
    ssm, u, route = make()
    seen = []

    def look(graph, inputs):
        seen.append(graph.code)
        return graph

    torch.compile(ssm, fullgraph=True, backend=look)(u, route)
    assert "torch.ops.vmamba.projected_scan" in seen[0]


@pytest.mark.parametrize(("directions", "states", "result"), KINDS)
def test_what_is_registered(directions, states, result):
    ssm, u, route = make(directions, states)
    A = -ssm.A_log.exp()
    inputs = (u, ssm.x_proj.weight, A, ssm.D, ssm.dt_weight, ssm.dt_bias, route, result, torch.float32, 64)
    torch.library.opcheck(torch.ops.vmamba.projected_scan, [x.detach() if x is A else x for x in inputs])
    with torch.no_grad():
        y, checkpoints, params = torch.ops.vmamba.projected_scan(*inputs)
        saved = (y, checkpoints, u.detach(), params)
        rest = (A, ssm.D.detach(), ssm.dt_weight.detach(), ssm.dt_bias.detach(), route, result, 64)
        torch.library.opcheck(torch.ops.vmamba.selective_scan_rows_backward, (*saved, *rest))
        torch.library.opcheck(torch.ops.vmamba.projected_scan_backward, (*saved, ssm.x_proj.weight.detach(), *rest))


@pytest.mark.usefixtures("joint")
def test_floating_point_operations_are_those_of_the_two():
    ssm, u, route = make()
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            ssm(u, route).sum().backward()
        counts.append(counter.get_total_flops())
        ssm.x_proj.register_forward_hook(lambda *_: None)  # from here on, apart
    assert counts[0] == counts[1] > 0


@pytest.mark.usefixtures("joint")
@pytest.mark.parametrize(
    "change",
    [
        lambda ssm: ssm.x_proj.register_forward_hook(lambda *_: None),
        lambda ssm: setattr(ssm.x_proj, "forward", ssm.x_proj.forward),
        lambda ssm: ssm.x_proj.weight.requires_grad_(False),
    ],
    ids=["hook", "forward", "frozen"],
)
def test_an_ssm_calls_what_is_not_plain(change):
    ssm, u, route = make()
    assert is_joint(ssm, u, route)
    change(ssm)
    assert not is_joint(ssm, u, route)


@pytest.mark.usefixtures("joint")
def test_not_where_nobody_asks_for_gradients_or_somebody_listens():
    ssm, u, route = make()
    with torch.no_grad():
        assert ssm(u, route).grad_fn is None
    with record_scans() as calls:
        assert not is_joint(ssm, u, route)
    assert len(calls) == 1 and not is_joint(ssm, u, route, "states")
    assert not is_joint(ssm, u, route.expand(2, -1, -1))


@pytest.mark.usefixtures("joint")
def test_wrong_routes_are_explained_as_ever():
    ssm, u, route = make()
    with pytest.raises(ValueError, match="A must be"):
        ssm(u, route[:3])
    with pytest.raises(TypeError, match=r"route must be torch\.int32"):
        ssm(u, route.long())


@pytest.mark.usefixtures("joint")
def test_there_is_no_second_derivative():
    ssm, u, route = make()
    inputs = (ssm.x_proj.weight, -ssm.A_log.exp(), ssm.D, ssm.dt_weight, ssm.dt_bias, route, "merged", torch.float32)
    registered = lambda: torch.ops.vmamba.projected_scan(u, *inputs, 64)[0]  # noqa: E731
    for function in (lambda: projected_scan(u, *inputs), registered):
        (gradient,) = torch.autograd.grad(function().square().sum(), u, create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiable once"):
            gradient.sum().backward()
