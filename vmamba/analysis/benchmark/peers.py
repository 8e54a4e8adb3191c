"""What others can do: short names of timm's models, and published accuracies."""

import sys
from dataclasses import dataclass
from fnmatch import fnmatch

import timm
from timm.models import is_model, model_entrypoint

import vmamba.models  # noqa: F401  (registers this package's models with timm)
from vmamba.errors import UserError, nearest


@dataclass(frozen=True)
class Peer:
    """A model of timm that vision Mambas are compared with.

    Attributes:
        name: timm's name.
        top1: ImageNet-1K top-1 accuracy in percent at 224x224, trained on ImageNet-1K, as the paper states it.
        paper: arXiv number.
    """

    name: str
    top1: float
    paper: str


PEERS = {
    "deit_tiny": Peer("deit_tiny_patch16_224", 72.2, "2012.12877"),
    "deit_small": Peer("deit_small_patch16_224", 79.8, "2012.12877"),
    "deit_base": Peer("deit_base_patch16_224", 81.8, "2012.12877"),
    "swin_tiny": Peer("swin_tiny_patch4_window7_224", 81.3, "2103.14030"),
    "swin_small": Peer("swin_small_patch4_window7_224", 83.0, "2103.14030"),
    "swin_base": Peer("swin_base_patch4_window7_224", 83.5, "2103.14030"),
    "convnext_tiny": Peer("convnext_tiny", 82.1, "2201.03545"),
    "convnext_small": Peer("convnext_small", 83.1, "2201.03545"),
    "convnext_base": Peer("convnext_base", 83.8, "2201.03545"),
    "mambaout_tiny": Peer("mambaout_tiny", 82.7, "2405.07992"),
    "mambaout_small": Peer("mambaout_small", 84.1, "2405.07992"),
    "mambaout_base": Peer("mambaout_base", 84.2, "2405.07992"),
}


def resolve(name: str) -> list[str]:
    """timm's names of what a user typed: a name, a short name of :data:`PEERS`, or a pattern such as ``vmamba_*``.

    Raises:
        UserError: Nothing is called that.
    """
    if name in PEERS:
        return [PEERS[name].name]
    if any(sign in name for sign in "*?["):
        matching = [known for known in timm.list_models() if fnmatch(known, name)]
        if matching:
            return matching
    elif is_model(name):
        return [name]
    raise UserError(f"unknown model '{name}'{nearest(name, [*timm.list_models(), *PEERS])}")


def published_top1(name: str) -> float | None:
    """ImageNet-1K top-1 accuracy in percent as published, of this package's models and of :data:`PEERS`."""
    peer = next((peer for peer in PEERS.values() if peer.name == name), None)
    if peer is not None:
        return peer.top1
    if not is_model(name):
        return None
    family = sys.modules[model_entrypoint(name).__module__]
    return getattr(family, "PUBLISHED_TOP1", {}).get(getattr(family, "ALIASES", {}).get(name, name))
