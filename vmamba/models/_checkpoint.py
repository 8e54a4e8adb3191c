"""Published checkpoints: what may be read from them without executing anything, and whether they fit a model."""

import argparse
import collections
import re
import urllib.error
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from vmamba.errors import UserError

StateDict = dict[str, Tensor]

Names = Mapping[str, str | Callable[[re.Match], str]]
"""Patterns of keys and what replaces them, applied in order."""


def _nothing(*args: Any) -> None:
    """What a pickled call of a function yields that is not to be called."""


_NUMPY = np._core if hasattr(np, "_core") else np.core  # moved in NumPy 2

HARMLESS_TYPES: list[Callable | tuple[Callable, str]] = [
    argparse.Namespace,
    # A raw training checkpoint pickles its yacs configuration. Nothing needs the class: its items suffice.
    (collections.OrderedDict, "yacs.config.CfgNode"),
    # MMEngine pickles the history of each figure it logs, with methods of the class, which are not needed either.
    (collections.OrderedDict, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_nothing, "builtins.getattr"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8", "?")),
    *(
        (getattr(_NUMPY.multiarray, function), f"{module}.multiarray.{function}")
        for module in ("numpy.core", "numpy._core")
        for function in ("scalar", "_reconstruct")
    ),
]
"""Types found beside the weights in published files; they hold data only. All else stays refused by torch.load."""

WRAPPERS = ("state_dict_ema", "model_ema", "ema_model", "model", "state_dict")
"""Where files keep their weights, best first: where averaged weights exist, the published accuracies are theirs."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be read or does not fit the model; the message is one line."""


def unwrap(checkpoint: Any, wrappers: Sequence[str] = WRAPPERS) -> StateDict:
    """The weights inside a checkpoint: under the first of ``wrappers`` that it has, or the checkpoint itself.

    Prefixes of wrapped modules (``module.``, ``_orig_mod.``, several where wrappers were nested) and of detectors
    or classifiers (``backbone.``, with everything but the backbone and a classifier's ``head.``) are taken off.

    Raises:
        CheckpointError: if there are no weights.
    """
    inner = checkpoint
    if isinstance(checkpoint, Mapping):
        inner = next((checkpoint[key] for key in wrappers if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    if not isinstance(inner, Mapping) or not any(isinstance(value, Tensor) for value in inner.values()):
        found = f"the keys {_some(inner)}" if isinstance(inner, Mapping) else f"a {type(inner).__name__}"
        raise CheckpointError(
            f"holds no weights: expected a state dict, bare or under {', '.join(map(repr, wrappers))}, found {found}"
        )
    state_dict = {
        re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in inner.items() if isinstance(value, Tensor)
    }
    if not any(key.startswith("backbone.") for key in state_dict):
        return state_dict
    return {
        key.removeprefix("backbone."): value
        for key, value in state_dict.items()
        if key.startswith(("backbone.", "head."))
    }


def read(path: Path) -> Any:
    """All that is in a checkpoint file, on the CPU, without executing anything.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(HARMLESS_TYPES):
            # Of a mapped file only those tensors are read that are used: an optimizer's states stay on the disk.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise CheckpointError(f"{path} {why_unreadable(error, str(path))}") from error


def only(content: Any, key: str) -> Any:
    """What a checkpoint holds under ``key``, still under it, or all of it where there is nothing of that name."""
    is_there = isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
    return {key: content[key]} if is_there else content


def rename(key: str, *tables: Names) -> str:
    """The key after the replacements of all tables."""
    for table in tables:
        for pattern, name in table.items():
            key = re.sub(pattern, name, key)
    return key


def check_fit(state_dict: StateDict, model: nn.Module, adapted: frozenset[str] = frozenset()) -> None:
    """Raises CheckpointError, naming the first of each kind of mismatch, unless ``state_dict`` fills ``model`` exactly.

    Args:
        state_dict: Weights under the model's own names.
        model: The model.
        adapted: Names that are allowed to be absent or of another shape.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict and key not in adapted]
    unexpected = [key for key in state_dict if key not in own and key not in adapted]
    reshaped = [
        f"{key} is {tuple(state_dict[key].shape)}, expected {tuple(value.shape)}"
        for key, value in own.items()
        if key in state_dict and key not in adapted and state_dict[key].shape != value.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    found = [f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in kinds.items() if keys]
    if found:
        raise CheckpointError(f"does not fit this model: {', '.join(found)}")


def why_unreadable(error: Exception, location: str) -> str:
    """What kept a checkpoint from being read, in words for the one who asked for it."""
    if isinstance(error, urllib.error.URLError):
        return f"could not be downloaded: {error}"
    if not Path(location).is_file():
        return "there is no such file" if isinstance(error, FileNotFoundError) else f"could not be read: {error}"
    if refusal := _refusal(error, location):
        return f"cannot be read: {refusal}"
    try:
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(location)
    except Exception:
        refused = []
    if refused:
        return (
            f"pickles {_some(sorted(refused))} beside its weights, and pickled code is never executed; if you trust "
            "the file, save its weights alone: torch.save({'model': state_dict}, path)"
        )
    size = Path(location).stat().st_size
    return f"is truncated, corrupt or no checkpoint at all ({size:,} bytes)"


def _refusal(error: Exception, location: str) -> str | None:
    """What the system refused: as it says when asked again, since safetensors finds any such file absent."""
    try:
        Path(location).open("rb").close()
    except OSError as refusal:
        return refusal.strerror
    return error.strerror if isinstance(error, OSError) else None


def _some(keys: Any, most: int = 3) -> str:
    """The first few of the keys."""
    keys = [str(key) for key in keys]
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")
