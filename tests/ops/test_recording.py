import torch

from vmamba.ops import get_route, record_scans, selective_scan


def _call():
    u, dt, B, C = (torch.randn(2, 6, *shape) for shape in [(3,), (2, 3), (2, 4), (2, 4)])
    A = -torch.rand(2, 3, 4)
    route = get_route("bidirectional", 2, 3)
    return selective_scan(u, dt, A, B, C, route=route), (u, dt, A, B, C, route)


def test_a_record_holds_what_the_scan_was_given():
    with record_scans() as calls:
        _, (u, dt, A, B, C, route) = _call()
    (call,) = calls
    for recorded, given in zip((call.u, call.dt, call.A, call.B, call.C), (u, dt, A, B, C), strict=True):
        assert recorded.data_ptr() == given.data_ptr()
    assert call.route is route or torch.equal(call.route, route)
    assert call.D is None and call.dt_softplus and call.result == "merged"


def test_the_default_route_is_recorded_as_the_table_it_means():
    with record_scans() as calls:
        selective_scan(torch.randn(1, 5, 3), torch.randn(1, 5, 1, 3), -torch.rand(1, 3, 1), torch.randn(1, 5, 1, 1),
                       torch.randn(1, 5, 1, 1))  # fmt: skip
    assert calls[0].route.tolist() == [[0, 1, 2, 3, 4]]


def test_records_nest_and_end():
    with record_scans() as outer:
        with record_scans() as inner:
            _call()
        _call()
    _call()
    assert len(outer) == 2
    assert len(inner) == 1


def test_a_record_ends_with_an_error_too():
    try:
        with record_scans() as calls:
            raise KeyError
    except KeyError:
        _call()
    assert calls == []


def test_recording_changes_no_result_and_keeps_no_graph():
    u = torch.randn(1, 6, 3, requires_grad=True)
    arguments = (torch.randn(1, 6, 1, 3), -torch.rand(1, 3, 1), torch.randn(1, 6, 1, 1), torch.randn(1, 6, 1, 1))
    plain = selective_scan(u, *arguments)
    with record_scans() as calls:
        recorded = selective_scan(u, *arguments)
    assert torch.equal(plain, recorded)
    assert recorded.requires_grad
    assert not calls[0].u.requires_grad


def test_a_compiled_model_stays_whole_while_a_record_is_open():
    torch._dynamo.reset()
    compiled = torch.compile(_call, fullgraph=True, backend="eager")
    with record_scans() as calls:
        compiled()
    assert calls == []
