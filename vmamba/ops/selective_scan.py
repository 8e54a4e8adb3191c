"""The selective scan: one differentiable call over the kernels in ``csrc`` and the reference beside it."""

from typing import Literal, get_args

import torch
from timm.models import register_notrace_function
from torch import Tensor

from vmamba.ops import extension, recording, registration
from vmamba.ops.reference import selective_scan_reference

Result = Literal["merged", "steps", "states"]
Backend = Literal["kernel", "reference"]

_TABLE_DTYPES = {"route": torch.int32, "param_route": torch.int32, "reset": torch.bool}


@register_notrace_function
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    D: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    route: Tensor | None = None,
    param_route: Tensor | None = None,
    reset: Tensor | None = None,
    dt_softplus: bool = True,
    result: Result = "merged",
    out_dtype: torch.dtype = torch.float32,
    backend: Backend = "kernel",
) -> Tensor:
    """Scans a map along K routes with input-dependent parameters (Mamba's S6, arXiv 2312.00752, on routes).

    With step sizes ``dt`` (after the optional low-rank product, bias and softplus), every direction k runs

        h_t = exp(dt_t * A) * h_{t-1} + dt_t * B_t * u_t        from h = 0
        y_t = C_t . h_t + D * u_t

    where u_t is ``u`` at position ``route[k, t]``, and dt_t, B_t, C_t are taken at ``param_route[k, t]``. The state is
    float32 whatever the inputs are. Sizes: L positions, T steps, K directions, D channels, N states, R = dt rank.
    Tensors are channels last; only the last dimension has to be contiguous. A K of 1 in any parameter is shared by all
    directions.

    Args:
        u: Input, (batch, L, D) shared by the directions or (batch, K, L, D). float32, bfloat16 or float16.
        dt: Step sizes before bias and softplus: (batch, L, K, D), or (batch, L, K, R) where ``dt_weight`` is given.
        A: Decay rates, (K, D, N); negative for a stable scan (``-exp(A_log)``).
        B: Input projection, (batch, L, K, N).
        C: Output projection, (batch, L, K, N). Not used, and may be absent, for ``result="states"``.
        D: Skip weight, (K, D). Not used for ``result="states"``.
        dt_weight: Expands low-rank steps: (K, D, R).
        dt_bias: Added to the steps before softplus: (K, D).
        route: int32 (K, T), or (batch, K, T) for a route per image; see :mod:`vmamba.ops.routes`. An entry of -1 is a
            step that reads nothing (u, B, C and the raw dt are zero there) and only decays the state. Default: raster
            order, T = L, for each direction.
        param_route: A second table for dt, B and C, of the shape of ``route``. Default: ``route``.
        reset: bool, shape of ``route``: the state is set to zero before a marked step.
        dt_softplus: Whether steps pass through softplus.
        result: ``"merged"``: the sum over directions and visits at each position, (batch, L, D), zero where nothing
            visits. ``"steps"``: every step's output in scan order, (batch, K, T, D). ``"states"``: the states h in
            scan order, (batch, K, T, D, N).
        out_dtype: dtype of the result: float32 (default; float16 can overflow between scan and norm) or ``u``'s.
        backend: ``"kernel"`` (C++ or CUDA, by device; on a CPU the reference stands in where the extension is not
            built, and has said so) or ``"reference"`` (PyTorch, slow, also float64).

    Returns:
        The result asked for. Differentiable in every floating input; not twice. Deterministic.

    Raises:
        ValueError: on shapes that do not fit together, with the shape that was expected, or on several devices.
        TypeError: on a dtype the backend does not take, or a table of another dtype.
        RuntimeError: if no kernel for ``u``'s device is built, with the cure.
    """
    if result not in get_args(Result):
        raise ValueError(f"result must be one of {', '.join(get_args(Result))}, got '{result}'")
    if route is None:
        route = _raster_for(u, dt, A, B)
    tables = {"route": route, "param_route": param_route, "reset": reset}
    _check_places(u, dt=dt, A=A, B=B, C=C, D=D, dt_weight=dt_weight, dt_bias=dt_bias, **tables)
    _check_shapes(u, dt, A, B, C, D, dt_weight, dt_bias, route, param_route, reset, result)
    if recording.is_recording():
        recording.note(u, dt, A, B, C, D, dt_weight, dt_bias, route, param_route, reset, dt_softplus, result)
    if backend == "reference" or (u.device.type == "cpu" and extension.runs_on_reference()):
        return selective_scan_reference(
            u, dt, A, B, C, D,
            dt_weight=dt_weight, dt_bias=dt_bias, route=route, param_route=param_route, reset=reset,
            dt_softplus=dt_softplus, result=result, out_dtype=out_dtype,
        )  # fmt: skip
    if backend != "kernel":
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got '{backend}'")
    return registration.call(
        u, dt, A, B, C, D, dt_weight, dt_bias, route, param_route, reset, dt_softplus, result, out_dtype
    )  # fmt: skip


def _raster_for(u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
    directions = max(u.shape[1] if u.dim() == 4 else 1, dt.shape[2], A.shape[0], B.shape[2])
    return torch.arange(u.shape[-2], dtype=torch.int32, device=u.device).repeat(directions, 1)


def _check_places(u: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError for a tensor on another device than ``u``, TypeError for a table of another dtype."""
    device = u.device
    for name, x in others.items():
        if x is None:
            continue
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, but u is on {device}; move it there: {name}.to(u.device)")
        dtype = _TABLE_DTYPES.get(name)
        if dtype is not None and x.dtype is not dtype:
            raise TypeError(f"{name} must be {dtype}, got {x.dtype}; cast it: {name}.to({dtype})")


def _check_shapes(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    route: Tensor,
    param_route: Tensor | None,
    reset: Tensor | None,
    result: str,
) -> None:
    """Raises ValueError, naming the argument, what it is and what it should be."""
    if u.dim() not in (3, 4):
        raise ValueError(f"u must be (batch, L, D) or (batch, K, L, D), got {tuple(u.shape)}")
    if route.dim() not in (2, 3):
        raise ValueError(f"route must be (K, T) or (batch, K, T), got {tuple(route.shape)}")
    if A.dim() != 3:
        raise ValueError(f"A must be (K, D, N), got {tuple(A.shape)}")
    batch, length, channels = u.shape[0], u.shape[-2], u.shape[-1]
    directions, state = route.shape[-2], A.shape[-1]
    if directions == 0:
        raise ValueError(f"route must have at least one direction, got {tuple(route.shape)}")
    shared = (1, directions)
    if u.dim() == 4 and u.shape[1] != directions:
        raise ValueError(f"u has {u.shape[1]} directions but route has {directions}: {tuple(u.shape)}")
    if route.dim() == 3 and route.shape[0] != batch:
        raise ValueError(f"route has {route.shape[0]} images but u has {batch}")

    def check(name: str, x: Tensor | None, *expected: int | tuple[int, int]) -> None:
        if x is None:
            return
        fits = x.dim() == len(expected) and all(
            size in want if isinstance(want, tuple) else size == want
            for size, want in zip(x.shape, expected, strict=True)
        )
        if not fits:
            raise ValueError(f"{name} must be {expected} (a pair is a choice), got {tuple(x.shape)}")

    rank = channels if dt_weight is None else dt_weight.shape[-1]
    if rank == 0 and dt_weight is not None:
        raise ValueError(f"dt_weight must expand steps of a rank of at least one, got {tuple(dt_weight.shape)}")
    check("A", A, shared, channels, state)
    check("dt", dt, batch, length, shared, rank)
    check("B", B, batch, length, shared, state)
    check("C", C, batch, length, shared, state)
    check("D", D, shared, channels)
    check("dt_weight", dt_weight, shared, channels, rank)
    check("dt_bias", dt_bias, shared, channels)
    check("param_route", param_route, *route.shape)
    check("reset", reset, *route.shape)
    if C is None and result != "states":
        raise ValueError(f"result='{result}' needs C; only result='states' does without it")
