"""Optimiser constructors: weight decay as published, and learning rates that fall towards the stem."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.models import group_parameters
from torch import nn

from vmamba.errors import UserError
from vmamba.layers import ConvDownsample, ConvStem, PatchStem, PositionalBlock, ResidualConvStem
from vmamba.models._backbone import Backbone
from vmamba.models.efficientvmamba import ConvBranch

NOT_CALLED_NORM: dict[type[nn.Module], tuple[str, ...]] = {
    # Published as nn.Sequential, where a norm's name is a number.
    PatchStem: ("norm",),
    ConvStem: ("norm1", "norm2"),
    ConvDownsample: ("norm",),
    ConvBranch: ("norm",),
    # Published as ln_1 and ln_2.
    PositionalBlock: ("norm1", "norm2"),
}
"""Norms whose published names do not say so, by the module they are part of."""

CALLED_NORM: dict[type[nn.Module], tuple[str, ...]] = {
    ResidualConvStem: ("conv1.bn", "conv2.0.bn", "conv2.1.bn", "conv3.0.bn", "conv3.1.bn"),
}
"""Norms whose published names say so, and whose names here do not."""


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PublishedDecayConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, where the key ``"norm"`` stands for what the published backbones call a norm.

    Published configs exempt parameters with "norm" in their names from weight decay. Not all norms of the published
    models have such names, so some decay; their names here are others. This brings both together: the same parameters
    decay that did when the published detectors and segmentors were trained.

    Args:
        optim_wrapper_cfg: See MMEngine.
        paramwise_cfg: See MMEngine; its ``custom_keys`` has a key ``"norm"``.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        keys: dict[str, Any] = self.paramwise_cfg["custom_keys"]
        for name, module in getattr(model, "module", model).named_modules():
            keys.update({f"{name}.{norm}.": {"decay_mult": 1.0} for norm in NOT_CALLED_NORM.get(type(module), ())})
            keys.update({f"{name}.{norm}.": keys["norm"] for norm in CALLED_NORM.get(type(module), ())})
        return super().__call__(model)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, with learning rates that fall by a factor from each layer to the one before.

    With n blocks, the stem and the position embedding learn at ``decay_rate ** (n + 1)`` of the rate, block i (from 0)
    at ``decay_rate ** (n - i)``; what is not the backbone's model, at the full rate. The layers are those of the
    model's ``group_matcher``, so it serves every family.

    Args:
        optim_wrapper_cfg: See MMEngine.
        paramwise_cfg: See MMEngine; ``decay_rate`` is the factor.

    Raises:
        UserError: for a detector or segmentor whose backbone is not of this package.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **kwargs: Any) -> None:
        super().add_params(params, module, prefix, **kwargs)
        if not prefix:  # the whole detector or segmentor, of which MMEngine visits the parts on its own
            self._scale(params, module)

    def _scale(self, groups: list[dict], detector: nn.Module) -> None:
        backbone: Any = next((module for module in detector.modules() if isinstance(module, Backbone)), None)
        if backbone is None:
            raise UserError(f"layer decay needs a backbone of this package, and {type(detector).__name__} has none")
        layers = group_parameters(backbone, backbone.group_matcher(), reverse=True)
        outside = max(layers.values()) + 1
        layer_of = {id(parameter): layers[name] for name, parameter in backbone.named_parameters()}
        for group in groups:
            (parameter,) = group["params"]
            factor = self.paramwise_cfg["decay_rate"] ** (outside - layer_of.get(id(parameter), outside))
            group["lr"] = group.get("lr", self.base_lr) * factor
