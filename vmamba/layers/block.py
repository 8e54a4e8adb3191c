"""Residual blocks on channels-last maps."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vmamba.layers.conv import DepthwiseConv2d
from vmamba.layers.norm import BranchNorm
from vmamba.ops.positions import by_position


class PreNormBlock(nn.Module):
    """Two residual branches, each behind a LayerNorm: a mixer of positions, then, where there is one, of channels.

    Maps (batch, height, width, dim) to the same shape.

    Args:
        dim: Channels of the map.
        mixer: Mixes positions.
        mlp: Mixes channels; None leaves out the branch and its norm.
        drop_path: Probability of dropping each of the branches, per image.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module | None = None,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = BranchNorm(dim, **dd)
        self.mixer = mixer
        self.norm2: Any = nn.Identity() if mlp is None else BranchNorm(dim, **dd)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def mix_positions(self, x: Tensor) -> Tensor:
        """The first branch, added to its input."""
        return by_position(torch.add, x, self.drop_path(self.mixer(self.norm1(x))))

    def mix_channels(self, x: Tensor) -> Tensor:
        """The second branch, added to its input."""
        return x if self.mlp is None else by_position(torch.add, x, self.drop_path(self.mlp(self.norm2(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.mlp is None:
            return self.mix_positions(x)
        # mix_channels(mix_positions(x)), with the first addition and the second norm in one pass.
        x, normed = self.norm2(x, self.drop_path(self.mixer(self.norm1(x))))
        return by_position(torch.add, x, self.drop_path(self.mlp(normed)))


class PositionalBlock(PreNormBlock):
    """:class:`PreNormBlock` with a residual depthwise convolution before each branch: it tells where a position lies.

    Stochastic depth does not drop the convolutions. The arguments are those of :class:`PreNormBlock`, but for ``mlp``,
    which there must be.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, mixer, mlp, drop_path, **dd)
        self.cpe1 = DepthwiseConv2d(dim, residual=True, **dd)
        self.cpe2 = DepthwiseConv2d(dim, residual=True, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix_positions(self.cpe1(x))
        return self.mix_channels(self.cpe2(x))
