"""LayerNorm over channels that are last, written in the dtype that the next layer wants.

PyTorch's CUDA kernel gives every row a block of threads, which rows of 96 to 768 channels cannot fill, and under
autocast it writes float32 that is then read again only to be cast. The kernel here holds a row in one warp and casts on
the way out; it can add a residual branch on the way in. Elsewhere PyTorch's is used: on a CPU, and for inference under
torch.compile, whose own kernel fuses more. For training it is not: its reductions for the weights' gradients take
several times as long.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor

from vmamba.ops import extension, schema
from vmamba.ops.autocast import autocast_dtype
from vmamba.ops.eager import asks_for_gradients, differentiable
from vmamba.ops.positions import by_position
from vmamba.ops.registration import LIBRARY, refuse_derivative

_MOST_CHANNELS = 1536  # kMaxNormChannels in csrc/cuda/layer_norm.h


class Norm(NamedTuple):
    """The parameters of a LayerNorm, for operators that apply one on their way.

    Attributes:
        weight: (channels).
        bias: (channels).
        eps: Added to the variance.
    """

    weight: Tensor
    bias: Tensor
    eps: float

    def in_float32(self) -> "Norm":
        """As kernels take it."""
        return Norm(self.weight.float(), self.bias.float(), self.eps)

    def fits(self, x: Tensor) -> bool:
        """Whether it is one of the last dimension of ``x``."""
        return self.weight.shape == self.bias.shape == x.shape[-1:]


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Normalises ``x`` over its last dimension, computed in float32 (float64 for float64) whatever the dtypes are.

    Args:
        x: (..., channels).
        weight: (channels).
        bias: (channels).
        eps: Added to the variance.
        out_dtype: dtype of the result; ``x``'s if None.

    Returns:
        The normalised, scaled and shifted rows, of the shape of ``x``.
    """
    return by_position(lambda x: _layer_norm(x, weight, bias, eps, out_dtype or x.dtype), x)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    training = asks_for_gradients(x, weight, bias)
    if _has_kernel(x, out_dtype, training):
        weight, bias = weight.float(), bias.float()
        if training:
            norm = torch.ops.vmamba.layer_norm if torch.compiler.is_compiling() else _eager_norm
            return norm(x, weight, bias, eps, out_dtype)[0]
        return torch.ops.vmamba.layer_norm_forward(x, weight, bias, eps, out_dtype)
    compute = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(compute), weight.shape, weight.to(compute), bias.to(compute), eps)
    return normed.to(out_dtype)


@register_notrace_function
def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Adds a residual branch and normalises the sum.

    Args:
        x: (..., channels), the residual stream.
        branch: As ``x``, of its dtype or a narrower one.
        weight: (channels).
        bias: (channels).
        eps: Added to the variance.

    Returns:
        The sum, in the dtype of ``x``, and :func:`layer_norm` of it in the dtype that a linear layer wants: autocast's
        under autocast, else that of ``x``.
    """
    return by_position(lambda x, branch: _add_layer_norm(x, branch, weight, bias, eps), x, branch)


def _add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out_dtype = autocast_dtype(x) or x.dtype
    training = asks_for_gradients(x, branch, weight, bias)
    if branch.dtype == out_dtype and _has_kernel(x, out_dtype, training):
        weight, bias = weight.float(), bias.float()
        eager = training and not torch.compiler.is_compiling()
        fused = _eager_add_norm if eager else torch.ops.vmamba.add_layer_norm
        total, normed, *_ = fused(x, branch, weight, bias, eps, out_dtype)
        return total, normed
    total = x + branch
    return total, _layer_norm(total, weight, bias, eps, out_dtype)


def serves_channels(channels: int) -> bool:
    """Whether the kernels norm rows of so many channels."""
    return channels % 4 == 0 and 0 < channels <= _MOST_CHANNELS


def _has_kernel(x: Tensor, out_dtype: torch.dtype, training: bool) -> bool:
    channels = x.shape[-1]
    return (
        x.is_cuda
        and (training or not torch.compiler.is_compiling())
        and extension.has_kernel("cuda")
        and serves_channels(channels)
        and x.dtype in extension.KERNEL_DTYPES
        and out_dtype in (x.dtype, torch.float32, *(extension.KERNEL_DTYPES if x.dtype == torch.float32 else ()))
    )


def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    return torch.empty(x.shape, dtype=out_dtype, device=x.device), rows, torch.empty_like(rows)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    x, weight, _bias, _eps, _out_dtype = inputs
    _y, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)


def _backward(ctx, grad, _grad_mean, _grad_rstd):
    dx, dweight, dbias = torch.ops.vmamba.layer_norm_backward(grad, *ctx.saved_tensors)
    return dx, dweight, dbias, None, None


def _fake_add(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return total, *_fake(x, weight, bias, eps, out_dtype)


def _fake_add_backward(
    grad_sum: Tensor, grad: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _fake_backward(grad, total, weight, mean, rstd)
    return dx, torch.empty(grad.shape, dtype=grad.dtype, device=grad.device), dweight, dbias


def _setup_add_context(ctx, inputs, output):
    _x, _branch, weight, _bias, _eps, ctx.out_dtype = inputs
    total, _normed, mean, rstd = output
    ctx.save_for_backward(total, weight, mean, rstd)


def _backward_add(ctx, grad_sum, grad, _grad_mean, _grad_rstd):
    total = ctx.saved_tensors[0]
    # None where only one of the two outputs was used.
    grad_sum = torch.zeros_like(total) if grad_sum is None else grad_sum
    grad = torch.zeros_like(total, dtype=ctx.out_dtype) if grad is None else grad
    return *torch.ops.vmamba.add_layer_norm_backward(grad_sum, grad, *ctx.saved_tensors), None, None


_ONCE = "vmamba's layer_norm is differentiable once; use torch.nn.functional.layer_norm"

LIBRARY.define(f"layer_norm{schema.LAYER_NORM}", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(f"layer_norm_forward{schema.LAYER_NORM_FORWARD}", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(f"layer_norm_backward{schema.LAYER_NORM_BACKWARD}", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("vmamba::layer_norm", _fake, lib=LIBRARY)
torch.library.register_fake("vmamba::layer_norm_forward", lambda *args: _fake(*args)[0], lib=LIBRARY)
torch.library.register_fake("vmamba::layer_norm_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("vmamba::layer_norm", _backward, setup_context=_setup_context, lib=LIBRARY)
refuse_derivative("layer_norm_backward", _ONCE)

LIBRARY.define(f"add_layer_norm{schema.ADD_LAYER_NORM}", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(f"add_layer_norm_backward{schema.ADD_LAYER_NORM_BACKWARD}", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("vmamba::add_layer_norm", _fake_add, lib=LIBRARY)
torch.library.register_fake("vmamba::add_layer_norm_backward", _fake_add_backward, lib=LIBRARY)
torch.library.register_autograd("vmamba::add_layer_norm", _backward_add, setup_context=_setup_add_context, lib=LIBRARY)
refuse_derivative("add_layer_norm_backward", _ONCE)

_eager_norm = differentiable(torch.ops.vmamba.layer_norm, _setup_context, _backward)
_eager_add_norm = differentiable(torch.ops.vmamba.add_layer_norm, _setup_add_context, _backward_add, outputs=2)
