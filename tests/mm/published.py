"""Every dense backbone whose numbers were published: how it is built here, and its published layout."""

from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.registry import MODELS

import vmamba.mm  # noqa: F401  (registers the backbones)
from tests.models.golden import golden, variants, weights

CLASSIFIER = ("classifier.", "head.", "norm.", "backbone.ln1.")
"""What a classifier has and the dense model of its family has not."""

EXTRA = ("backbone_state_dict_extra", "extra_state_dict", "backbone_extra", "backbone_extra_state_dict")
"""What golden files call the tensors that only the dense model has."""


@dataclass(frozen=True)
class Published:
    """A published backbone.

    Attributes:
        family: Folder of its golden file.
        variant: Name of its golden file.
        config: How to build it, as in a config.
    """

    family: str
    variant: str
    config: dict[str, Any] = field(hash=False)

    @property
    def data(self) -> dict:
        return golden(self.family, self.variant)

    @property
    def layout(self) -> list:
        """Published keys, shapes and dtypes, without ``backbone.``"""
        data = self.data
        entries = [entry for entry in data["state_dict"] if "dense" in self.family or not _of_classifier(entry[0])]
        entries += [entry for name in EXTRA for entry in data.get(name, [])]
        return entries

    def build(self, **kwargs: Any):
        return MODELS.build({**self.config, **kwargs})


def _of_classifier(key: str) -> bool:
    return key.startswith(CLASSIFIER)


def without_prefix(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("backbone."): value for key, value in weights.items()}


HIERARCHICAL = [
    Published(family, variant, {"type": "MambaBackbone", "model_name": variant})
    for family in ("vmamba", "efficientvmamba", "msvmamba", "spatialmamba")
    for variant in variants(family)
]

_AS_PUBLISHED = {"rope": True, "average": False}
_SEG_SMALL = {"out_indices": (6, 12, 18, 23), "feature": ("residual", "residual", "residual", "sum"), **_AS_PUBLISHED}


def _vim(kind: str, variant: str, size: str, img_size: int, **kwargs: Any) -> Published:
    config = {"type": f"Vim{kind}Backbone", "model_name": f"vim_{size}_patch16_224", "img_size": img_size, **kwargs}
    return Published("dense/vim", variant, config)


VIM = [
    _vim("Seg", "vim_seg_tiny", "tiny", 512, feature="hidden"),
    _vim("Seg", "vim_seg_small", "small", 512, **_SEG_SMALL),
    _vim("Seg", "vim_seg_small@128x128", "small", 128, **_SEG_SMALL),
    _vim("Det", "vim_det_tiny", "tiny", 1024, **_AS_PUBLISHED),
    _vim("Det", "vim_det_tiny@192x192", "tiny", 192, **_AS_PUBLISHED),
    _vim("Det", "vim_det_small", "small", 1024, **_AS_PUBLISHED),
    _vim("Det", "vim_det_base", "base", 1024, **_AS_PUBLISHED),
]

_INDICES = {"l1": (5, 11, 17, 23), "l2": (5, 11, 17, 23), "l3": (8, 17, 26, 35)}
PLAINMAMBA_SEG = [
    Published(
        "dense/plainmamba",
        f"plainmamba_seg_{size}",
        {"type": "PlainMambaSegBackbone", "model_name": f"plainmamba_{size}", "out_indices": indices},
    )
    for size, indices in _INDICES.items()
]
PLAINMAMBA_ADAPTER = [
    Published(
        "dense/plainmamba",
        f"plainmamba_adapter_{size}",
        {"type": "PlainMambaAdapter", "model_name": f"plainmamba_{size}"},
    )
    for size in _INDICES
]


def published_weights(published: Published) -> dict[str, torch.Tensor]:
    """The tensors of its layout, filled by the recipe, without ``backbone.``"""
    return without_prefix(weights(published.layout))
