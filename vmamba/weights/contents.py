"""What is in a file of weights, and whether it is what its name says. Nothing in it is executed."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vmamba.models  # noqa: F401  (registers the models)
from vmamba.models._checkpoint import CheckpointError, check_fit, only, read
from vmamba.weights.manifest import Checkpoint


def own_weights(checkpoint: Checkpoint, path: Path) -> dict[str, Tensor]:
    """The weights to use out of a file, compared with the model.

    Args:
        checkpoint: What the file should be.
        path: The file, published or converted.

    Returns:
        Of a classifier, all parameters under the names that the model here has. Of a detector or segmentor, all of
        them under their published names, which are those of mmdet and mmseg.

    Raises:
        CheckpointError: if it cannot be read or does not fit.
    """
    with torch.device("meta"):
        model = timm.create_model(checkpoint.backbone)
    content = only(read(path), checkpoint.weights)
    family = importlib.import_module(f"vmamba.models.{checkpoint.family}")
    try:
        weights = family.checkpoint_filter_fn(content, model)
        if checkpoint.task == "classification":
            check_fit(weights, model)
            return weights
        _check_backbone(weights, model)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not {checkpoint.name}: it {error}") from None
    return _tensors(content.get(checkpoint.weights, content))


def _check_backbone(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """A detector's backbone has all of the model but its head and last norm, and parts of its own."""
    names = model.state_dict()
    absent = frozenset(name for name in names if name.startswith(("head.", "norm.")))
    check_fit({name: value for name, value in weights.items() if name in names and name not in absent}, model, absent)


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
