"""Convolutions."""

import torch
from torch import Tensor, nn


class Conv2dNHWC(nn.Conv2d):
    """A 2-d convolution of maps of shape (batch, height, width, channels).

    The permuted views it works on are what PyTorch calls ``channels_last``: where the backend keeps that memory format,
    nothing is copied on the way in or out. Same parameters as :class:`torch.nn.Conv2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


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
