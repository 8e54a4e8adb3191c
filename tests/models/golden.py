"""Golden files by family and variant; see tests/golden/recipe.py for what they hold."""

import json
from pathlib import Path

import torch
from torch import nn

from tests.golden import recipe

FOLDER = Path(recipe.__file__).parent
TOLERANCE = 1e-4


def variants(family: str) -> list[str]:
    """The variants of a family that have a golden file."""
    return sorted(path.stem for path in (FOLDER / family).glob("*.json"))


def golden(family: str, variant: str) -> dict:
    return json.loads((FOLDER / family / f"{variant}.json").read_text())


def weights(entries: list) -> dict[str, torch.Tensor]:
    """The tensors of a published layout, filled by the recipe."""
    return {key: torch.from_numpy(recipe.weight(key, shape, dtype)) for key, shape, dtype in entries}


def placeholders(entries: list) -> dict[str, torch.Tensor]:
    """The tensors of a published layout, shapes only."""
    return {key: torch.empty(shape, device="meta") for key, shape, _ in entries}


def mismatches(outputs: dict[str, torch.Tensor], expected: dict) -> dict[str, float]:
    """The largest error of each output, relative to its standard deviation; the outputs are all that are recorded."""
    assert outputs.keys() == expected.keys()
    return {name: recipe.mismatch(value, expected[name]) for name, value in outputs.items()}


def undecayed(model: nn.Module) -> set[str]:
    """The parameters that timm's optimisers leave out of weight decay."""
    return {
        name
        for name, p in model.named_parameters()
        if p.dim() <= 1 or name.endswith(".bias") or name in model.no_weight_decay()
    }
