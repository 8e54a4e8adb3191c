"""The scans of a model: what each block's call of the operator was given, and the grid it walked on."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.models.spatialmamba import StructureAwareSSM
from vmamba.models.vim import Vim, class_index
from vmamba.ops import ScanCall, record_scans

_BLOCK = re.compile(r"(stages\.\d+\.)?blocks\.\d+")


@dataclass(frozen=True)
class BlockScan:
    """One call of the operator by one block of a model.

    Attributes:
        block: Name of the block in the model, such as ``"stages.2.blocks.1"``.
        call: What the operator was given.
        height: Rows of the scanned grid.
        width: Its columns.
        class_token: Where a class token stands in the sequence; None if the sequence is the grid.
        fusion: The module that fuses and observes the states, where the operator returns those (Spatial-Mamba).
    """

    block: str
    call: ScanCall
    height: int
    width: int
    class_token: int | None = None
    fusion: StructureAwareSSM | None = None

    def to_grid(self, sequence: Tensor) -> Tensor:
        """Values of the positions, (..., L), on the grid without the class token: (..., height, width)."""
        if self.class_token is not None:
            sequence = torch.cat([sequence[..., : self.class_token], sequence[..., self.class_token + 1 :]], dim=-1)
        return sequence.unflatten(-1, (self.height, self.width))

    def position(self, row: int, column: int) -> int:
        """Where (row, column) of the grid stands in the sequence."""
        index = row * self.width + column
        return index + 1 if self.class_token is not None and index >= self.class_token else index


def model_scans(model: nn.Module, images: Tensor) -> list[BlockScan]:
    """Runs a model in eval mode and without gradients, and returns its scans in the order of the blocks.

    Args:
        model: A model of this package.
        images: A batch as the model takes it, (batch, C, H, W).

    Raises:
        UserError: if the model does not scan.
    """
    found: list[BlockScan] = []
    mode = model.training
    model.eval()
    with torch.no_grad(), record_scans() as calls:
        hooks = _attach(model, calls, found)
        try:
            model(images)
        finally:
            model.train(mode)
            for hook in hooks:
                hook.remove()
    if not found:
        raise UserError(f"{type(model).__name__} does not scan; choose a model that `vmamba models` lists")
    return found


def _attach(model: Any, calls: list[ScanCall], found: list[BlockScan]) -> list[Any]:
    """Hooks that move what the blocks record from ``calls`` to ``found``, with the block's name and grid."""
    grid = (0, 0)

    def see_grid(stem: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal grid
        grid = output.shape[1], output.shape[2]

    def collect(name: str) -> Callable[..., None]:
        def hook(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            x = inputs[0]
            # What goes between Vim's blocks is no map; its grid is the stem's.
            height, width = (x.shape[1], x.shape[2]) if isinstance(x, Tensor) and x.dim() == 4 else grid
            found.extend(_locate(model, name, block, call, height, width) for call in calls)
            calls.clear()

        return hook

    blocks = [(name, module) for name, module in model.named_modules() if _BLOCK.fullmatch(name)]
    hooks = [block.register_forward_hook(collect(name)) for name, block in blocks]
    return [*hooks, model.stem.register_forward_hook(see_grid)] if blocks and hasattr(model, "stem") else hooks


def _locate(model: nn.Module, name: str, block: nn.Module, call: ScanCall, height: int, width: int) -> BlockScan:
    """The grid that a block on (height, width) scanned: its own, half of it, or its own and a class token."""
    length = call.u.shape[-2]
    fusion = next((module for module in block.modules() if isinstance(module, StructureAwareSSM)), None)
    if isinstance(model, Vim) and model.class_token is not None:
        return BlockScan(name, call, height, width, class_index(height * width, model.class_token))
    for rows, columns in ((height, width), (math.ceil(height / 2), math.ceil(width / 2))):
        if rows * columns == length:
            return BlockScan(name, call, rows, columns, fusion=fusion)
    raise ValueError(f"{name} scans {length} positions, which is no grid of {height}x{width} nor half of it")
