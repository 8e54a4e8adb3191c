"""What autocast asks for."""

import torch
from torch import Tensor

from vmamba.ops import extension


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast asks for on the device of ``x``; None outside autocast, and for meta tensors."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def has_16bit_kernel(x: Tensor) -> bool:
    """Whether the extension has kernels for the device of ``x``, and what is to be computed there has 16 bits."""
    dtype = autocast_dtype(x) or x.dtype
    return x.is_cuda and extension.has_kernel("cuda") and dtype in (torch.bfloat16, torch.float16)
