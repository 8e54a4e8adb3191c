"""The scan as registered torch operators: what lets torch.compile, export, autograd, autocast and FLOP counters see it.

Three operators share one list of arguments. ``vmamba::selective_scan`` is differentiable; ``selective_scan_forward`` is
the same kernel without the autograd wrapping, for calls that need no gradient (the wrapping costs more than a small
scan); ``selective_scan_backward`` gives all gradients at once. The kernels come from the extension built from
``csrc``.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmamba.ops import extension, schema
from vmamba.ops.autocast import autocast_dtype
from vmamba.ops.eager import asks_for_gradients, differentiable

ONCE = "selective_scan is differentiable once; for second derivatives pass backend='reference', or drop create_graph"


def checkpoint_steps(device_type: str, states: int) -> int:
    """The forward keeps the state at every so many steps for the backward, which recomputes the states in between.

    The CUDA kernels (``checkpoint_interval`` in csrc/cuda/plan.h) take a single state every 16 steps.
    """
    return 16 if device_type == "cuda" and states == 1 else 64


def call(
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
    dt_softplus: bool,
    result: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Runs the kernel for ``u``'s device: through autograd only where a gradient may be asked for."""
    extension.require_kernel(u.device)
    u, dt, B, C = _one_dtype(u, dt, B, C)
    inputs = (u, dt, _float32(A), B, C, _float32(D), _float32(dt_weight), _float32(dt_bias))
    tables = (route, param_route, reset)
    if asks_for_gradients(*inputs):
        every = checkpoint_steps(u.device.type, A.shape[-1])
        in_a_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # which shows operators, not Python
        scan = torch.ops.vmamba.selective_scan if in_a_graph else _eager_scan
        return scan(*inputs, *tables, dt_softplus, result, out_dtype, every)[0]
    return torch.ops.vmamba.selective_scan_forward(*inputs, *tables, dt_softplus, result, out_dtype, 0)[0]


def _float32(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype is torch.float32 else x.float()


def _one_dtype(u: Tensor, dt: Tensor, B: Tensor, C: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The activations in the one dtype that the kernels want them in: under autocast, in autocast's."""
    dtype = autocast_dtype(u)
    if dtype is not None:
        return u.to(dtype), dt.to(dtype), B.to(dtype), None if C is None else C.to(dtype)
    if u.dtype not in extension.KERNEL_DTYPES:
        raise TypeError(
            f"the kernels take float32, bfloat16 and float16, got {u.dtype}; backend='reference' takes float64 too"
        )
    if not (dt.dtype == u.dtype and B.dtype == u.dtype and (C is None or C.dtype == u.dtype)):
        found = {"u": u.dtype, "dt": dt.dtype, "B": B.dtype, **({} if C is None else {"C": C.dtype})}
        raise TypeError(f"u, dt, B and C must share one dtype, got {found}; cast them or run under torch.autocast")
    return u, dt, B, C


# ---------------------------------------------------------------------------------------------------------------------
# Registration
# ---------------------------------------------------------------------------------------------------------------------


def _fake_forward(
    u, dt, A, B, C, D, dt_weight, dt_bias, route, param_route, reset, dt_softplus, result, out_dtype, checkpoint_steps
):  # fmt: skip
    batch, length, channels = u.shape[0], u.shape[-2], u.shape[-1]
    directions, steps = route.shape[-2:]
    states = A.shape[-1]
    shape = {
        "merged": (batch, length, channels),
        "steps": (batch, directions, steps, channels),
        "states": (batch, directions, steps, channels, states),
    }[result]
    kept = (steps + checkpoint_steps - 1) // checkpoint_steps if checkpoint_steps else 0
    checkpoints = u.new_empty((batch, directions, kept, channels, states), dtype=torch.float32)
    return u.new_empty(shape, dtype=out_dtype), checkpoints


def _fake_backward(grad, checkpoints, u, dt, A, B, C, D, dt_weight, dt_bias, *_):
    def like(x):
        return grad.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return tuple(like(x) for x in (u, dt, A, B, C, D, dt_weight, dt_bias))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.dt_softplus, ctx.result, _out_dtype, ctx.checkpoint_steps = inputs
    ctx.present = [x is not None for x in tensors]
    ctx.save_for_backward(output[1], *(x for x in tensors if x is not None))


def _backward(ctx, grad, _grad_checkpoints):
    checkpoints, *saved = ctx.saved_tensors
    present = iter(saved)
    tensors = [next(present) if there else None for there in ctx.present]
    grads = torch.ops.vmamba.selective_scan_backward(
        grad, checkpoints, *tensors, ctx.dt_softplus, ctx.result, ctx.checkpoint_steps
    )
    of_inputs = (g if there else None for g, there in zip(grads, ctx.present, strict=False))
    return (*of_inputs, *(None,) * 7)


def refuse_derivative(backward: str, message: str) -> None:
    """Makes ``message`` the error of whoever asks for a derivative of an operator that gives gradients itself."""

    def refuse(ctx, *grads):
        raise NotImplementedError(message)

    torch.library.register_autograd(f"vmamba::{backward}", refuse, lib=LIBRARY)


def scan_flops(u_shape: torch.Size, A_shape: torch.Size, rank: int, route_shape: torch.Size) -> int:
    """9 * B*K*T*D*N for the recurrence, B*K*T*D for the skip, 2 * B*K*T*D*R where dt is of rank R > 0."""
    directions, steps = route_shape[-2:]
    return u_shape[0] * directions * steps * u_shape[-1] * (9 * A_shape[-1] + 1 + 2 * rank)


def _scan_flops(u_shape, dt_shape, A_shape, B_shape, *args, **kwargs) -> int:
    dt_weight_shape, route_shape = args[2], args[4]
    return scan_flops(u_shape, A_shape, 0 if dt_weight_shape is None else dt_weight_shape[-1], route_shape)


def _scan_backward_flops(grad_shape, checkpoints_shape, *args, **kwargs) -> int:
    """Twice the forward, as for every product."""
    return 2 * _scan_flops(*args, **kwargs)


def _register_autocast(op: str) -> None:
    """Under autocast the activations take the autocast dtype; A, D and the dt parameters stay float32."""
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(u, dt, A, B, C, *rest, device=device, excluded=excluded):
            dtype = torch.get_autocast_dtype(device)
            u, dt, B, C = (None if x is None else x.to(dtype) for x in (u, dt, B, C))
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return getattr(torch.ops.vmamba, op)(u, dt, A, B, C, *rest)

        LIBRARY.impl(op, kernel, key)


def _register() -> None:
    for op in schema.FORWARD_OPS:
        LIBRARY.define(f"{op}{schema.FORWARD}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"vmamba::{op}", _fake_forward, lib=LIBRARY)
        register_flop_formula(getattr(torch.ops.vmamba, op))(_scan_flops)
    _register_autocast("selective_scan")
    LIBRARY.define(f"selective_scan_backward{schema.BACKWARD}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake("vmamba::selective_scan_backward", _fake_backward, lib=LIBRARY)
    register_flop_formula(torch.ops.vmamba.selective_scan_backward)(_scan_backward_flops)
    LIBRARY.define(f"cpu_isa{schema.CPU_ISA}")
    torch.library.register_autograd("vmamba::selective_scan", _backward, setup_context=_setup_context, lib=LIBRARY)
    refuse_derivative("selective_scan_backward", ONCE)
    extension.load()


LIBRARY = torch.library.Library("vmamba", "DEF")
_register()
_eager_scan = differentiable(torch.ops.vmamba.selective_scan_forward, _setup_context, _backward)
