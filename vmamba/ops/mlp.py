"""The MLP of a narrow residual block as one kernel: the hidden map, four times as wide, never reaches memory.

A linear layer of few channels is bound by what it reads and writes. In 16 bits the kernel here reads the map and writes
the result; for the backward pass it keeps the map alone and computes the hidden one again. Its results are a little
closer to exact ones than those of three layers, which round twice on the way. In inference the same kernel makes a
whole residual branch: it ends the branch before by that one's last norm and projection, adds it, normalises the sum,
and adds its result to it. Where it does not serve, on a CPU, in float32, for wide blocks or few positions, PyTorch's
operators do.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmamba.ops import schema
from vmamba.ops.autocast import autocast_dtype
from vmamba.ops.autocast import has_16bit_kernel as _has_kernel
from vmamba.ops.eager import asks_for_gradients, differentiable
from vmamba.ops.layer_norm import Norm
from vmamba.ops.registration import LIBRARY, refuse_derivative

# serves_mlp and serves_mlp_backward in csrc/cuda/mlp.h
_CHANNELS = (64, 96, 128)
_CHANNELS_BACKWARD = (64, 96)
_CHUNK, _MOST_HIDDEN = 32, 1024

_FEWEST_POSITIONS = 16384
"""With fewer there are not enough rows for every multiprocessor, and three small products are as fast."""


@register_notrace_function
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """``linear(gelu(linear(x, weight1, bias1)), weight2, bias2)``, with the exact GELU.

    Args:
        x: (..., channels).
        weight1: (hidden, channels).
        bias1: (hidden).
        weight2: (channels, hidden).
        bias2: (channels).

    Returns:
        Of the shape of ``x``; under autocast in its dtype, as of a linear layer.
    """
    inputs = (x, weight1, bias1, weight2, bias2)
    if not serves_mlp(*inputs):
        return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
    dtype = autocast_dtype(x) or x.dtype
    x, weight1, weight2 = x.to(dtype), weight1.to(dtype), weight2.to(dtype)
    inputs = (x, weight1, bias1.float(), weight2, bias2.float())
    if not asks_for_gradients(*inputs):
        return torch.ops.vmamba.mlp_forward(*inputs)
    return (torch.ops.vmamba.mlp if torch.compiler.is_compiling() else _eager_mlp)(*inputs)


class Projection(NamedTuple):
    """How a mixer ends: a LayerNorm and a linear layer without bias, its weight (channels, channels)."""

    norm: Norm
    weight: Tensor


@register_notrace_function
def residual_mlp(
    x: Tensor, branch: Tensor | None, norm: Norm, *weights: Tensor, projection: Projection | None = None
) -> Tensor:
    """``total + mlp(layer_norm(total), *weights)`` in one pass, where the total is ``x + branch``.

    Only where :func:`serves_residual_mlp`; without derivatives.

    Args:
        x: (..., channels), the residual stream.
        branch: Of the shape of ``x``, the branch that ends here; None for none.
        norm: What is between the total and the MLP.
        weights: Those of :func:`mlp`.
        projection: What is still to be done with ``branch`` first.

    Returns:
        Of the shape and dtype of ``x``.
    """
    dtype = autocast_dtype(x) or x.dtype
    weight1, bias1, weight2, bias2 = weights
    return torch.ops.vmamba.mlp_residual(
        x,
        None if branch is None else branch.to(dtype),
        *((None, None, 0.0) if projection is None else projection.norm.in_float32()),
        None if projection is None else projection.weight.to(dtype),
        *norm.in_float32(),
        weight1.to(dtype),
        bias1.float(),
        weight2.to(dtype),
        bias2.float(),
    )


def serves_residual_mlp(x: Tensor, norm: Norm, *weights: Tensor) -> bool:
    """Whether :func:`residual_mlp` has a kernel for these tensors: where :func:`mlp` has one, but in inference."""
    return (
        not asks_for_gradients(x, norm.weight, norm.bias, *weights)
        and serves_mlp(x, *weights)
        and x.dtype in (torch.float32, autocast_dtype(x) or x.dtype)
        and norm.fits(x)
    )


def serves_projection(x: Tensor, projection: Projection) -> bool:
    """Whether :func:`residual_mlp`, where it serves, takes this projection too."""
    return (
        not asks_for_gradients(projection.weight, projection.norm.weight, projection.norm.bias)
        and projection.weight.shape == (x.shape[-1], x.shape[-1])
        and projection.norm.fits(x)
        and (autocast_dtype(x) is not None or projection.weight.dtype == x.dtype)
    )


def serves_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> bool:
    """Whether :func:`mlp` has a kernel for these tensors, and it is the faster way."""
    channels = _CHANNELS_BACKWARD if asks_for_gradients(x, weight1, bias1, weight2, bias2) else _CHANNELS
    hidden, width = weight1.shape
    return (
        _has_kernel(x)
        and (autocast_dtype(x) is not None or x.dtype == weight1.dtype == weight2.dtype)
        and width in channels
        and x.shape[-1] == width
        and weight2.shape == (width, hidden)
        and hidden % _CHUNK == 0
        and hidden <= _MOST_HIDDEN
        and x.numel() >= _FEWEST_POSITIONS * width
    )


def _fake(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_backward(
    grad: Tensor, x: Tensor, weight1: Tensor, weight1_t: Tensor, bias1: Tensor, weight2_t: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    activation = x.new_empty((*x.shape[:-1], weight1.shape[0]))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), activation, activation.clone(), torch.empty_like(bias1)


def _fake_residual(x: Tensor, *args: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output):
    x, weight1, bias1, weight2, _bias2 = inputs
    ctx.save_for_backward(x, weight1, bias1, weight2)


def _backward(ctx, grad):
    x, weight1, bias1, weight2 = ctx.saved_tensors
    dx, activation, dhidden, dbias1 = torch.ops.vmamba.mlp_backward(
        grad, x, weight1, weight1.t().contiguous(), bias1, weight2.t().contiguous()
    )
    rows = grad.reshape(-1, grad.shape[-1])
    dweight1 = dhidden.flatten(0, -2).t() @ x.reshape(rows.shape)
    dweight2 = rows.t() @ activation.flatten(0, -2)
    return dx, dweight1, dbias1, dweight2, rows.sum(0, dtype=torch.float32)


def _flops(x_shape, weight1_shape, *args, **kwargs) -> int:
    """Two products."""
    return 4 * x_shape.numel() * weight1_shape[0]


def _residual_flops(x_shape, branch_shape, *args, **kwargs) -> int:
    """Those of the products; norms are not counted, here or elsewhere."""
    projection_shape, weight1_shape = args[3], args[7]
    projection = 0 if projection_shape is None else 2 * x_shape.numel() * projection_shape[0]
    return projection + _flops(x_shape, weight1_shape)


def _backward_flops(grad_shape, x_shape, weight1_shape, *args, **kwargs) -> int:
    """The two products that a gradient of ``x`` takes, as of two layers: computing again is not counted."""
    return 4 * x_shape.numel() * weight1_shape[0]


for _op in ("mlp", "mlp_forward"):
    LIBRARY.define(f"{_op}{schema.MLP}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"vmamba::{_op}", _fake, lib=LIBRARY)
    register_flop_formula(getattr(torch.ops.vmamba, _op))(_flops)
LIBRARY.define(f"mlp_backward{schema.MLP_BACKWARD}", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("vmamba::mlp_backward", _fake_backward, lib=LIBRARY)
register_flop_formula(torch.ops.vmamba.mlp_backward)(_backward_flops)
LIBRARY.define(f"mlp_residual{schema.MLP_RESIDUAL}", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("vmamba::mlp_residual", _fake_residual, lib=LIBRARY)
register_flop_formula(torch.ops.vmamba.mlp_residual)(_residual_flops)
torch.library.register_autograd("vmamba::mlp", _backward, setup_context=_setup_context, lib=LIBRARY)
refuse_derivative("mlp_residual", "vmamba's residual MLP has no derivative; use vmamba.ops.mlp")
refuse_derivative("mlp_backward", "vmamba's mlp is differentiable once; use torch.nn.functional.linear and gelu")

_eager_mlp = differentiable(torch.ops.vmamba.mlp_forward, _setup_context, _backward)
