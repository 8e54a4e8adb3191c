"""Weights for the backbones: those of classifiers, and whole detectors and segmentors in their published layout.

Nothing is skipped in silence. A classifier gives up its head, and its last norm where the dense model has none; all
else must fit one to one.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from mmengine.logging import print_log
from torch import Tensor, nn

import vmamba.models  # noqa: F401  (registers the models)
from vmamba.errors import UserError, nearest
from vmamba.models._checkpoint import CheckpointError, StateDict, check_fit, read
from vmamba.weights import checkpoints, fetch

if TYPE_CHECKING:
    from vmamba.mm.backbone import DenseBackbone

Source = str | bool
"""Where weights come from: True for the model's own, a name, a file or a URL."""

InitCfg = dict[str, Any] | list[dict[str, Any]] | None
"""MMEngine's way to say it."""


def pretrained_source(pretrained: Source | None, init_cfg: InitCfg) -> Source | None:
    """Where to take weights from, given the two ways in which a config says so; None for nowhere.

    Raises:
        UserError: if they contradict each other, or ``init_cfg`` asks for something else.
    """
    said = None if pretrained in (None, False, "") else pretrained
    if isinstance(said, str) and said.lower() == "true":
        said = True
    if isinstance(init_cfg, list) and len(init_cfg) == 1:  # as MMEngine allows
        init_cfg = init_cfg[0]
    if init_cfg is None:
        return said
    if not isinstance(init_cfg, dict) or init_cfg.get("type") != "Pretrained" or not init_cfg.get("checkpoint"):
        raise UserError(
            f"init_cfg {init_cfg}: expected dict(type='Pretrained', checkpoint=...), since every family brings its own "
            "initialisation"
        )
    if said is not None:
        raise UserError(f"both pretrained={pretrained!r} and init_cfg name weights; give one of them")
    return init_cfg["checkpoint"]


def load_pretrained(backbone: "DenseBackbone", source: Source) -> None:
    """Loads weights into a backbone, and logs in one line what it did.

    Those of a classifier go into the model; those of a detector or segmentor with the same backbone into all of it.

    Raises:
        CheckpointError: if the weights cannot be read, or are not the backbone's.
        UserError: if ``source`` is neither a file, a URL nor a name.
    """
    dense = _dense_weights(backbone, source)
    if dense is None:
        target: nn.Module = backbone.model
        weights = backbone.create_model(pretrained=True, **_timm_arguments(source)).state_dict()
        own = target.state_dict()
        target.load_state_dict({key: value for key, value in weights.items() if key in own}, strict=True)
        ignored = ["head", *(key for key in weights if key not in own)]
    else:
        target = backbone
        target.load_state_dict(dense, strict=True)
        ignored = [key for key in dense if not key.startswith("backbone.")]
    count = len(target.state_dict())
    parts = ", ".join(sorted({f"{key.partition('.')[0]}.*" for key in ignored}))
    name = "its default weights" if source is True else source
    print_log(f"{backbone.model_name}: loaded {count}/{count} tensors of {name}, ignored {parts}", logger="current")


def _dense_weights(backbone: "DenseBackbone", source: Source) -> StateDict | None:
    """The weights of a detector or segmentor; None if it is a classifier's.

    Args:
        backbone: The backbone they are for.
        source: Where they come from.
    """
    path = Path(str(source))
    named = checkpoints().get(str(source))
    if not path.is_file():
        if named is None or named.task == "classification":
            return None
        path = fetch(named)
    content = read(path)
    weights = content.get("state_dict", content) if isinstance(content, dict) else {}
    dense = [r"model\.", backbone.own_parts, *([re.escape(backbone.model_prefix)] if backbone.model_prefix else [])]
    is_dense = re.compile(rf"backbone\.({'|'.join(dense)})")
    return weights if any(is_dense.match(key) for key in weights) else None


def _timm_arguments(source: Source) -> dict[str, Any]:
    """What timm's ``create_model`` is told about where to find the weights of a classifier."""
    if source is True:
        return {}
    assert isinstance(source, str)
    if re.match(r"https?://", source):
        return {"pretrained_cfg_overlay": {"url": source}}
    if Path(source).is_file():
        return {"pretrained_cfg_overlay": {"file": source}}
    models = registered()
    known = [name for name in timm.list_pretrained() if name.partition(".")[0] in models]
    if source in known or source in {name.partition(".")[0] for name in known}:
        return {"pretrained_cfg": timm.get_pretrained_cfg(source)}
    raise UserError(f"pretrained='{source}' is neither a file, a URL nor the name of weights{nearest(source, known)}")


def registered() -> list[str]:
    """The names of this package's models."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("vmamba.")]


def accept_published(backbone: "DenseBackbone", state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Turns what is about to be loaded into the backbone from a published layout into its own.

    It is called by ``load_state_dict`` of whatever the backbone is part of, also by MMEngine's, which reports what does
    not fit as a warning. A backbone that does not fit is an error here.

    Args:
        backbone: The backbone.
        state_dict: What is loaded; changed in place.
        prefix: What the backbone's names begin with.

    Raises:
        CheckpointError: if the weights are not those of the backbone.
    """
    found: StateDict = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    try:
        own = _own_layout(backbone, found)
        check_fit(own, backbone)
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint's backbone for {backbone.model_name}: {error}") from None
    state_dict.update({prefix + key: value for key, value in own.items()})


def _own_layout(backbone: "DenseBackbone", weights: StateDict) -> StateDict:
    """A backbone's weights in our layout, from that or from the published one."""
    if not weights:
        raise CheckpointError(
            "there is none: expected names that begin with 'backbone.'; a classifier's weights are for the backbone's "
            "argument pretrained"
        )
    if any(key.startswith("backbone.") for key in weights):
        weights = {key.removeprefix("backbone."): x for key, x in weights.items() if key.startswith("backbone.")}
    parts: StateDict = {}
    model: StateDict = {}
    for key, value in weights.items():
        if re.match(backbone.own_parts, key):
            parts[backbone.own_name(key)] = value
        else:
            model[key.removeprefix("model.").removeprefix(backbone.model_prefix)] = value
    converted: dict[str, Tensor] = backbone.filter_fn(model, backbone.model)
    return parts | {f"model.{key}": value for key, value in converted.items()}
