"""Published files to safetensors: one set of weights, and beside them what they are and where they came from."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vmamba.errors import UserError
from vmamba.files import replaced
from vmamba.weights import places, record
from vmamba.weights.contents import own_weights
from vmamba.weights.manifest import Checkpoint


def convert(checkpoint: Checkpoint, path: Path, folder: Path) -> Path:
    """Write the weights of a published file as safetensors, compared with the model.

    A classifier's get the names that its model has here, those of a detector or segmentor keep theirs.

    Args:
        checkpoint: What the file is.
        path: The file.
        folder: Where to write; the file is called like the checkpoint.

    Returns:
        The new file.

    Raises:
        UserError: if it does not fit, is converted already, cannot be written, or if another file has the name.
    """
    if path.suffix == places.CONVERTED_SUFFIX:
        raise UserError(f"{path} is converted already")
    digest = record.check(checkpoint, path, str(path))
    target = folder / (checkpoint.name + places.CONVERTED_SUFFIX)
    if target.exists() and not is_made_of(target, digest):
        raise UserError(f"{target} is there already, and was not made of {path}; rename it, or name another folder")
    weights = {
        name: value.detach().clone(memory_format=torch.contiguous_format)  # views of one another cannot be stored
        for name, value in own_weights(checkpoint, path).items()
    }
    _write(weights, metadata(checkpoint, digest), target)
    record.check(checkpoint, target, f"converted from {path}", accept=True)
    return target


def metadata(checkpoint: Checkpoint, sha256: str) -> dict[str, str]:
    """What is stored beside the weights.

    Args:
        checkpoint: What they are.
        sha256: Of the published file.
    """
    facts = {
        "format": "pt",
        "name": checkpoint.name,
        "task": checkpoint.task,
        "model": checkpoint.backbone,
        "config": checkpoint.config,
        "source": checkpoint.url,
        "source_sha256": sha256,
        "license": checkpoint.license,
        "license_note": checkpoint.license_note,
        "paper": f"arXiv:{checkpoint.paper}",
        "title": checkpoint.title,
        "repository": checkpoint.repository,
        "metrics": json.dumps(dict(checkpoint.metrics)),
    }
    return {key: value for key, value in facts.items() if value is not None}


def read_metadata(path: Path) -> dict[str, str]:
    """What :func:`metadata` stored in a converted file; empty for one of other origin."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def is_made_of(path: Path, sha256: str) -> bool:
    """Whether a file says that :func:`convert` made it of the published file with that hash."""
    try:
        return read_metadata(path).get("source_sha256") == sha256
    except (OSError, SafetensorError):
        return False


def _write(weights: dict[str, Tensor], facts: dict[str, str], target: Path) -> None:
    """Write a file whole, or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced(target) as part:
            part.touch()
            mode = part.stat().st_mode
            save_file(weights, part, facts)
            part.chmod(mode)  # safetensors renames a file of its own, which nobody else may read
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error
