"""What every backbone of one scale shares: patches, their position embedding, blocks, norm and head.

A family builds its stem, its blocks and its head and passes them on. What its blocks hand from one to the next need not
be the map itself: :meth:`PlainBackbone.enter` makes it from the map, :meth:`PlainBackbone.leave` ends it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed_nhwc, to_2tuple, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vmamba.layers import run_blocks
from vmamba.models._backbone import Backbone
from vmamba.models._checkpoint import CheckpointError, StateDict
from vmamba.ops.positions import by_position

FORMATS = ("NCHW", "NHWC", "NLC")
"""Layouts of intermediate maps."""


class PlainBackbone(Backbone):
    """Stem, position embedding, blocks, norm, head; maps are channels last, (batch, height, width, dim).

    Any input size works that gives at least one patch: the position embedding is a map of its own, resized bicubically
    where the patches form another grid than the one it was made for.

    Args:
        stem: From the image (batch, C, H, W) to the map of patches; has ``reduction`` and ``grid_size(H, W)``.
        blocks: Each takes and returns what :meth:`enter` makes.
        norm: The last norm.
        head: The classifier; see :class:`Backbone`.
        dim: Channels.
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for none.
        global_pool: Name of the head's pooling; ``""`` for none.
        img_size: Size of the images whose grid the position embedding has.
        device: Where to create the parameters.
        dtype: Their dtype; the parameters of the scans stay float32.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        stem: Any,
        blocks: Iterable[nn.Module],
        norm: nn.Module,
        head: nn.Module,
        *,
        dim: int,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.embed_dim = dim
        self.grad_checkpointing = False

        self.stem = stem
        self.pos_embed = nn.Parameter(
            torch.empty(1, *self._grid_size(224 if img_size is None else img_size), dim, device=device, dtype=dtype)
        )
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm
        self.head = head
        self.feature_info = [
            {"num_chs": dim, "reduction": stem.reduction, "module": f"blocks.{i}"} for i in range(len(self.blocks))
        ]

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws the position embedding anew; families add the rest."""
        trunc_normal_(self.pos_embed, std=0.02)

    # -- Inference ----------------------------------------------------------------------------------------------------

    def embed(self, x: Tensor) -> Tensor:
        """Images (batch, C, H, W) to the map of patches with their positions, (batch, height, width, dim)."""
        x = self.stem(x)
        return by_position(torch.add, x, resize_pos_embed(self.pos_embed, x.shape[1], x.shape[2]))

    def enter(self, x: Tensor) -> Any:
        """What the first block takes, from the map of patches; the map itself unless a family says otherwise."""
        return x

    def leave(self, state: Any) -> Tensor:
        """What :meth:`forward_features` returns, from what the last block returns."""
        return by_position(self.norm, state)

    def run_blocks(self, blocks: Iterable[nn.Module], state: Any) -> Any:
        """What the last of ``blocks`` returns, from what the first takes; with activation checkpointing if it is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(blocks, state)
        return run_blocks(blocks, state)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (batch, C, H, W) to the last normalised features."""
        return self.leave(self.run_blocks(self.blocks.children(), self.enter(self.embed(x))))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The blocks' outputs beside the final one.

        Args:
            x: Images (batch, C, H, W).
            indices: Which blocks: the last n for an int, all for None.
            norm: Whether the maps pass the final norm.
            stop_early: Whether to leave out the blocks that no index needs.
            output_fmt: ``"NCHW"``, ``"NHWC"`` or ``"NLC"``, for the intermediates.
            intermediates_only: Whether to return the list alone.

        Returns:
            The final features as :meth:`forward_features` gives them, and the list of intermediates.
        """

        def read(index: int, state: Any, height: int, width: int) -> Tensor:
            return self.norm(state) if norm else state

        return self._intermediates(x, indices, read, stop_early, output_fmt, intermediates_only)

    def take_indices(self, indices: int | list[int] | None) -> tuple[list[int], int]:
        """The blocks that ``indices`` asks for, counted from the first, and the last of them."""
        return feature_take_indices(len(self.blocks), indices)

    def _intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None,
        read: Callable[[int, Any, int, int], Tensor],
        stop_early: bool,
        output_fmt: str,
        intermediates_only: bool,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """:meth:`forward_intermediates`, given how to read a channels-last map of (index, state, height, width)."""
        if output_fmt not in FORMATS:
            raise ValueError(f"output_fmt must be one of {', '.join(FORMATS)}, got '{output_fmt}'")
        taken, _ = self.take_indices(indices)
        intermediates = []
        x = self.embed(x)
        height, width = x.shape[1], x.shape[2]
        state = self.enter(x)
        blocks, done = list(self.blocks), 0
        for i in sorted(set(taken)):
            state = self.run_blocks(blocks[done : i + 1], state)
            intermediates.append(_as_format(read(i, state, height, width), output_fmt))
            done = i + 1
        if not stop_early:
            state = self.run_blocks(blocks[done:], state)
        return intermediates if intermediates_only else (self.leave(state), intermediates)

    # -- Surgery ------------------------------------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what the given blocks do not need; returns their indices."""
        taken, last = self.take_indices(indices)
        self.blocks = nn.Sequential(*list(self.blocks)[: last + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: Any = None) -> None:
        """Resizes the position embedding for good, to the grid of ``img_size``.

        Raises:
            ValueError: for a size that gives no patch, or for a patch size.
        """
        super().set_input_size(img_size, patch_size)
        if img_size is not None:
            resized = resize_pos_embed(self.pos_embed.detach(), *self._grid_size(img_size))
            self.pos_embed = nn.Parameter(resized.clone(), requires_grad=self.pos_embed.requires_grad)

    def _grid_size(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        grid = self.stem.grid_size(*to_2tuple(img_size))
        if min(grid) < 1:
            raise ValueError(f"img_size {img_size} is smaller than one patch")
        return grid

    # -- Training -----------------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position embedding beside the scans' skips, as in published training."""
        return super().no_weight_decay() | {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for layer-wise learning rates; there is one grain."""
        return {"stem": r"^(?:stem|pos_embed)", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades memory for time: blocks keep their input only and run again in the backward pass."""
        self.grad_checkpointing = enable


@torch.fx.wrap  # what it does depends on the sizes, so it is not traced into
def resize_pos_embed(pos_embed: Tensor, height: int, width: int) -> Tensor:
    """A position embedding (1, rows, columns, dim) for another grid: bicubic, not antialiased, as in published code."""
    return resample_abs_pos_embed_nhwc(pos_embed, [height, width], antialias=False)


def _as_format(x: Tensor, output_fmt: str) -> Tensor:
    if output_fmt == "NCHW":
        return x.permute(0, 3, 1, 2).contiguous()
    return x.flatten(1, 2) if output_fmt == "NLC" else x


# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def square_map(rows: Tensor) -> Tensor:
    """A published position embedding, (1, rows, dim) of a square grid, as a map (1, side, side, dim).

    Raises:
        CheckpointError: if the rows form no square.
    """
    count = rows.shape[1]
    side = math.isqrt(count)
    if side * side != count:
        raise CheckpointError(f"has a position embedding of {count} rows, which form no square grid")
    return rows.unflatten(1, (side, side))


def fit_pos_embed(weights: StateDict, model: PlainBackbone) -> StateDict:
    """The weights, with the position embedding, a map, resized to the grid of the model."""
    if "pos_embed" not in weights:
        return weights
    _, height, width, _ = model.pos_embed.shape
    return {**weights, "pos_embed": resize_pos_embed(weights["pos_embed"], height, width)}
