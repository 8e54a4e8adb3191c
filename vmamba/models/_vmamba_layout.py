"""How VMamba's code names and shapes the weights it saves; families built on that code publish them the same way."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vmamba.layers import ConvDownsample, ConvStem, PatchMerging, PatchStem
from vmamba.models._checkpoint import Names

JANUARY_2024_NAMES: Names = {
    r"^patch_embed\.proj\.": "patch_embed.0.",
    r"^patch_embed\.norm\.": "patch_embed.2.",
    r"\.ln_1\.": ".norm.",
    r"\.self_attention\.": ".op.",
    r"^norm\.": "classifier.norm.",
    r"^head\.": "classifier.head.",
}
"""The first release's names, as the later ones have them."""

NAMES: Names = {
    # Published stages end with their downsampling, ours begin with it.
    r"^layers\.(\d+)\.downsample\.": lambda match: f"stages.{int(match[1]) + 1}.downsample.",
    r"^layers\.(\d+)\.blocks\.": r"stages.\1.blocks.",
    r"\.op\.(in_proj|out_proj|out_norm)\.": r".mixer.\1.",
    r"\.op\.conv2d\.": ".mixer.conv.",
    r"\.op\.x_proj[_.]weight$": ".mixer.ssm.x_proj.weight",
    r"\.op\.dt_projs[_.](weight|bias)$": r".mixer.ssm.dt_\1",
    r"\.op\.A_logs$": ".mixer.ssm.A_log",
    r"\.op\.Ds$": ".mixer.ssm.D",
    r"^classifier\.norm\.": "norm.",
    r"^classifier\.head\.": "head.fc.",
}
"""What a hierarchical model with :class:`vmamba.layers.SS2D` as mixer calls the same weights. A family adds its own."""


_LAYERS: dict[type[nn.Module], Mapping[str, str]] = {
    PatchStem: {"0": "conv", "2": "norm"},
    ConvStem: {"0": "conv1", "2": "norm1", "5": "conv2", "7": "norm2"},
    PatchMerging: {"norm": "norm", "reduction": "reduction", "1": "norm", "2": "reduction"},
    ConvDownsample: {"1": "conv", "3": "norm"},
}
"""Stems and downsamplings were published as nn.Sequential: the index of each layer, by what it is here."""


def layer_names(model: Any) -> Names:
    """The names of the layers in the model's stem and downsamplings; for keys that went through :data:`NAMES`."""
    stem = _LAYERS[type(model.stem)]
    downsample = _LAYERS[type(model.stages[-1].downsample)]
    return {
        r"\.downsample\.(\w+)\.": lambda match: f".downsample.{downsample.get(match[1], match[1])}.",
        r"^patch_embed\.(\w+)\.": lambda match: f"stem.{stem.get(match[1], match[1])}.",
    }


def is_published(weights: Mapping[str, Tensor]) -> bool:
    """Whether weights are under published names, not under ours."""
    return any(key.startswith(("patch_embed.", "layers.")) for key in weights)


def scan_shape(key: str, value: Tensor) -> Tensor:
    """A scan's weight in our shape, by our name: published ones differ in how they join direction and channel."""
    if key.endswith(".ssm.x_proj.weight") and value.dim() == 3:
        return value.flatten(0, 1)
    joined = {"A_log": 2, "D": 1, "dt_weight": 2, "dt_bias": 1}.get(key.rpartition(".ssm.")[2])
    if value.dim() == joined and value.shape[0] % 4 == 0:
        return value.unflatten(0, (4, -1))
    return value
