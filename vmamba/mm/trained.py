"""Trained detectors and segmentors, loaded whole."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmamba.models._checkpoint import HARMLESS_TYPES, CheckpointError, check_fit, why_unreadable


def read_checkpoint(path: str) -> dict[str, Any]:
    """What is in a file of MMEngine's or in a published one, read without executing pickled code.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it holds objects that could be code.
    """
    try:
        with torch.serialization.safe_globals(HARMLESS_TYPES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        raise CheckpointError(f"checkpoint {path}: {why_unreadable(error, path)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, expected a dictionary of weights")
    return content


def load_trained(model: nn.Module, path: str) -> None:
    """Load all weights of a detector or segmentor; MMEngine would leave out what does not fit.

    Args:
        model: The model, or a wrapper with the model under ``module``.
        path: A checkpoint of training, or a published one.

    Raises:
        CheckpointError: The file cannot be read, or is of another model.
    """
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    content = read_checkpoint(path)
    weights = {key.removeprefix("module."): value for key, value in content.get("state_dict", content).items()}
    try:
        unfit = model.load_state_dict(weights, strict=False)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path} is of another model: {error}") from error
    except RuntimeError as error:  # other shapes
        raise CheckpointError(
            f"checkpoint {path} is of another model: {' '.join(str(error).split()).partition(': ')[2]}"
        ) from error
    if unfit.missing_keys or unfit.unexpected_keys:
        try:
            check_fit(weights, model)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {path} {error}") from error


def check_resumable(path: str) -> None:
    """Whether MMEngine can go on from a file, without having to execute anything in it.

    Raises:
        CheckpointError: It cannot be read, or it holds weights only.
    """
    content = read_checkpoint(str(Path(path)))
    if "optimizer" not in content:
        raise CheckpointError(
            f"checkpoint {path} holds no optimiser's state to resume from; to start from its weights, use "
            f"--cfg-options load_from={path}"
        )
