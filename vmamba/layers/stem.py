"""Stems: from an image to the first map of features."""

from typing import Any

import torch
from torch import Tensor, nn

from vmamba.layers.conv import Conv2dNHWC, ConvNormAct
from vmamba.layers.norm import BranchNorm, LayerNorm
from vmamba.layers.plain import is_plain, names_calls
from vmamba.ops.conv_norm_gelu import conv_norm_gelu, serves_conv_norm_gelu
from vmamba.ops.positions import by_position, channels_last


def to_nhwc(image: Tensor) -> Tensor:
    """An image (batch, channels, height, width) as a channels-last view, laid out that way in memory."""
    return image.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


class PatchStem(nn.Module):
    """Non-overlapping patches, then LayerNorm: (batch, C, H, W) to (batch, H // 4, W // 4, dim).

    Up to three last rows and columns of the image that fill no patch are not seen.
    """

    reduction = 4

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = Conv2dNHWC(in_chans, dim, kernel_size=4, stride=4, device=device, dtype=dtype)
        self.norm = LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.conv(to_nhwc(image)))


class ConvStem(nn.Module):
    """Two 3x3 convolutions, LayerNorm behind each and GELU between: (batch, C, H, W) to (batch, H / s, W / s, dim).

    The sizes are rounded up; s is the product of the strides, 4 unless said.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        strides: tuple[int, int] = (2, 2),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.reduction = strides[0] * strides[1]
        self.conv1 = Conv2dNHWC(in_chans, dim // 2, kernel_size=3, stride=strides[0], padding=1, **dd)
        self.norm1 = BranchNorm(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = Conv2dNHWC(dim // 2, dim, kernel_size=3, stride=strides[1], padding=1, **dd)
        self.norm2 = LayerNorm(dim, **dd)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm2(self.conv2(self._first_layers(image)))

    def _first_layers(self, image: Tensor) -> Tensor:
        conv, norm = self.conv1, self.norm1
        parameters = (conv.weight, conv.bias, norm.weight, norm.bias)
        plain = self._begins_plainly(image) and all(type(p) is nn.Parameter for p in parameters)
        if plain and serves_conv_norm_gelu(image, *parameters, conv.stride[0]):
            return conv_norm_gelu(image, *parameters, norm.eps, conv.stride[0])
        return by_position(self.act, norm(conv(to_nhwc(image))))

    def _begins_plainly(self, image: Tensor) -> bool:
        """Whether nobody can tell if the first layers are called, or computed in one."""
        return (
            not names_calls(image)
            and is_plain(self.conv1, Conv2dNHWC)
            and is_plain(self.norm1, BranchNorm)
            and is_plain(self.act, nn.GELU)
            and self.act.approximate == "none"
        )


class ResidualConvStem(nn.Module):
    """Convolutions with batch norm, three of them at the first resolution, of which two are residual (MLLA's stem).

    Maps (batch, C, H, W) to (batch, H / s, W / s, dim). The sizes are rounded up; s is the product of the strides, 4
    unless said. Nothing is normalised or activated after the last convolution but by its batch norm.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        strides: tuple[int, int] = (2, 2),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.reduction = strides[0] * strides[1]
        half = dim // 2
        self.conv1 = ConvNormAct(in_chans, half, 3, stride=strides[0], act=nn.ReLU(inplace=True), **dd)
        self.conv2 = nn.Sequential(
            ConvNormAct(half, half, 3, act=nn.ReLU(inplace=True), **dd), ConvNormAct(half, half, 3, **dd)
        )
        self.conv3 = nn.Sequential(
            ConvNormAct(half, 4 * dim, 3, stride=strides[1], act=nn.ReLU(inplace=True), **dd),
            ConvNormAct(4 * dim, dim, 1, **dd),
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image.contiguous(memory_format=torch.channels_last))
        x = x + self.conv2(x)
        return channels_last(self.conv3(x))
