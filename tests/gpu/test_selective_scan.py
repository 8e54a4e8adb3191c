"""The CUDA selective scan against the float64 reference: forward and every gradient, for all the schema can say."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from vmamba.ops import get_route, selective_scan, selective_scan_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias")


def make_inputs(
    batch: int,
    length: int,
    channels: int,
    states: int,
    directions: int,
    rank: int = 0,
    *,
    u_shared: bool = True,
    params_shared: bool = False,
    with_c: bool = True,
    with_skip: bool = True,
    with_bias: bool = True,
    packed: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Fresh random inputs on the GPU, by name. Packed: dt, B and C are slices of one tensor, as models make them."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    k = 1 if params_shared else directions
    features = rank or channels
    rows = normal(batch, length, k, features + 2 * states).to(dtype)
    dt, B, C = rows.split([features, states, states], dim=-1)
    if not packed:
        dt, B, C = dt.contiguous(), B.contiguous(), C.contiguous()
    u = normal(batch, length, channels) if u_shared else normal(batch, directions, length, channels)
    return {
        "u": u.to(dtype),
        "dt": dt,
        "A": -torch.exp(0.5 * normal(k, channels, states)),
        "B": B,
        "C": C if with_c else None,
        "D": normal(k, channels) if with_skip else None,
        "dt_weight": normal(k, channels, rank) * rank**-0.5 if rank else None,
        "dt_bias": normal(k, channels) - 3.0 if with_bias else None,
    }


def poison() -> None:
    """Fills the allocator's free memory with NaN, so that whatever a kernel does not write shows."""
    blocks = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(16)]
    blocks += [torch.full((n,), float("nan"), device="cuda") for n in (64, 1 << 10, 1 << 14, 1 << 17)]
    del blocks


def run(inputs: dict[str, Tensor | None], grad: Tensor | None = None, reference: bool = False, **options):
    """The result and the gradients by name."""
    if reference:
        inputs = {name: None if x is None else x.double() for name, x in inputs.items()}
        options = {**options, "out_dtype": torch.float64}
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in inputs.items()}
    if reference:
        out = selective_scan_reference(**leaves, **options)
    else:
        poison()
        out = selective_scan(**leaves, **options)
        poison()
    if grad is None:
        return out.detach(), {}
    wanted = {name: x for name, x in leaves.items() if x is not None}
    grads = torch.autograd.grad(out, list(wanted.values()), grad.to(out.dtype), allow_unused=True)
    return out.detach(), dict(zip(wanted, grads, strict=True))


def error(got: Tensor, want: Tensor) -> float:
    scale = want.double().norm()
    return float((got.double() - want.double()).norm() / (scale if scale > 0 else 1.0))


def check(inputs, dtype: torch.dtype, tolerance: float | None = None, **options) -> dict[str, float]:
    with torch.no_grad():
        shape = selective_scan(**inputs, **options).shape
    generator = torch.Generator("cuda").manual_seed(1)
    grad = torch.randn(shape, generator=generator, device="cuda", dtype=options.get("out_dtype", torch.float32))
    want, want_grads = run(inputs, grad, reference=True, **options)
    got, got_grads = run(inputs, grad, **options)
    errors = {"out": error(got, want)}
    for name, g in got_grads.items():
        w = want_grads[name]
        if w is None:  # not used, e.g. C for the states
            assert g is None or not g.any(), name
            continue
        assert g.shape == w.shape and g.dtype == inputs[name].dtype, name
        errors[name] = error(g, w)
    bad = {name: e for name, e in errors.items() if not e < (tolerance or TOLERANCE[dtype])}
    assert not bad, f"{bad} of {errors}"
    again, again_grads = run(inputs, grad, **options)
    assert torch.equal(got, again), "two runs differ"
    for name, g in got_grads.items():
        assert g is None or torch.equal(g, again_grads[name]), f"two runs differ in {name}"
    return errors


def random_route(directions: int, steps: int, length: int, seed: int = 0, batch: int | None = None) -> Tensor:
    """Any entries at all: positions revisited or missed, and steps that only decay."""
    generator = torch.Generator().manual_seed(seed)
    shape = (directions, steps) if batch is None else (batch, directions, steps)
    return torch.randint(-1, length, shape, generator=generator, dtype=torch.int32).cuda()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize(("channels", "size"), [(96, (8, 8)), (33, (7, 7)), (5, (7, 9)), (1, (1, 1)), (200, (13, 5))])
def test_cross_scan_of_a_map(dtype, states, channels, size):
    inputs = make_inputs(2, size[0] * size[1], channels, states, 4, rank=6, packed=True, dtype=dtype)
    check(inputs, dtype, route=get_route("cross", *size, "cuda"))


@pytest.mark.parametrize("steps", [1, 7, 49, 63, 64, 65, 1000])
@pytest.mark.parametrize("states", [1, 16])
def test_lengths(steps, states):
    inputs = make_inputs(2, steps, 40, states, 2, rank=3)
    check(inputs, torch.float32, route=get_route("bidirectional", 1, steps, "cuda"))


@pytest.mark.parametrize("states", [1, 2, 8, 16, 17, 64])
@pytest.mark.parametrize("result", ["merged", "steps", "states"])
def test_numbers_of_states(states, result):
    inputs = make_inputs(2, 70, 24, states, 2, rank=5)
    check(inputs, torch.float32, route=get_route("bidirectional", 7, 10, "cuda"), result=result)


@pytest.mark.parametrize("rank", [0, 1, 12, 24, 48])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ranks(rank, dtype):
    for states in (1, 16):
        inputs = make_inputs(2, 81, 100, states, 2, rank=rank, dtype=dtype)
        check(inputs, dtype, route=get_route("bidirectional", 9, 9, "cuda"))


@pytest.mark.parametrize("result", ["merged", "steps", "states"])
@pytest.mark.parametrize("states", [1, 16, 20])
@pytest.mark.parametrize("rank", [0, 4])
def test_any_table(result, states, rank):
    for per_image, second_table, with_reset in itertools.product([False, True], repeat=3):
        batch, length, steps = 2, 50, 131
        of = batch if per_image else None
        inputs = make_inputs(batch, length, 20, states, 3, rank=rank)
        route = random_route(3, steps, length, seed=1, batch=of)
        check(
            inputs,
            torch.float32,
            route=route,
            param_route=random_route(3, steps, length, seed=2, batch=of) if second_table else None,
            reset=(torch.rand(route.shape, device="cuda") < 0.1) if with_reset else None,
            result=result,
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("states", [1, 16])
def test_inputs_per_direction_and_shared_parameters(dtype, rank, states):
    route = get_route("cross", 6, 11, "cuda")
    for u_shared, params_shared in itertools.product([False, True], repeat=2):
        inputs = make_inputs(
            3, 66, 48, states, 4, rank=rank, u_shared=u_shared, params_shared=params_shared, dtype=dtype
        )
        check(inputs, dtype, route=route)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [2, 6, 12, 14, 24, 48, 62])
def test_sixteen_bit_maps_merged_on_chip(dtype, rank):
    """The path of small maps with one state: rows side by side, channels in sixteens, any shared table.

    Long walks take it where there are enough of them: more than 48 images times sixteens of channels.
    """
    for batch, steps, length in ((2, 1, 3), (2, 49, 49), (2, 200, 60), (17, 700, 784)):
        inputs = make_inputs(batch, length, 48, 1, 3, rank=rank, packed=True, dtype=dtype)
        check(inputs, dtype, route=random_route(3, steps, length, seed=steps))
    for batch in (3, 25):
        inputs = make_inputs(batch, 28 * 28, 32, 1, 4, rank=rank, packed=True, params_shared=True, dtype=dtype)
        check(inputs, dtype, route=get_route("cross", 28, 28, "cuda"))
        check(inputs, dtype, route=get_route("cross", 28, 28, "cuda"), out_dtype=dtype)


def test_optional_arguments():
    route = get_route("bidirectional", 5, 8, "cuda")
    for skip, bias, softplus in itertools.product([False, True], repeat=3):
        inputs = make_inputs(2, 40, 30, 1, 2, rank=0, with_skip=skip, with_bias=bias)
        if not softplus:
            inputs["dt"] = inputs["dt"].abs() * 0.1
            if bias:
                inputs["dt_bias"] = inputs["dt_bias"].abs() * 0.1
        check(inputs, torch.float32, route=route, dt_softplus=softplus)
    inputs = make_inputs(2, 40, 30, 16, 2, rank=3, with_c=False)
    check(inputs, torch.float32, route=route, result="states")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize("result", ["merged", "states"])
def test_few_rows_many_steps_run_in_chunks(dtype, states, result):
    inputs = make_inputs(1, 40 * 33, 32, states, 4, rank=6, packed=True, dtype=dtype)
    inputs["dt_bias"] = inputs["dt_bias"] - 2.0  # long memory: states reach across chunks
    reset = torch.rand(4, 40 * 33, device="cuda") < 0.002
    check(inputs, dtype, route=get_route("cross", 40, 33, "cuda"), reset=reset, result=result)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("states", [2, 9, 16, 20])
@pytest.mark.parametrize("result", ["merged", "steps"])
def test_two_threads_share_the_states_of_a_channel(dtype, states, result):
    for rank, channels, steps in ((6, 96, 203), (0, 101, 130)):  # 120 warps of rows and more, in several pages
        inputs = make_inputs(10, steps, channels, states, 4, rank=rank, packed=True, dtype=dtype)
        inputs["dt_bias"] = inputs["dt_bias"] - 2.0
        reset = torch.rand(4, steps, device="cuda") < 0.01
        check(inputs, dtype, route=get_route("cross", 1, steps, "cuda"), reset=reset, result=result)
        check(inputs, dtype, route=get_route("cross", 1, steps, "cuda"), result=result)


def kernels_of(function) -> str:
    """The names of the kernels it runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        function()
        torch.cuda.synchronize()
    return " ".join(event.key for event in trace.key_averages())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [4, 12, 16, 24])
@pytest.mark.parametrize("result", ["merged", "steps"])
def test_four_threads_share_sixteen_states(dtype, rank, result):
    for steps, channels in ((203, 96), (300, 64)):
        options = {"u_shared": rank == 4, "params_shared": rank == 16, "with_skip": rank != 12, "with_bias": rank != 16}
        inputs = make_inputs(32, 70, channels, 16, 4, rank=rank, packed=True, dtype=dtype, **options)
        if inputs["dt_bias"] is not None:
            inputs["dt_bias"] = inputs["dt_bias"] - 2.0  # long memory
        per_image = 32 if steps == 203 else None
        route = random_route(4, steps, 70, batch=per_image)
        served = "long_forward" in kernels_of(partial(selective_scan, **inputs, route=route, result=result))
        assert served == (rank <= 16)
        check(inputs, dtype, route=route, result=result)
        check(inputs, dtype, route=route, param_route=random_route(4, steps, 70, 1, per_image), result=result)
        bias = torch.full((4, channels), 0.5, device="cuda")  # steps are above zero without softplus too
        positive = {**inputs, "dt": inputs["dt"] / 10, "dt_bias": bias[: 1 if rank == 16 else 4]}
        check(positive, dtype, route=route, result=result, dt_softplus=False)


def test_what_four_threads_cannot_read_at_once_is_read_as_ever():
    """Views that begin anywhere, and rows of any length."""
    route = random_route(4, 200, 50)
    inputs = make_inputs(32, 50, 64, 16, 4, rank=4, packed=True, dtype=torch.bfloat16)
    want = selective_scan(**inputs, route=route)
    shifted = torch.empty(inputs["u"].numel() + 1, dtype=torch.bfloat16, device="cuda")[1:].view_as(inputs["u"])
    rows = torch.cat([inputs[name] for name in ("dt", "B", "C", "dt")], -1)[..., :-1].contiguous()  # of 39 numbers
    dt, B, C, _ = rows.split([4, 16, 16, 3], -1)
    for other in ({"u": shifted.copy_(inputs["u"])}, {"dt": dt, "B": B, "C": C}):
        call = partial(selective_scan, **{**inputs, **other}, route=route)
        assert "long_forward" not in kernels_of(call)
        assert error(call(), want) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", ["same", "float32"])
def test_output_dtypes(dtype, out_dtype):
    out_dtype = dtype if out_dtype == "same" else torch.float32
    route = get_route("cross", 6, 6, "cuda")
    for states, result in itertools.product([1, 16, 20], ["merged", "steps", "states"]):
        inputs = make_inputs(2, 36, 64, states, 4, rank=4, dtype=dtype)
        check(inputs, dtype, route=route, result=result, out_dtype=out_dtype)


def test_small_steps_keep_their_precision():
    """Steps near 1e-3 and below, where 1 + exp(x) would round exp(x) away."""
    inputs = make_inputs(2, 64, 32, 1, 1, rank=0)
    inputs["dt_bias"] = torch.full_like(inputs["dt_bias"], -12.0)
    check(inputs, torch.float32, route=get_route("raster", 8, 8, "cuda"))


def test_large_steps_do_not_overflow():
    inputs = make_inputs(2, 64, 32, 1, 1, rank=0)
    inputs["dt_bias"] = torch.full_like(inputs["dt_bias"], 120.0)
    # A decay is as exact as its exponent, which is in the tens here.
    check(inputs, torch.float32, tolerance=2e-4, route=get_route("raster", 8, 8, "cuda"))


def test_route_entries_outside_the_map_only_decay():
    inputs = make_inputs(2, 16, 8, 1, 1, rank=2)
    route = torch.arange(16, dtype=torch.int32, device="cuda").repeat(1, 1)
    outside = route.clone()
    outside[0, 5], outside[0, 9] = 1 << 30, -7
    decays = route.clone()
    decays[0, 5] = decays[0, 9] = -1
    assert torch.equal(selective_scan(**inputs, route=outside), selective_scan(**inputs, route=decays))


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("steps", [0, 9])
def test_empty(batch, steps):
    inputs = make_inputs(batch, 9, 8, 1, 2, rank=2)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    poison()
    out = selective_scan(**inputs, route=torch.zeros(2, steps, dtype=torch.int32, device="cuda"))
    assert out.shape == (batch, 9, 8)
    if steps == 0 or batch == 0:
        assert not out.any()
    out.sum().backward()
    for name, x in inputs.items():
        assert torch.isfinite(x.grad).all(), name
        if steps == 0 or batch == 0:
            assert not x.grad.any(), name


@pytest.mark.parametrize(
    ("batch", "states", "size"), [(2, 1, (56, 56)), (9, 1, (56, 56)), (2, 16, (14, 14)), (2, 1, (100, 100))]
)
def test_cuda_graph(batch, states, size):
    inputs = make_inputs(batch, size[0] * size[1], 96, states, 4, rank=6, packed=True, dtype=torch.bfloat16)
    route = get_route("cross", *size, "cuda")
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    grad = torch.randn(batch, size[0] * size[1], 96, device="cuda")

    def step():
        out = selective_scan(**leaves, route=route)
        # Detached: a graph kept alive would tie the capture below to this stream.
        return out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)

    want = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for x in got:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["route", "A", "dt", "dt_weight"])
def test_a_tensor_on_the_cpu_is_refused(name):
    """By the operator itself too: a kernel would follow a pointer of another device."""
    arguments = {**make_inputs(1, 16, 8, 1, 1, rank=2), "route": get_route("raster", 4, 4, "cuda")}
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match=f"{name} is on cpu, but u is on cuda:0"):
        selective_scan(**arguments)
    names = ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias", "route")
    raw = [arguments.get(key) for key in names]
    with pytest.raises(RuntimeError, match=f"{name} is on the CPU but u is on cuda:0"):
        torch.ops.vmamba.selective_scan_forward(*raw, None, None, True, "merged", torch.float32, 0)


def test_steps_far_below_zero_without_softplus_have_gradients():
    inputs = make_inputs(1, 16, 32, 1, 1, rank=0, dtype=torch.bfloat16)
    inputs["dt"], inputs["A"] = torch.full_like(inputs["dt"], -100.0), torch.full_like(inputs["A"], 1e-3)
    del inputs["dt_bias"]
    check(inputs, torch.bfloat16, route=get_route("raster", 4, 4, "cuda"), dt_softplus=False)
