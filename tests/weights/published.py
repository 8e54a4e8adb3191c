"""Files as their authors published them, rebuilt from the golden layouts: every key and shape, and next to no bytes."""

from pathlib import Path

import torch

from tests.models.golden import golden
from vmamba.weights import Checkpoint

_CLASSIFIER = ("classifier.", "head.", "norm.")  # what a detector's backbone does not have
_EXTRA = ("backbone_state_dict_extra", "extra_state_dict", "backbone_extra", "backbone_extra_state_dict")
_OTHERS = {"model": "model_ema", "model_ema": "model"}
_NECK = {"neck.lateral_convs.0.conv.weight": (256, 96, 1, 1), "decode_head.conv_seg.bias": (150,)}


def layout(checkpoint: Checkpoint) -> dict[str, tuple[list[int], str]]:
    """Shape and type of every tensor in the published file by its key there."""
    family, model = checkpoint.family, checkpoint.backbone
    if checkpoint.task == "classification":
        entries = golden(family, model)["state_dict"]
    elif family == "plainmamba":
        kind = "adapter" if checkpoint.task == "detection" else "seg"
        entries = golden("dense/plainmamba", model.replace("_l", f"_{kind}_l"))["state_dict"]
    else:
        data = golden(family, model)
        own = [entry for entry in data["state_dict"] if not entry[0].startswith(_CLASSIFIER)]
        extra = [entry for name in _EXTRA for entry in data.get(name, [])]
        entries = [[f"backbone.{key}", *rest] for key, *rest in own + extra]
    found = {key: (shape, dtype) for key, shape, dtype in entries}
    if checkpoint.task != "classification":
        found |= {key: (list(shape), "float32") for key, shape in _NECK.items()}
    return found


def tensors(checkpoint: Checkpoint, offset: float = 0.0) -> dict[str, torch.Tensor]:
    """A tensor for every key, constant, of another value for every key; one number each in a file."""
    return {
        key: torch.tensor(offset + index / 1000).to(getattr(torch, dtype)).expand(shape)
        for index, (key, (shape, dtype)) in enumerate(layout(checkpoint).items())
    }


def save(checkpoint: Checkpoint, path: Path, weights: dict[str, torch.Tensor] | None = None) -> Path:
    """Write the file in its wrapper, with another set of weights beside those to take, where there may be one."""
    content = {checkpoint.weights: tensors(checkpoint) if weights is None else weights, "epoch": 299}
    if checkpoint.weights in _OTHERS:
        content[_OTHERS[checkpoint.weights]] = tensors(checkpoint, offset=500.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path
