"""GELU behind a linear layer, whose bias gets its gradient in the same pass over memory.

That gradient is a sum over all positions of the gradient that GELU passes on. PyTorch writes the latter, as wide a map
as there is in a residual block, and then reads it again; the kernel here sums while it writes. GELU itself is as fast
as memory here in 16 bits, which what torch.compile makes of it is not. Where there is no kernel, PyTorch's operators
are used.
"""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor

from vmamba.ops import extension, schema
from vmamba.ops.autocast import autocast_dtype
from vmamba.ops.eager import differentiable
from vmamba.ops.registration import LIBRARY, refuse_derivative

_PACK = 8  # kGeluPack in csrc/cuda/gelu.h


@register_notrace_function
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``gelu(linear(x, weight, bias))``, with the exact GELU; casts under autocast as a linear layer does.

    Args:
        x: (..., channels).
        weight: (hidden, channels).
        bias: (hidden).

    Returns:
        (..., hidden).
    """
    if not serves_linear_gelu(weight, bias):
        return F.gelu(F.linear(x, weight, bias))
    if not torch.is_grad_enabled():
        return torch.ops.vmamba.gelu_forward(F.linear(x, weight, bias))
    # The bias is added, but as a constant: its gradient comes from behind.
    hidden = F.linear(x, weight, bias.detach())
    return (torch.ops.vmamba.gelu if torch.compiler.is_compiling() else _eager_gelu)(hidden, bias)


def serves_linear_gelu(weight: Tensor, bias: Tensor) -> bool:
    """Whether a kernel takes part in :func:`linear_gelu` now: where no gradient is asked for, or one of ``bias`` is."""
    return (bias.requires_grad or not torch.is_grad_enabled()) and _has_kernel(weight)


def _has_kernel(weight: Tensor) -> bool:
    return (
        weight.is_cuda
        and extension.has_kernel("cuda")
        and weight.shape[0] % _PACK == 0
        and (autocast_dtype(weight) or weight.dtype) in extension.KERNEL_DTYPES
    )


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    sums = x.new_empty(x.shape[-1], dtype=torch.float32)
    return _like(x), sums


def _setup_context(ctx, inputs, output):
    x, bias = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    dx, dbias = torch.ops.vmamba.gelu_backward(grad, *ctx.saved_tensors)
    return dx, dbias.to(ctx.bias_dtype)


LIBRARY.define(f"gelu{schema.GELU}", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(f"gelu_forward{schema.GELU_FORWARD}", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(f"gelu_backward{schema.GELU_BACKWARD}", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("vmamba::gelu", lambda x, bias: _like(x), lib=LIBRARY)
torch.library.register_fake("vmamba::gelu_forward", lambda x: _like(x), lib=LIBRARY)
torch.library.register_fake("vmamba::gelu_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("vmamba::gelu", _backward, setup_context=_setup_context, lib=LIBRARY)
refuse_derivative("gelu_backward", "vmamba's linear_gelu is differentiable once; use torch.nn.functional.gelu")

_eager_gelu = differentiable(torch.ops.vmamba.gelu, _setup_context, _backward)
