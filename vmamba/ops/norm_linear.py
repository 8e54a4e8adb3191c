"""A linear layer behind a LayerNorm of few channels as one kernel, in inference: no normed map reaches memory."""

from typing import Any

import torch
from timm.models import register_notrace_function
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmamba.ops import schema
from vmamba.ops.autocast import autocast_dtype
from vmamba.ops.autocast import has_16bit_kernel as _has_kernel
from vmamba.ops.eager import asks_for_gradients
from vmamba.ops.layer_norm import Norm
from vmamba.ops.registration import LIBRARY, refuse_derivative

# serves_norm_linear in csrc/cuda/norm_linear.h
_CHANNELS = (64, 96, 128)
_OUT_CHANNELS, _MOST_WEIGHTS = 32, 48 * 1024  # a multiple of the first


@register_notrace_function
def norm_linear(x: Tensor, norm: Norm, weight: Tensor) -> Tensor:
    """``linear(layer_norm(x), weight)``.

    Only where :func:`serves_norm_linear`; without derivatives.

    Args:
        x: (..., channels).
        norm: Over the channels.
        weight: (out_channels, channels).

    Returns:
        (..., out_channels), in the dtype of autocast, without it in that of ``x``.
    """
    return torch.ops.vmamba.norm_linear(x, *norm.in_float32(), weight.to(autocast_dtype(x) or x.dtype))


def serves_norm_linear(x: Tensor, norm: Norm, weight: Tensor) -> bool:
    """Whether :func:`norm_linear` has a kernel for these tensors."""
    dtype = autocast_dtype(x)
    out_channels, channels = weight.shape
    return (
        _has_kernel(x)
        and not asks_for_gradients(x, norm.weight, norm.bias, weight)
        and x.dtype in (torch.float32, dtype or x.dtype)
        and (dtype is not None or weight.dtype == x.dtype)
        and channels in _CHANNELS
        and norm.fits(x)
        and x.shape[-1] == channels
        and out_channels > 0
        and out_channels % _OUT_CHANNELS == 0
        and weight.numel() <= _MOST_WEIGHTS
    )


def _fake(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=weight.dtype)


def _flops(x_shape, norm_weight_shape, norm_bias_shape, eps, weight_shape, *args: Any, **kwargs: Any) -> int:
    """Those of the product."""
    return 2 * x_shape.numel() * weight_shape[0]


LIBRARY.define(f"norm_linear{schema.NORM_LINEAR}", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("vmamba::norm_linear", _fake, lib=LIBRARY)
register_flop_formula(torch.ops.vmamba.norm_linear)(_flops)
refuse_derivative("norm_linear", "vmamba's norm_linear has no derivative; call the layers one by one")
