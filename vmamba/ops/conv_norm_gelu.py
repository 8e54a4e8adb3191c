"""The first layers of a stem as one kernel: a convolution of images, LayerNorm and GELU.

What they make of an image is its largest map, and each of them alone is bound by reading and writing it; the product of
patches and weights also writes and reads the patches, which are five times as large as the image. The kernel reads the
image, of any strides, and writes the result. It has no backward: in training the layers are computed one by one.
"""

import torch
from timm.models import register_notrace_function
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmamba.ops import schema
from vmamba.ops.autocast import autocast_dtype
from vmamba.ops.autocast import has_16bit_kernel as _has_kernel
from vmamba.ops.eager import asks_for_gradients
from vmamba.ops.registration import LIBRARY, refuse_derivative

_CHANNELS = (32, 48, 64)
"""serves_conv_norm_gelu in csrc/cuda/conv_norm_gelu.h"""

_MOST_POSITIONS = 2**31 - 1


@register_notrace_function
def conv_norm_gelu(
    image: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, stride: int
) -> Tensor:
    """``gelu(layer_norm(conv2d(image, weight, bias, stride, padding=1)))``, with the exact GELU.

    Only where :func:`serves_conv_norm_gelu`; without derivatives.

    Args:
        image: (batch, 3, height, width), laid out in any way.
        weight: (channels, 3, 3, 3).
        bias: (channels).
        norm_weight: (channels).
        norm_bias: (channels).
        eps: Added to the variance.
        stride: Step of the convolution; the map becomes 1/stride the image's size, rounded up.

    Returns:
        (batch, out_height, out_width, channels), in the dtype of autocast, without it in the image's.
    """
    numbers = (weight.float(), bias.float(), norm_weight.float(), norm_bias.float())
    return torch.ops.vmamba.conv_norm_gelu(image, *numbers, eps, stride, autocast_dtype(image) or image.dtype)


def serves_conv_norm_gelu(
    image: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, stride: int
) -> bool:
    """Whether :func:`conv_norm_gelu` has a kernel for these tensors."""
    dtype = autocast_dtype(image)
    return (
        _has_kernel(image)
        and bias is not None
        and not asks_for_gradients(image, weight, bias, norm_weight, norm_bias)
        and image.dtype in (torch.float32, dtype or image.dtype)
        and (dtype is not None or image.dtype == weight.dtype)
        and image.dim() == 4
        and weight.shape[0] in _CHANNELS
        and weight.shape[1:] == (3, 3, 3)
        and image.shape[1] == 3
        and 0 < image.numel() // 3 <= _MOST_POSITIONS
    )


def _fake(
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    stride: int,
    out_dtype: torch.dtype,
) -> Tensor:
    height, width = ((size - 1) // stride + 1 for size in image.shape[2:])
    return image.new_empty((image.shape[0], height, width, weight.shape[0]), dtype=out_dtype)


def _flops(image_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    """Those of the convolution."""
    return 2 * out_shape.numel() * weight_shape[1:].numel()


LIBRARY.define(f"conv_norm_gelu{schema.CONV_NORM_GELU}", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("vmamba::conv_norm_gelu", _fake, lib=LIBRARY)
register_flop_formula(torch.ops.vmamba.conv_norm_gelu)(_flops)
refuse_derivative("conv_norm_gelu", "vmamba's conv_norm_gelu has no derivative; call the layers one by one")
