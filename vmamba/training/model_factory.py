"""From a model name or a checkpoint to a model, with errors a user can act on."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model
from torch import nn

import vmamba.models  # noqa: F401  (registers this package's models with timm)
from vmamba.errors import UserError, nearest
from vmamba.models._checkpoint import read, unwrap
from vmamba.training import checkpoint


@dataclass
class ModelRequest:
    """What is asked of timm's model factory.

    Args:
        name: A timm model name, with or without a tag.
        num_classes: Outputs of the classifier; the model's own if None.
        img_size: Side of the input; the model's own if None.
        kwargs: Further arguments of the model; those that are None are left out.
    """

    name: str
    num_classes: int | None = None
    img_size: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Arguments for ``timm.create_model`` besides the name."""
        arguments = {"num_classes": self.num_classes, **self.kwargs}
        # Only models that are built for one size take it as an argument; the others accept any image.
        if self.img_size is not None and default_cfg(self.name).fixed_input_size:
            arguments["img_size"] = self.img_size
        return {key: value for key, value in arguments.items() if value is not None}


@dataclass
class Classifier:
    """A model and what is needed to use it.

    Args:
        model: The model, on the CPU, in eval mode.
        name: Its timm name.
        preprocessing: timm's data configuration: input_size, mean, std, interpolation, crop_pct, crop_mode.
        class_names: Name of each output, where known.
        origin: Metadata of the run that trained it, empty otherwise.
    """

    model: nn.Module
    name: str
    preprocessing: dict[str, Any]
    class_names: list[str] | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        model: Any = self.model
        return model.num_classes


def default_cfg(name: str) -> PretrainedCfg:
    """timm's pretrained_cfg of a model name.

    Raises:
        UserError: No model, or no tag, of that name.
    """
    architecture = _architecture(name)
    if not is_model(architecture):
        raise UserError(f"unknown model '{name}'{nearest(architecture, timm.list_models())}")
    try:
        return get_pretrained_cfg(name) or PretrainedCfg()
    except RuntimeError as error:
        tagged = timm.list_models(f"{architecture}.*", pretrained=True)
        raise UserError(f"no weights are known as '{name}'{nearest(name, tagged)}") from error


def create(request: ModelRequest, pretrained: bool = False) -> nn.Module:
    """Build a model, with the published weights if asked for."""
    cfg = default_cfg(request.name)
    if pretrained and not cfg.has_weights:
        raise UserError(
            f"no published weights are known for '{request.name}'; leave --pretrained out, or give a file of weights"
        )
    try:
        return timm.create_model(request.name, pretrained=pretrained, **request.arguments())
    except UserError:
        raise
    except TypeError as error:
        raise UserError(f"model '{request.name}' cannot be built: {error}") from error
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        what = "the published weights of" if pretrained else "model"
        raise UserError(f"cannot get {what} '{request.name}': {' '.join(str(error).split())[:300]}") from error


def create_from(request: ModelRequest, path: Path) -> nn.Module:
    """Build the model that is asked for and load a file into it strictly, whatever the number of its classes.

    Args:
        request: The model; the weights may be another's, where its family converts them, as Vim's filter resizes
            position embeddings.
        path: ``best.pth`` or ``last.pth`` of a run, or weights in the published layout or timm's.

    Returns:
        The model, with as many outputs as the file's classifier has.
    """
    content = _read(path)
    weights, whose = content, str(path)
    if checkpoint.is_own(content, path):
        weights, whose = _best_weights(content), f"{path} (weights of '{content['arch']}')"
    model: Any = create(request)
    try:
        weights = _layout_filter(request.name)(weights, model)
    except UserError as error:
        raise UserError(f"{whose} {error}") from error
    except (KeyError, ValueError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"{whose} does not fit '{request.name}': {type(error).__name__}: {error}") from error
    head = weights.get(f"{default_cfg(request.name).classifier}.weight")
    if head is not None and len(head) != model.num_classes:
        if request.num_classes is not None:
            raise UserError(f"{whose} has a classifier of {len(head)} classes, not {request.num_classes}")
        model.reset_classifier(len(head))
    checkpoint.load_weights(model, weights, whose)
    return model


def _layout_filter(name: str) -> Callable[[Any, nn.Module], dict[str, torch.Tensor]]:
    """What turns the content of a file into the weights of a model: the family's filter, if it has one."""
    family = sys.modules[timm.model_entrypoint(_architecture(name)).__module__]
    own_filter: Any = getattr(family, "checkpoint_filter_fn", None)
    if family.__name__.startswith("vmamba."):
        return own_filter
    # timm's expect the weights themselves.
    return lambda content, model: own_filter(unwrap(content), model) if own_filter else unwrap(content)


def _read(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return checkpoint.read(path)
    checkpoint.check_readable(path)
    return read(path)


def _best_weights(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The rule of timm: the averaged weights, where a file has them."""
    return content.get("state_dict_ema") or content["state_dict"]


def load_classifier(path: Path, request: ModelRequest | None = None) -> Classifier:
    """Restore a model from a checkpoint of ours, or from a file in another layout if a model is named.

    Args:
        path: ``best.pth`` or ``last.pth`` of a run, or published weights.
        request: The model; may be None for files of ours, which know it.
    """
    content = _read(path)
    if checkpoint.is_own(content, path):
        return _restore(content, path, request)
    if request is None:
        raise UserError(f"{path} does not say which model it belongs to; name it with --model")
    model = create_from(request, path)
    return Classifier(model.eval(), request.name, preprocessing(model, img_size=request.img_size))


def _restore(content: dict[str, Any], path: Path, request: ModelRequest | None) -> Classifier:
    name = content["arch"]
    if request is not None and _architecture(request.name) != _architecture(name):
        raise UserError(f"{path} holds weights of '{name}', not of '{request.name}'")
    model = create(ModelRequest(name, kwargs=content["model_args"]))
    checkpoint.load_weights(model, _best_weights(content), str(path))
    values = {
        key: tuple(value) if isinstance(value, list) else value for key, value in content["preprocessing"].items()
    }
    return Classifier(model.eval(), name, values, content["class_names"], content["dataset"])


def _architecture(name: str) -> str:
    return name.partition(".")[0]


def preprocessing(model: nn.Module, **overrides: Any) -> dict[str, Any]:
    """timm's data configuration of a model; overrides that are None do not count."""
    return resolve_data_config({key: value for key, value in overrides.items() if value is not None}, model=model)
