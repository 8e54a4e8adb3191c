"""timm's model builder, with weights from the manifest and checkpoint errors a reader can act on."""

import fnmatch
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from vmamba.models._checkpoint import (
    HARMLESS_TYPES,
    CheckpointError,
    StateDict,
    check_fit,
    only,
    read,
    why_unreadable,
)
from vmamba.weights import Checkpoint, aliases, checkpoints, fetch


def published_cfgs(models: str, **kwargs: Any) -> dict[str, dict[str, Any]]:
    """timm's pretrained configurations of published classifiers by name and tag, from the manifest.

    Args:
        models: A pattern of their names.
        **kwargs: What all of them have in common, at least ``first_conv``.
    """
    cfgs = {}
    for checkpoint in _classifiers(models):
        cfg = imagenet_cfg(
            url=checkpoint.url,
            hf_hub_id=checkpoint.hub,
            hf_hub_filename=checkpoint.file,
            license=checkpoint.license,
            origin_url=checkpoint.repository,
            paper_ids=f"arXiv:{checkpoint.paper}",
            paper_name=checkpoint.title,
            **kwargs,
        )
        short = (alias for alias, model in aliases().items() if model == checkpoint.backbone)
        tag = checkpoint.name.partition(".")[2]
        cfgs.update({f"{name}.{tag}": cfg for name in (checkpoint.backbone, *short)})
    return cfgs


def published_top1(models: str) -> dict[str, float]:
    """ImageNet-1K top-1 accuracy in percent of published classifiers by name, of each its default weights.

    Args:
        models: A pattern of their names.
    """
    figures: dict[str, float] = {}
    for checkpoint in _classifiers(models):
        figures.setdefault(checkpoint.backbone, checkpoint.metrics["top1"])
    return figures


def _classifiers(models: str) -> Iterator[Checkpoint]:
    for checkpoint in checkpoints().values():
        if checkpoint.task == "classification" and fnmatch.fnmatch(checkpoint.backbone, models):
            yield checkpoint


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's pretrained configuration of a model as all families were published: ImageNet-1K, 224x224, crop 0.875.

    Args:
        **kwargs: What is added or otherwise, at least ``first_conv``.
    """
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        **kwargs,
    }


def build_model(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[Any, Any], StateDict],
    averaged: bool = True,
    **kwargs: Any,
) -> Any:
    """timm's ``build_model_with_cfg`` for a family of this package.

    Published weights are found on this machine or fetched, see :func:`vmamba.weights.fetch`. Weights are read by timm
    without executing pickled code, converted by ``filter_fn`` and compared with the model before they are loaded.

    Args:
        model_cls: Makes the model.
        variant: Its registered name.
        pretrained: Whether to load weights.
        filter_fn: Turns published names and shapes into the model's.
        averaged: Whether, of a file that a user names and that holds averaged weights as well, ``filter_fn`` gets
            those alone, as timm has it; otherwise it gets the file's content.
        **kwargs: For ``build_model_with_cfg``.

    Raises:
        UserError: if published weights cannot be had.
        CheckpointError: if the weights cannot be read or do not fit.
    """
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    if overlay.get("url"):
        overlay.setdefault("hf_hub_id", None)  # which timm would prefer
    checkpoint = _published(variant, kwargs.get("pretrained_cfg"), overlay) if pretrained else None
    if checkpoint is not None:
        cache_dir = kwargs.get("cache_dir")
        overlay["file"] = str(fetch(checkpoint, Path(cache_dir) if cache_dir else None))
    strict = kwargs.get("pretrained_strict", True)
    features_only = kwargs.get("features_only", False)
    reading: list[nn.Module] = []  # the model, from when it is built to when its weights have been read

    def construct(**model_kwargs: Any) -> nn.Module:
        model = model_cls(**model_kwargs)
        if pretrained:
            reading.append(model)
        return model

    def convert(state_dict: Any, model: nn.Module) -> StateDict:
        reading.clear()
        try:
            if checkpoint is not None:
                state_dict = only(_content(model, state_dict), checkpoint.weights)
            elif not averaged:
                state_dict = _content(model, state_dict)
            converted = filter_fn(state_dict, model)
            if strict:
                check_fit(converted, model, _adapted_by_timm(model, features_only))
        except CheckpointError as error:
            raise CheckpointError(f"{_location(model)} for {variant}: {error}") from None
        return converted

    try:
        with torch.serialization.safe_globals(HARMLESS_TYPES):
            return build_model_with_cfg(
                construct,
                variant,
                pretrained,
                pretrained_cfg_overlay=overlay,
                pretrained_filter_fn=convert,
                **kwargs,
            )
    except Exception as error:
        if not reading:
            raise
        location = _location(reading[0])
        raise CheckpointError(f"{location} for {variant}: {why_unreadable(error, location)}") from error


def _published(variant: str, pretrained_cfg: Any, overlay: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint of the manifest that a model's configuration names, unless the caller names other weights."""
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    if cfg.source or cfg.file or cfg.state_dict:
        return None
    named = (checkpoint for checkpoint in checkpoints().values() if checkpoint.url == cfg.url)
    return next((checkpoint for checkpoint in named if cfg.hf_hub_id in (None, checkpoint.hub)), None)


def _adapted_by_timm(model: Any, features_only: bool) -> frozenset[str]:
    """The parameters that timm itself drops or converts where the request differs from the checkpoint."""
    cfg: Any = model.pretrained_cfg
    adapted: list[str] = []
    if features_only or model.num_classes != cfg["num_classes"]:
        adapted.append(cfg["classifier"])
    if model.in_chans != cfg["input_size"][0]:
        adapted.append(cfg["first_conv"])
    return frozenset(f"{module}.{kind}" for module in adapted for kind in ("weight", "bias"))


def _content(model: nn.Module, state_dict: Any) -> Any:
    """All that is in the file timm read ``state_dict`` from, if it was a local one with room for more."""
    cfg: Any = model.pretrained_cfg
    file = cfg.get("file")
    if not file or Path(file).suffix == ".safetensors":
        return state_dict
    return read(Path(file))


def _location(model: nn.Module) -> str:
    """Where the model's pretrained configuration says its weights are."""
    cfg: Any = getattr(model, "pretrained_cfg", {})
    if cfg.get("state_dict"):
        return "the given state dict"
    return str(cfg.get("file") or cfg.get("url") or cfg.get("hf_hub_id") or "the checkpoint")
