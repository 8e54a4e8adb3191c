"""Downsampling between stages, on channels-last maps."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.layers.conv import Conv2dNHWC, DepthwiseConv2d
from vmamba.layers.norm import BranchNorm, LayerNorm
from vmamba.ops.positions import by_position, channels_first, channels_last


class PatchMerging(nn.Module):
    """Swin's patch merging: (batch, H, W, dim) to (batch, ceil(H / 2), ceil(W / 2), out_dim).

    Concatenates each 2x2 neighbourhood along the channels, column by column, normalises it and projects it. Odd maps
    get a last row and column of zeros first.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = BranchNorm(4 * dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        # Sizes are derived from the halves, not tested for being odd: symbolic sizes stay symbolic under torch.export.
        rows, columns = (height + 1) // 2, (width + 1) // 2
        x = F.pad(x, (0, 0, 0, 2 * columns - width, 0, 2 * rows - height))
        x = x.reshape(batch, rows, 2, columns, 2, dim).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return by_position(self.reduction, self.norm(x))


class ConvDownsample(nn.Module):
    """A 3x3 convolution of stride 2, then LayerNorm: (batch, H, W, dim) to (batch, ceil(H/2), ceil(W/2), out_dim)."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = Conv2dNHWC(dim, out_dim, kernel_size=3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = LayerNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class InvertedDownsample(nn.Module):
    """Widens, convolves each channel with stride 2, and narrows (MLLA's downsampling).

    Maps (batch, H, W, dim) to (batch, ceil(H / 2), ceil(W / 2), out_dim). The hidden map is four times as wide as the
    result; only the result passes a batch norm.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        hidden = 4 * out_dim
        self.expand = nn.Conv2d(dim, hidden, kernel_size=1, **dd)
        self.conv = DepthwiseConv2d(hidden, stride=2, **dd)
        self.project = nn.Conv2d(hidden, out_dim, kernel_size=1, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.expand(channels_first(x)))
        x = channels_first(self.conv(channels_last(x)))
        x = self.project(self.act(x))
        return channels_last(self.norm(x))
