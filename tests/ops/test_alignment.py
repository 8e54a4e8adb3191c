"""Products with rows of zeros more, on a CPU: what a GPU does in 16 bits."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.standing_in import standing_in
from vmamba.layers import SelectiveSSM
from vmamba.models.vim import DirectionalSSM
from vmamba.ops import alignment, get_route
from vmamba.ops.alignment import aligned_linear, missing_rows

KINDS = [(1, 1, 4), (1, 1, 6), (4, 1, 3), (4, 3, 5), (1, 16, 12)]  # directions, states, rank
kinds = pytest.mark.parametrize(("directions", "states", "rank"), KINDS)


@pytest.fixture
def aligned(monkeypatch):
    """What is called to have products aligned from there on; it gives the number of rows that each of them got."""

    def begin():
        added = []

        def missing(x, rows):
            added.append(-rows % 8)
            return added[-1]

        monkeypatch.setattr(alignment, "missing_rows", missing)
        return added

    return begin


def make(directions, states, rank, dim=12, cls=SelectiveSSM):
    torch.manual_seed(0)
    ssm = cls(dim, rank, states, directions)
    torch.nn.init.normal_(ssm.dt_weight)
    u = torch.randn(2, 5 * 7, dim) if cls is SelectiveSSM else torch.randn(2, directions, 5 * 7, dim)
    return ssm, u.requires_grad_(), get_route("cross", 5, 7, u.device)[:directions]


def results(ssm, u, route, compiled=None):
    y = (ssm if compiled is None else compiled)(u, route)
    torch.manual_seed(1)
    return y, *torch.autograd.grad(y, [u, *ssm.parameters()], torch.randn_like(y))


def test_only_a_gpu_wants_it_and_only_in_16_bits():
    assert missing_rows(torch.ones(3, 4, dtype=torch.bfloat16), 6) == 0
    with FakeTensorMode():
        half, single = (torch.ones(3, 4, device="cuda:0", dtype=dtype) for dtype in (torch.float16, torch.float32))
        assert [missing_rows(half, rows) for rows in (6, 8, 9, 34)] == [2, 0, 7, 6]
        assert missing_rows(single, 6) == 0
        y = aligned_linear(half, torch.ones(6, 4, device="cuda:0", dtype=torch.float16))
    assert y.shape == (3, 6) and y.stride() == (8, 1)


@pytest.mark.parametrize("rows", [1, 6, 8, 34])
def test_a_product_is_the_same(rows, aligned):
    x, weight = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 5, 9), (rows, 9)))
    wanted = F.linear(x, weight)
    aligned()
    found = aligned_linear(x, weight)
    assert found.stride(1) % 8 == 0
    torch.testing.assert_close(found, wanted)
    grad = torch.randn_like(wanted)
    for got, want in zip(*(torch.autograd.grad(y, [x, weight], grad) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(got, want)


@kinds
@pytest.mark.parametrize("cls", [SelectiveSSM, DirectionalSSM])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_scan_is_the_same(directions, states, rank, cls, compiled, aligned):
    torch.compiler.reset()
    ssm, u, route = make(directions, states, rank, cls=cls)
    wanted = results(ssm, u, route)
    added = aligned()
    function = torch.compile(ssm, fullgraph=True, backend="aot_eager") if compiled else None
    torch.testing.assert_close(results(ssm, u, route, function), wanted, rtol=1e-5, atol=1e-5)
    assert set(added) == {-(directions if cls is SelectiveSSM else 1) * (rank + 2 * states) % 8}


@kinds
@pytest.mark.parametrize("compiled", [False, True])
def test_a_projected_scan_is_the_same(directions, states, rank, compiled, aligned):
    torch.compiler.reset()
    ssm, u, route = make(directions, states, rank)
    wanted = results(ssm, u, route)
    added = aligned()
    with standing_in("projected_scan"):
        function = torch.compile(ssm, fullgraph=True) if compiled else None
        found = results(ssm, u, route, function)
    assert compiled or "projected_scan" in found[0].grad_fn.name()
    assert len(added) > 1  # forward and backward
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@kinds
def test_a_projected_scan_is_as_registered(directions, states, rank, aligned):
    ssm, u, route = make(directions, states, rank)
    aligned()
    A = -ssm.A_log.exp().detach()
    inputs = (u, ssm.x_proj.weight, A, ssm.D, ssm.dt_weight, ssm.dt_bias, route, "merged", torch.float32, 64)
    torch.library.opcheck(torch.ops.vmamba.projected_scan, inputs)


def test_what_is_not_plain_is_called(aligned):
    ssm, u, route = make(*KINDS[1])
    added, shapes = aligned(), []
    ssm.x_proj.register_forward_hook(lambda module, inputs, y: shapes.append(y.shape))
    ssm(u, route)
    ssm.x_proj = torch.nn.Sequential(ssm.x_proj)
    ssm(u, route)
    ssm.x_proj = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(12, 8))
    ssm(u, route)
    assert shapes == [(2, 35, 8)] * 2 and not added
