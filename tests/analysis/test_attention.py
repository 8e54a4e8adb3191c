"""The attention matrix, times the input, is the scan."""

import pytest
import timm
import torch

import vmamba.models  # noqa: F401
from vmamba.analysis.attention import fused_scan_attention, grid_attention, scan_attention
from vmamba.analysis.scans import model_scans
from vmamba.ops import ScanCall, selective_scan_reference

FLOATING = ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias")
FAMILIES = (
    "test_vmamba",
    "test_vanilla_vmamba",
    "test_vim",
    "test_plainmamba",
    "test_efficientvmamba",
    "test_msvmamba",
    "test_msvmambav3",
)


def by_the_reference(call, result="merged"):
    """The recorded call again, in float64."""
    doubles = {name: x if (x := getattr(call, name)) is None else x.double() for name in FLOATING}
    tables = {name: getattr(call, name) for name in ("route", "param_route", "reset")}
    return selective_scan_reference(
        **doubles, **tables, dt_softplus=call.dt_softplus, result=result, out_dtype=torch.float64
    )


def by_attention(call, image):
    """M u + D u at every position: (L, D)."""
    length, channels = call.u.shape[-2:]
    route = call.route[image] if call.route.dim() == 3 else call.route
    u = call.u[image].double().expand(len(route), length, channels)
    rows = []
    for position in range(length):
        row = torch.einsum("kdl,kld->d", scan_attention(call, position, image), u)
        if call.D is not None:
            visits = (route == position).sum(-1, keepdim=True)
            row = row + (visits * call.D.double() * u[:, position]).sum(0)
        rows.append(row)
    return torch.stack(rows)


def scans_of(name):
    """Of weights at random; the first map is 3 x 5."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    return model_scans(model, torch.randn(1, 3, 12, 20))


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_times_input_is_the_output(name):
    for scan in scans_of(name)[:2]:  # MSVMamba's blocks scan twice
        expected = by_the_reference(scan.call)[0]
        torch.testing.assert_close(by_attention(scan.call, 0), expected, rtol=1e-9, atol=1e-11)


def test_attention_of_states_fused_in_the_plane():
    scan = scans_of("test_spatialmamba")[0]
    torch.nn.init.normal_(scan.fusion.fusion.kernels)
    torch.nn.init.normal_(scan.fusion.fusion.alpha)
    states = by_the_reference(scan.call, "states").flatten(1, 2).squeeze(-1)
    fused = scan.fusion.fusion(states.unflatten(1, (scan.height, scan.width))).flatten(1, 2)
    with torch.no_grad():
        _, _, C = scan.fusion.project(scan.call.u)
    expected = (C.squeeze(-1).double() * fused)[0]
    length = scan.height * scan.width
    rows = [fused_scan_attention(scan, position)[0] * scan.call.u[0].double().t() for position in range(length)]
    torch.testing.assert_close(torch.stack(rows).sum(-1), expected, rtol=1e-9, atol=1e-11)


def test_the_fused_attention_is_that_of_the_module_itself():
    """In the module's own float32, skip included, against what its forward returns."""
    scan = scans_of("test_spatialmamba")[-1]
    u = scan.call.u.unflatten(1, (scan.height, scan.width))
    with torch.no_grad():
        expected = scan.fusion(u)[0].flatten(0, 1).double()
    attended = torch.stack(
        [(fused_scan_attention(scan, p)[0] * scan.call.u[0].double().t()).sum(-1) for p in range(len(expected))]
    )
    with torch.no_grad():
        attended += scan.fusion.D.double() * scan.call.u[0].double()
    torch.testing.assert_close(attended, expected, rtol=1e-4, atol=1e-5)


def _hard_call(images=2, length=5, channels=3, states=2):
    """Everything the families leave out: full dt, no softplus, resets, pauses, revisits, a route for each image."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    route = torch.tensor([[[0, -1, 2, 0, 4, 2], [3, 3, 1, -1, 0, 3]], [[1, 2, 2, -1, 1, 0], [4, -1, 4, 0, 1, 2]]])
    reset = torch.zeros(images, 2, 6, dtype=torch.bool)
    reset[0, 0, 2] = reset[1, 1, 3] = reset[1, 0, 0] = True
    return ScanCall(
        u=draw(images, 2, length, channels), dt=draw(images, length, 2, channels).abs(),
        A=-draw(2, channels, states).abs(), B=draw(images, length, 1, states), C=draw(images, length, 2, states),
        D=draw(1, channels),
        dt_weight=None, dt_bias=None, route=route.int(), param_route=route.flip(-1).int(), reset=reset,
        dt_softplus=False, result="merged",
    )  # fmt: skip


@pytest.mark.parametrize("image", [0, 1])
def test_attention_with_resets_pauses_and_a_route_per_image(image):
    call = _hard_call()
    torch.testing.assert_close(by_attention(call, image), by_the_reference(call)[image], rtol=1e-10, atol=1e-12)


def test_a_long_scan_neither_overflows_nor_vanishes_before_its_time():
    """Cumulative decays of e-700 and below: quotients of them would be 0 / 0."""
    length = 400
    call = ScanCall(
        u=torch.randn(1, length, 2), dt=torch.full((1, length, 1, 2), 2.0), A=-torch.ones(1, 2, 1),
        B=torch.ones(1, length, 1, 1), C=torch.ones(1, length, 1, 1), D=None, dt_weight=None, dt_bias=None,
        route=torch.arange(length, dtype=torch.int32).unsqueeze(0), param_route=None, reset=None,
        dt_softplus=False, result="merged",
    )  # fmt: skip
    row = scan_attention(call, length - 1)[0, 0]
    steps_back = torch.arange(length - 1, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(row, 2 * torch.exp(-2 * steps_back), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["test_vmamba", "test_vim", "test_msvmamba", "test_spatialmamba"])
def test_on_the_grid_the_query_lies_at_its_place(name):
    for scan in scans_of(name)[:2]:
        attention = grid_attention(scan, (0.99, 0.0))
        assert attention.query == (scan.height - 1, 0)
        assert attention.weights.shape[-2:] == (scan.height, scan.width)
        assert attention.merged_strength.shape == (scan.height, scan.width)
        # The scan by rows sees everything but what comes after it in its own, last row.
        if scan.fusion is None and scan.call.route.shape[1] <= scan.height * scan.width + 1:
            by_rows = attention.strength[0]
            assert (by_rows[:-1] > 0).all() and by_rows[-1, 0] > 0
            assert (by_rows[-1, 1:] == 0).all()


def test_only_directions_that_visit_a_place_are_shown():
    scan = scans_of("test_efficientvmamba")[0]
    assert grid_attention(scan, (0.0, 0.0)).directions == [0]
    one_row_down = 1.5 / scan.height
    assert grid_attention(scan, (one_row_down, 0.0)).directions == [1]


def test_the_class_token_looks_and_is_looked_at():
    scan = scans_of("test_vim")[0]
    attention = grid_attention(scan, "class")
    assert attention.query is None
    assert attention.class_token.abs().sum() > 0
    forwards = attention.strength[0].flatten()
    assert (forwards[: scan.class_token] > 0).all()
    assert (forwards[scan.class_token :] == 0).all()
    with pytest.raises(ValueError, match="no token 'class'"):
        grid_attention(scans_of("test_vmamba")[0], "class")
    with pytest.raises(ValueError, match="two shares"):
        grid_attention(scan, (0.5, 1.0))
