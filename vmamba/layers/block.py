"""Residual blocks on channels-last maps."""

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vmamba.layers.conv import DepthwiseConv2d
from vmamba.layers.mlp import Mlp
from vmamba.layers.norm import BranchNorm, norm_of
from vmamba.layers.one_operator import in_one_operator
from vmamba.layers.plain import drops_nothing, is_plain, is_unwatched, names_calls
from vmamba.layers.ss2d import SS2D
from vmamba.ops.mlp import serves_projection
from vmamba.ops.norm_linear import norm_linear, serves_norm_linear
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
        self.mixer: Any = mixer
        self.norm2: Any = nn.Identity() if mlp is None else BranchNorm(dim, **dd)
        self.mlp: Any = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def mix_positions(self, x: Tensor) -> Tensor:
        """The first branch, added to its input."""
        return by_position(torch.add, x, self.drop_path(self.mixer(self.norm1(x))))

    def mix_channels(self, x: Tensor) -> Tensor:
        """The second branch, added to its input."""
        if self.mlp is None:
            return x
        if self._ends_in_one_pass(x):
            return self.mlp.residual(x, None, self.norm2)
        return by_position(torch.add, x, self.drop_path(self.mlp(self.norm2(x))))

    def branches(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The block but for its last addition, which the norm of the next block can make: see :func:`run_blocks`.

        A subclass with a ``forward`` of its own is called and need not override this.

        Args:
            x: (batch, height, width, dim).
            branch: Of the same shape; the block's input is then ``x + branch``.

        Returns:
            Two maps, each of the shape of ``x``, whose sum is the block's output; or that output and None.
        """
        if self._ends_in_one_pass(x):
            return self._in_few_passes(x, branch), None
        at_once = in_one_operator(self, x, branch)
        if at_once is not None:
            return at_once
        x, normed = self._norm1(x, branch)
        branch = self.drop_path(self.mixer(normed))
        if self.mlp is None:
            return x, branch
        x, normed = self.norm2(x, branch)
        return x, self.drop_path(self.mlp(normed))

    def _norm1(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        return (x, self.norm1(x)) if branch is None else self.norm1(x, branch)

    def _ends_in_one_pass(self, x: Tensor) -> bool:
        """Whether nobody can tell if the parts of the second branch are called, or computed in one.

        That has no derivative, and what comes in may need one on account of any parameter before it.
        """
        return (
            self.mlp is not None
            and not torch.is_grad_enabled()
            and not names_calls(x)
            and is_plain(self.mlp, Mlp)
            and drops_nothing(self.drop_path)
            and self.mlp.serves_residual(x, self.norm2)
        )

    def _in_few_passes(self, x: Tensor, branch: Tensor | None) -> Tensor:
        """The block where it ends in one pass: that also ends a mixer that can be ended, which may begin in one too."""
        projection = self.mixer.end(x) if isinstance(self.mixer, SS2D) else None
        if projection is None or not serves_projection(x, projection):
            x, normed = self._norm1(x, branch)
            return self.mlp.residual(x, self.mixer(normed), self.norm2)
        x, inner = self._enter(x, branch)
        return self.mlp.residual(x, self.mixer.between(inner), self.norm2, projection)

    def _enter(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """The block's input, and what the mixer's first projection makes of its norm."""
        weight = self.mixer.in_proj.weight
        if branch is None and is_plain(self.norm1, BranchNorm):
            norm = norm_of(self.norm1)
            if serves_norm_linear(x, norm, weight):
                return x, by_position(lambda x: norm_linear(x, norm, weight), x)
        x, normed = self._norm1(x, branch)
        return x, by_position(self.mixer.in_proj, normed)

    def forward(self, x: Tensor) -> Tensor:
        return _total(*self.branches(x))


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


# ---------------------------------------------------------------------------------------------------------------------
# Blocks in a row
# ---------------------------------------------------------------------------------------------------------------------


class BlockSequence(nn.Sequential):
    """:class:`torch.nn.Sequential` of blocks, run by :func:`run_blocks`."""

    def forward(self, x: Tensor) -> Tensor:
        return run_blocks(self, x)


def run_blocks(blocks: Iterable[nn.Module], x: Any) -> Any:
    """What ``blocks`` make of ``x``, called one after the other, with fewer passes over the maps between them.

    The addition that ends a :class:`PreNormBlock` is left to the first norm of the next one, which makes it in the pass
    that it needs anyway. Any other block is called with the sum, and so is one whose calls somebody overrides or
    watches: hooks, wrappers and tracers find what they would find without this.

    Args:
        blocks: Each takes what the one before it returns.
        x: What the first one takes: for :class:`PreNormBlock`, (batch, height, width, dim).
    """
    branch = None
    named = names_calls(x)
    for block in blocks:
        if not named and _defers(block):
            x, branch = block.branches(x, branch)
        else:
            x, branch = block(_total(x, branch)), None
    return _total(x, branch)


def _total(x: Any, branch: Tensor | None) -> Any:
    return x if branch is None else by_position(torch.add, x, branch)


def _defers(block: nn.Module) -> TypeGuard[PreNormBlock]:
    """Whether nobody can tell a call of ``block`` from one of its :meth:`PreNormBlock.branches` and an addition."""
    return (
        isinstance(block, PreNormBlock)
        and type(block).forward is PreNormBlock.forward
        and is_unwatched(block)
        and is_plain(block.norm1, BranchNorm)
    )
