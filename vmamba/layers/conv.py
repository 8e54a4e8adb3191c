"""Convolutions."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.ops.autocast import autocast_dtype
from vmamba.ops.depthwise_conv import Activation, depthwise_conv
from vmamba.ops.positions import channels_first, channels_last

_TENSOR_CORE_CHANNELS = 8  # that a 16-bit product takes at least; cuDNN is slow with maps of fewer


def conv_by_patches(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    """A convolution as the product of all patches, laid out one beside the other, and the weights.

    Args:
        x: (batch, height, width, channels).
        weight: (out_channels, channels, rows, columns).
        bias: (out_channels).
        stride: Of the patches along height and width.
        padding: Zeros around the map, above and below, left and right.

    Returns:
        (batch, height // stride, width // stride, out_channels) or a little more or less, as convolutions have it.
    """
    rows, columns = weight.shape[2:]
    x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    patches = x.unfold(1, rows, stride[0]).unfold(2, columns, stride[1])  # (batch, h, w, channels, rows, columns)
    # A row of a patch is one piece of memory. It gets as long as tensor cores read.
    missing = -columns * x.shape[3] % _TENSOR_CORE_CHANNELS
    patches = F.pad(patches.permute(0, 1, 2, 4, 5, 3).flatten(4), (0, missing)).flatten(3)
    weight = F.pad(weight.permute(0, 2, 3, 1).flatten(2), (0, missing)).flatten(1)
    return F.linear(patches.flatten(1, 2), weight, bias).unflatten(1, patches.shape[1:3])


@register_notrace_module  # how it computes depends on the device
class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d`; of images, that is of few channels, faster on a GPU in 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x) or x.dtype
        if not self._prefers_patches(x, dtype):
            return super().forward(x)
        x = channels_last(x.to(dtype))
        return channels_first(conv_by_patches(x, self.weight, self.bias, self.stride, self.padding))

    def _prefers_patches(self, x: Tensor, dtype: torch.dtype) -> bool:
        return (
            x.is_cuda
            and not x.requires_grad  # an image has no gradient; overlapping patches would add theirs up slowly
            and dtype in (torch.bfloat16, torch.float16)
            and x.dim() == 4
            and self.in_channels < _TENSOR_CORE_CHANNELS
            and self.groups == 1
            and self.dilation == (1, 1)
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
        )


class Conv2dNHWC(Conv2d):
    """A 2-d convolution of maps of shape (batch, height, width, channels).

    The permuted views it works on are what PyTorch calls ``channels_last``: where the backend keeps that memory format,
    nothing is copied on the way in or out. Same parameters as :class:`torch.nn.Conv2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(super().forward(channels_first(x)))


@register_notrace_module  # how it computes depends on the device
class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of maps (batch, height, width, dim), with what follows it; faster on a GPU.

    Same parameters as :class:`torch.nn.Conv2d`.

    Args:
        dim: Channels of the map.
        kernel_size: Side of the kernel, odd; the map is padded with zeros by half of it.
        stride: Step of the kernel; maps become 1/stride the size, rounded up.
        bias: Whether there is one.
        activation: ``"silu"``, applied to the result.
        residual: Whether the map itself is added to its convolution, before the activation.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
        activation: Activation | None = None,
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, dim, kernel_size, stride, padding=kernel_size // 2, groups=dim, bias=bias, **dd)
        self.activation = activation
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(
            x,
            self.weight,
            self.bias,
            self.stride,
            padding=self.kernel_size[0] // 2,
            activation=self.activation,
            residual=self.residual,
        )

    def extra_repr(self) -> str:
        """What nn.Conv2d says, and what follows the convolution."""
        said = [super().extra_repr()]
        if self.activation is not None:
            said.append(f"activation={self.activation}")
        if self.residual:
            said.append("residual=True")
        return ", ".join(said)


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm and activation, of maps (batch, channels, height, width).

    timm's module of this name hides the activation in the norm, and whatever turns batch norms into synchronised ones
    without knowing timm's would lose it.

    Args:
        in_chans: Channels of the map.
        out_chans: Channels of the result.
        kernel_size: Side of the kernel, odd; the map is padded by half of it.
        stride: Step of the kernel.
        groups: Groups of channels that are convolved apart.
        act: The activation; None for none.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        act: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(
            in_chans,
            out_chans,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(out_chans, device=device, dtype=dtype)
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))
