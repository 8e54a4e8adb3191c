"""Checkpoint files: written whole or not at all, read without ever running code from them.

A file holds tensors, numbers, strings, lists and dictionaries only, so ``torch.load(weights_only=True)`` reads it. The
weights lie under ``state_dict`` (and ``state_dict_ema``), where timm looks for them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmamba.errors import UserError
from vmamba.files import replaced
from vmamba.models._checkpoint import HARMLESS_TYPES

FORMAT_KEY = "format"
WEIGHTS_FORMAT = "vmamba-weights-1"  # best.pth: one set of weights, and what is needed to use them
TRAINING_FORMAT = "vmamba-training-1"  # last.pth: everything needed to go on

_SHOWN_MISMATCHES = 3


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that the file at ``path`` is complete at every moment.

    Raises:
        UserError: The file could not be written.
    """
    with replaced(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def read(path: Path) -> dict[str, Any]:
    """Read the whole content of a checkpoint onto the CPU.

    Raises:
        UserError: There is no such file, it is damaged, or it holds objects that cannot be trusted to be mere data.
    """
    check_readable(path)
    try:
        with torch.serialization.safe_globals(HARMLESS_TYPES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        foreign = _foreign_objects(path)
        if foreign:
            raise UserError(
                f"{path} holds Python objects ({', '.join(foreign[:_SHOWN_MISMATCHES])}), which are never loaded "
                "because they can run code; save its weights alone"
            ) from error
        raise UserError(
            f"{path} is damaged, incomplete or no checkpoint at all ({path.stat().st_size:,} bytes)"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a checkpoint (a dictionary)")
    return content


def check_readable(path: Path) -> None:
    """Raises UserError unless there is a file that may be read, whatever is in it."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a checkpoint file")
    if not path.is_file():
        raise UserError(f"checkpoint {path} not found")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from error


def is_own(content: Mapping[str, Any], path: Path) -> bool:
    """Whether the content of ``path`` is in one of the formats of this module.

    Raises:
        UserError: It is in a format that only a later version of the package knows.
    """
    found = content.get(FORMAT_KEY)  # of others' files, anything
    if not isinstance(found, str):
        return False
    known = found in (WEIGHTS_FORMAT, TRAINING_FORMAT)
    if not known and re.fullmatch(r"vmamba-(weights|training)-\d+", found):
        raise UserError(f"{path} has the format '{found}', which this version of vmamba cannot read; update vmamba")
    return known


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], origin: str) -> None:
    """Load weights strictly; every name and shape must agree.

    Raises:
        UserError: They do not; names the first differences.
    """
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(mismatch_message(error, origin)) from error


def mismatch_message(error: RuntimeError, origin: str) -> str:
    """One line out of the long message that torch has for weights which do not fit a model."""
    text = str(error)
    model_name = (re.search(r"loading state_dict for (\w+)", text) or [None, "the model"])[1]
    shapes = re.findall(
        r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\) from checkpoint.*?torch\.Size\((\[.*?\])\)", text
    )
    missing = _quoted_names(text, "Missing")
    unexpected = _quoted_names(text, "Unexpected")
    if not (shapes or missing or unexpected):
        return f"{origin} does not fit: {' '.join(text.split())}"
    parts = []
    if shapes:
        shown = [f"{name} is {found}, expected {expected}" for name, found, expected in shapes]
        parts.append(_first(f"{len(shapes)} shape(s) differ", shown))
    if missing:
        parts.append(_first(f"{len(missing)} missing", missing))
    if unexpected:
        parts.append(_first(f"{len(unexpected)} unexpected", unexpected))
    return f"{origin} does not fit {model_name}: " + "; ".join(parts)


def _first(what: str, names: list[str]) -> str:
    dots = ", ..." if len(names) > _SHOWN_MISMATCHES else ""
    return f"{what} ({', '.join(names[:_SHOWN_MISMATCHES])}{dots})"


def _quoted_names(text: str, kind: str) -> list[str]:
    listed = re.search(rf"{kind} key\(s\) in state_dict: (.*?)\. *(?:\n|$)", text)
    return re.findall(r'"([^"]+)"', listed[1]) if listed else []


def _foreign_objects(path: Path) -> list[str]:
    """Classes that a readable checkpoint would have to import."""
    try:
        with torch.serialization.safe_globals(HARMLESS_TYPES):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the file is damaged, in one of the many ways a file can be
        return []
