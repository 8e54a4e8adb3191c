"""Weights for the backbones: those of classifiers, and whole detectors and segmentors in their published layout.

Nothing is skipped in silence. A classifier gives up its head, and its last norm where the dense model has none; all
else must fit one to one.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from mmengine.logging import print_log
from torch import Tensor

from vmamba.errors import UserError, nearest
from vmamba.models._checkpoint import CheckpointError, StateDict, check_fit

if TYPE_CHECKING:
    from vmamba.mm.backbone import DenseBackbone

Source = str | bool
"""Where weights come from: True for the model's own, a name, a file or a URL."""


def pretrained_source(pretrained: Source | None, init_cfg: dict[str, Any] | None) -> Source | None:
    """Where to take weights from, given the two ways in which a config says so; None for nowhere.

    Raises:
        UserError: if they contradict each other, or ``init_cfg`` asks for something else.
    """
    said = None if pretrained in (None, False, "") else pretrained
    if isinstance(said, str) and said.lower() == "true":
        said = True
    if init_cfg is None:
        return said
    if init_cfg.get("type") != "Pretrained" or not init_cfg.get("checkpoint"):
        raise UserError(
            f"init_cfg {init_cfg}: expected dict(type='Pretrained', checkpoint=...), since every family brings its own "
            "initialisation"
        )
    if said is not None:
        raise UserError(f"both pretrained={pretrained!r} and init_cfg name weights; give one of them")
    return init_cfg["checkpoint"]


def load_pretrained(backbone: "DenseBackbone", source: Source) -> None:
    """Loads the weights of a classifier into the model of a backbone, and logs what it did in one line.

    Raises:
        CheckpointError: if the weights cannot be read, or are not the model's.
        UserError: if ``source`` is neither a file, a URL nor a name.
    """
    whole = backbone.create_model(pretrained=True, **_timm_arguments(source)).state_dict()
    own = backbone.model.state_dict()
    unused = sorted({f"{key.partition('.')[0]}.*" for key in whole if key not in own})
    backbone.model.load_state_dict({key: value for key, value in whole.items() if key in own}, strict=True)
    name = backbone.model_name if source is True else source
    print_log(
        f"loaded {len(own)}/{len(own)} tensors of {backbone.model_name} from {name}, "
        f"ignored {', '.join(['head.*', *unused])}",
        logger="current",
    )


def _timm_arguments(source: Source) -> dict[str, Any]:
    """What timm's ``create_model`` is told about where to find weights."""
    if source is True:
        return {}
    assert isinstance(source, str)
    if re.match(r"https?://", source):
        return {"pretrained_cfg_overlay": {"url": source}}
    if Path(source).is_file():
        return {"pretrained_cfg_overlay": {"file": source}}
    known = timm.list_pretrained()
    if source in known or timm.is_model_pretrained(source):
        return {"pretrained_cfg": timm.get_pretrained_cfg(source)}
    raise UserError(f"pretrained='{source}' is neither a file, a URL nor the name of weights{nearest(source, known)}")


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
