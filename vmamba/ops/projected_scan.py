"""A projection of a map to step sizes, B and C, and the scan of the map with them, as one step of training on a GPU.

Both read the map, so both have a gradient for it, and the projection wants the gradients of its parts as one. Apart,
that costs a pass over the map to add, and one over the parameters to concatenate. Here the scan writes the parts where
they belong, and the projection's product adds to the scan's gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmamba.ops import extension, recording, schema
from vmamba.ops.alignment import align_rows, aligned_linear
from vmamba.ops.autocast import autocast_dtype
from vmamba.ops.eager import differentiable
from vmamba.ops.registration import LIBRARY, ONCE, checkpoint_steps, refuse_derivative, scan_flops


def projected_scan(
    u: Tensor,
    weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    route: Tensor,
    result: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Scans ``u`` with step sizes, B and C that are ``linear(u, weight)``; where :func:`serves_projected_scan`.

    Args:
        u: (batch, L, D).
        weight: (K * (R + 2N), D): rows of dt, B and C for each direction.
        A: (K, D, N), as the other parameters in float32 and as :func:`vmamba.ops.selective_scan` takes them.
        D: (K, D).
        dt_weight: (K, D, R).
        dt_bias: (K, D).
        route: int32, (K, T).
        result: ``"merged"`` or ``"steps"``.
        out_dtype: float32 or the dtype that ``u`` has or that autocast gives it.

    Returns:
        The result of :func:`vmamba.ops.selective_scan`, in ``out_dtype``.
    """
    dtype = autocast_dtype(u) or u.dtype
    every = checkpoint_steps(u.device.type, A.shape[-1])
    inputs = (u.to(dtype), weight.to(dtype), A, D, dt_weight, dt_bias, route, result, out_dtype, every)
    return (torch.ops.vmamba.projected_scan if torch.compiler.is_compiling() else _eager_scan)(*inputs)[0]


def serves_projected_scan(u: Tensor, weight: Tensor, dt_weight: Tensor, route: Tensor, result: str) -> bool:
    """Whether :func:`projected_scan` can, and should, take the place of a projection and a scan."""
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and _has_kernel(u)
        and type(weight) is torch.nn.Parameter
        and (autocast_dtype(u) is not None or u.dtype == weight.dtype)
        and weight.device == u.device == route.device
        and u.dim() == 3
        and route.dtype is torch.int32
        and route.dim() == 2
        and route.shape[0] == dt_weight.shape[0]
        and result in ("merged", "steps")
        and not recording.is_recording()
    )


def _has_kernel(u: Tensor) -> bool:
    return u.is_cuda and extension.has_kernel("cuda") and (autocast_dtype(u) or u.dtype) in extension.KERNEL_DTYPES


def _forward(
    u: Tensor,
    weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    route: Tensor,
    result: str,
    out_dtype: torch.dtype,
    every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    params = aligned_linear(u, weight).unflatten(-1, (dt_weight.shape[0], -1))
    dt, B, C = _parts(params, A)
    out, checkpoints = torch.ops.vmamba.selective_scan_forward(
        u, dt, A, B, C, D, dt_weight, dt_bias, route, None, None, True, result, out_dtype, every
    )
    return out, checkpoints, params


def _parts(params: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    states = A.shape[-1]
    return params.split([params.shape[-1] - 2 * states, states, states], dim=-1)


def _rows_backward(
    grad: Tensor,
    checkpoints: Tensor,
    u: Tensor,
    params: Tensor,
    A: Tensor,
    D: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    route: Tensor,
    result: str,
    every: int,
) -> tuple[Tensor, ...]:
    """What the kernel does for a GPU, for any device."""
    dt, B, C = _parts(params, A)
    du, ddt, dA, dB, dC, dD, ddt_weight, ddt_bias = torch.ops.vmamba.selective_scan_backward(
        grad, checkpoints, u, dt, A, B, C, D, dt_weight, dt_bias, route, None, None, True, result, every
    )
    return du, torch.cat([ddt, dB, dC], dim=-1), dA, dD, ddt_weight, ddt_bias


def _backward_of_both(
    grad: Tensor, checkpoints: Tensor, u: Tensor, params: Tensor, weight: Tensor, *rest: Tensor
) -> tuple[Tensor, ...]:
    du, dparams, *others = torch.ops.vmamba.selective_scan_rows_backward(grad, checkpoints, u, params, *rest)
    width, channels = weight.shape
    weight = align_rows(weight, u)
    rows = dparams.view(-1, width)
    if weight.shape[0] > width:
        rows = F.pad(rows, (0, weight.shape[0] - width))
    dweight = rows.t() @ u.reshape(-1, channels)
    du.view(-1, channels).addmm_(rows, weight)
    return du, dweight[:width], *others


def _fake_rows_backward(grad, checkpoints, u, params, *rest):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, params, *rest[:4]))


def _fake_backward(grad, checkpoints, u, params, weight, *rest):
    return _fake_rows_backward(grad, checkpoints, u, weight, *rest)


def _setup_context(ctx, inputs, output):
    u, weight, A, D, dt_weight, dt_bias, route, ctx.result, _out_dtype, ctx.every = inputs
    _out, checkpoints, params = output
    ctx.save_for_backward(checkpoints, u, params, weight, A, D, dt_weight, dt_bias, route)


def _backward(ctx, grad, _grad_checkpoints, _grad_params):
    grads = torch.ops.vmamba.projected_scan_backward(grad, *ctx.saved_tensors, ctx.result, ctx.every)
    return *grads, None, None, None, None


def _flops(
    u_shape, weight_shape, A_shape, D_shape, dt_weight_shape, dt_bias_shape, route_shape, *args, **kwargs
) -> int:
    """The product and the scan."""
    product = 2 * u_shape.numel() * weight_shape[0]
    return product + scan_flops(u_shape, A_shape, dt_weight_shape[-1], route_shape)


def _backward_flops(grad_shape, checkpoints_shape, u_shape, params_shape, weight_shape, *rest, **kwargs) -> int:
    """Twice the forward, as for every product."""
    return 2 * _flops(u_shape, weight_shape, *rest)


for _name, _schema, _kernel, _shapes in (
    ("projected_scan", schema.PROJECTED_SCAN, _forward, _forward),
    ("projected_scan_backward", schema.PROJECTED_SCAN_BACKWARD, _backward_of_both, _fake_backward),
    ("selective_scan_rows_backward", schema.ROWS_BACKWARD, _rows_backward, _fake_rows_backward),
):
    LIBRARY.define(f"{_name}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vmamba::{_name}", _shapes, lib=LIBRARY)
torch.library.register_autograd("vmamba::projected_scan", _backward, setup_context=_setup_context, lib=LIBRARY)
register_flop_formula(torch.ops.vmamba.projected_scan)(_flops)
register_flop_formula(torch.ops.vmamba.projected_scan_backward)(_backward_flops)
refuse_derivative("projected_scan_backward", ONCE)

_eager_scan = differentiable(torch.ops.vmamba.projected_scan, _setup_context, _backward)
