"""Convolutions."""

from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.ops.depthwise_conv import Activation, depthwise_conv
from vmamba.ops.positions import channels_first, channels_last


class Conv2dNHWC(nn.Conv2d):
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
        self.conv = nn.Conv2d(
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
