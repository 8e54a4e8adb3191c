"""The kernels against the reference in float64: the result and every gradient, in every case and dtype."""

import pytest
import torch

from tests.ops.scan_cases import ACTIVATIONS, CASES, PLAIN, Case, named, relative_error, results_and_gradients
from vmamba.ops import get_route, selective_scan, selective_scan_reference

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def as_dtype(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: x.to(dtype if key in ACTIVATIONS else torch.float32) for key, x in case.inputs().items()}


@by_name
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_agrees_with_the_float64_reference(case: Case, dtype: torch.dtype):
    rounded = as_dtype(case, dtype)
    want = results_and_gradients(
        case, {key: x.double() for key, x in rounded.items()}, backend="reference", out_dtype=torch.float64
    )
    got = results_and_gradients(case, rounded)
    # A result or a parameter's gradient is float32 throughout; only activations' gradients are rounded to their dtype.
    for name, value in got.items():
        tolerance = TOLERANCE[dtype if name in ACTIVATIONS else torch.float32]
        assert relative_error(value, want[name]) < tolerance, name
        assert value.dtype == (torch.float32 if name == "result" else rounded[name].dtype)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("result", ["merged", "steps"])
def test_sixteen_bit_results(out_dtype, result):
    case = named("plain", result=result, D=40)
    inputs = as_dtype(case, out_dtype)
    want = case.run({k: x.double() for k, x in inputs.items()}, backend="reference", out_dtype=torch.float64)
    got = case.run(inputs, out_dtype=out_dtype)
    assert got.dtype == out_dtype
    assert relative_error(got, want) < TOLERANCE[out_dtype]


@pytest.mark.parametrize("name", ["plain", "vanilla_stage", "states", "everything_at_once"])
def test_the_reference_passes_gradcheck(name):
    case = named(name, batch=1, L=4, T=5, D=3, N=2)
    inputs = {key: x.requires_grad_() for key, x in case.inputs().items()}

    def run(*tensors):
        return case.run(dict(zip(inputs, tensors, strict=True)), backend="reference", out_dtype=torch.float64)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def test_the_reference_is_mambas_recurrence():
    """Against a loop over scalars that knows nothing of routes."""
    case = named("plain", batch=1, K=1, L=7, D=2, N=3, full_dt=True)
    inputs = case.inputs()
    route = torch.arange(7, dtype=torch.int32)[None]
    got = selective_scan_reference(**inputs, route=route, out_dtype=torch.float64)[0]
    for d in range(2):
        state = [0.0] * 3
        for t in range(7):
            dt = torch.nn.functional.softplus(inputs["dt"][0, t, 0, d] + inputs["dt_bias"][0, d]).item()
            u = inputs["u"][0, t, d].item()
            y = inputs["D"][0, d].item() * u
            for n in range(3):
                decay = torch.tensor(dt * inputs["A"][0, d, n].item(), dtype=torch.float64).exp().item()
                state[n] = decay * state[n] + dt * inputs["B"][0, t, 0, n].item() * u
                y += inputs["C"][0, t, 0, n].item() * state[n]
            assert got[t, d].item() == pytest.approx(y, rel=1e-12)


@by_name
def test_without_gradients_the_result_is_the_same(case: Case):
    inputs = as_dtype(case, torch.float32)
    with_gradients = case.run({key: x.clone().requires_grad_() for key, x in inputs.items()})
    assert with_gradients.requires_grad
    assert torch.equal(case.run(inputs), with_gradients)
    with torch.inference_mode():
        assert torch.equal(case.run(inputs), with_gradients)


@pytest.mark.parametrize("name", ["vmamba_stage", "vanilla_stage", "many_images", "everything_at_once"])
def test_two_runs_and_any_number_of_threads_give_the_same_bits(name):
    case = named(name)
    inputs = as_dtype(case, torch.float32)
    first = results_and_gradients(case, inputs)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = results_and_gradients(case, inputs)
            for key in first:
                assert torch.equal(first[key], again[key]), key
    finally:
        torch.set_num_threads(threads)


def test_non_contiguous_inputs():
    """Slices of one projection, as models pass them; a transposed u; an expanded B."""
    case = named("plain", D=40, R=3, N=2)
    inputs = as_dtype(case, torch.float32)
    want = results_and_gradients(case, inputs)
    together = torch.cat([inputs["dt"], inputs["B"], inputs["C"]], dim=-1)
    views = dict(inputs)
    views["dt"], views["B"], views["C"] = together.split([3, 2, 2], dim=-1)
    views["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not views["dt"].is_contiguous() and not views["u"].is_contiguous()
    assert torch.equal(case.run(views), want["result"])

    shared = named("shared_parameters", D=33)
    inputs = as_dtype(shared, torch.float32)
    expanded = dict(inputs)
    expanded["B"] = inputs["B"].expand(-1, -1, shared.K, -1)
    assert expanded["B"].stride(2) == 0
    leaf = inputs["B"].clone().requires_grad_()
    shared.run({**inputs, "B": leaf.expand(-1, -1, shared.K, -1)}).sum().backward()
    other = inputs["B"].clone().requires_grad_()
    shared.run({**inputs, "B": other}).sum().backward()
    assert relative_error(leaf.grad, other.grad) < 1e-6


def test_an_expanded_u_has_a_gradient_per_direction():
    case = named("u_per_direction")
    inputs = as_dtype(case, torch.float32)
    shared = inputs["u"][:, :1].clone()
    want = results_and_gradients(case, {**inputs, "u": shared.repeat(1, case.K, 1, 1)})
    leaf = shared.clone().requires_grad_()
    result = case.run({**inputs, "u": leaf.expand(-1, case.K, -1, -1)})
    assert torch.equal(result, want["result"])
    generator = torch.Generator().manual_seed(7)
    projection = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)
    (gradient,) = torch.autograd.grad(result, [leaf], projection)
    assert relative_error(gradient, want["u"].sum(1, keepdim=True)) < 1e-6


def test_a_single_gradient_can_be_asked_for():
    case = PLAIN
    inputs = as_dtype(case, torch.float32)
    every = results_and_gradients(case, inputs)
    for key in inputs:
        alone = {k: x.clone().requires_grad_(k == key) for k, x in inputs.items()}
        result = case.run(alone)
        generator = torch.Generator().manual_seed(7)
        projection = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)
        (gradient,) = torch.autograd.grad(result, [alone[key]], projection)
        assert torch.equal(gradient, every[key]), key


def test_the_default_route_is_raster_order():
    case = named("plain", L=20)
    inputs = as_dtype(case, torch.float32)
    raster = get_route("raster", 4, 5).repeat(case.K, 1)
    assert torch.equal(selective_scan(**inputs), selective_scan(**inputs, route=raster))


def test_unvisited_positions_get_zero():
    inputs = as_dtype(PLAIN, torch.float32)
    route = torch.tensor([[0, 2], [2, 4], [4, 0], [2, 2]], dtype=torch.int32)
    out = selective_scan(**inputs, route=route)
    visited = torch.zeros(PLAIN.L, dtype=torch.bool)
    visited[[0, 2, 4]] = True
    assert (out[:, ~visited] == 0).all() and (out[:, visited] != 0).all()


def test_extreme_steps_stay_finite():
    """Steps far beyond softplus's threshold, and far below where float32 still sees exp(dt)."""
    inputs = as_dtype(PLAIN, torch.float32)
    for bias in (-100.0, -40.0, 25.0, 200.0):
        inputs["dt_bias"] = torch.full_like(inputs["dt_bias"], bias)
        want = PLAIN.run({k: x.double() for k, x in inputs.items()}, backend="reference", out_dtype=torch.float64)
        assert relative_error(PLAIN.run(inputs), want) < 5e-6


def test_nan_is_not_swallowed():
    for key in ("u", "dt", "B", "dt_bias"):
        inputs = as_dtype(PLAIN, torch.float32)
        inputs[key].view(-1)[0] = float("nan")
        assert selective_scan(**inputs).isnan().any(), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(u=torch.zeros(2, 12)), r"u must be \(batch, L, D\) or \(batch, K, L, D\), got \(2, 12\)"),
        (dict(A=torch.zeros(3, 5, 2)), r"A must be \(\(1, 4\), 5, 2\) .* got \(3, 5, 2\)"),
        (dict(dt=torch.zeros(2, 12, 4, 9)), r"dt must be \(2, 12, \(1, 4\), 3\) .* got \(2, 12, 4, 9\)"),
        (dict(B=torch.zeros(2, 11, 4, 2)), r"B must be"),
        (dict(C=None), "needs C"),
        (dict(dt_bias=torch.zeros(4, 6)), "dt_bias must be"),
        (dict(route=torch.zeros(12, dtype=torch.int32)), r"route must be \(K, T\)"),
        (dict(route=torch.zeros(0, 6, dtype=torch.int32)), "at least one direction"),
        (dict(dt=torch.zeros(2, 12, 4, 0), dt_weight=torch.zeros(4, 5, 0)), "dt_weight must expand"),
        (
            dict(A=torch.zeros(4, 5, 2, device="meta")),
            r"A is on meta, but u is on cpu; move it there: A.to\(u.device\)",
        ),
        (dict(route=torch.zeros(4, 6, dtype=torch.int32, device="meta")), "route is on meta, but u is on cpu"),
        (dict(result="sum"), "result must be one of merged, steps, states, got 'sum'"),
        (dict(backend="cuda"), "backend must be one of"),
    ],
)
def test_wrong_shapes_are_explained(change, message):
    inputs = {**as_dtype(PLAIN, torch.float32), **PLAIN.tables(), **change}
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs)


def test_wrong_dtypes_are_explained():
    inputs = as_dtype(PLAIN, torch.float32)
    with pytest.raises(TypeError, match="backend='reference' takes float64 too"):
        selective_scan(**PLAIN.inputs(), **PLAIN.tables())
    with pytest.raises(TypeError, match="u, dt, B and C must share one dtype"):
        selective_scan(**{**inputs, "dt": inputs["dt"].half()}, **PLAIN.tables())
    tables = PLAIN.tables()
    for backend in ("kernel", "reference"):
        with pytest.raises(TypeError, match=r"route must be torch.int32, got torch.int64; cast it: route.to"):
            selective_scan(**inputs, **{**tables, "route": tables["route"].long()}, backend=backend)


def test_too_large_a_result_is_out_of_memory():
    images = 10**12  # more than addresses reach
    u = torch.zeros(1, 64, 32).expand(images, -1, -1)
    dt, B = torch.zeros(1, 64, 1, 32).expand(images, -1, -1, -1), torch.zeros(1, 64, 1, 1).expand(images, -1, -1, -1)
    with pytest.raises(RuntimeError, match="out of memory: a vmamba operator could not allocate"):
        selective_scan(u, dt, -torch.ones(1, 32, 1), B, B)


def test_a_route_off_the_map_is_an_error_not_a_crash():
    inputs = as_dtype(PLAIN, torch.float32)
    route = torch.full((4, 6), PLAIN.L, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="route visits position 12 of a map with 12 positions"):
        selective_scan(**inputs, route=route)
