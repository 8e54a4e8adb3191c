"""VMamba: Visual State Space Model (arXiv 2401.10166, NeurIPS 2024).

Two generations were released. The first ("vanilla", January 2024) has blocks of a gated scan with sixteen states and no
MLP; the second has one state, no gate and an MLP. Both scan the map along four routes: by rows, by columns, and both
reversed. The published weights are under the MIT licence (github.com/MzeroMiko/VMamba).
"""

from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from vmamba.layers import SS2D, ConvDownsample, ConvStem, GatedSS2D, Mlp, PatchMerging, PatchStem, PreNormBlock
from vmamba.models import _vmamba_layout
from vmamba.models._builder import build_model, imagenet_cfg, published_cfgs, published_top1
from vmamba.models._checkpoint import rename, unwrap
from vmamba.models._hierarchical import HierarchicalBackbone, make_stages
from vmamba.weights import aliases

__all__ = ["VMamba"]  # timm adds the entry points


class VMamba(HierarchicalBackbone):
    """VMamba with timm's interface; see :class:`HierarchicalBackbone` for the arguments not listed.

    Args:
        depths: Blocks per stage.
        embed_dim: Channels of the first stage; each stage doubles them.
        d_state: States per channel of the scans.
        ssm_ratio: Channels of the scans per channel of the map.
        mlp_ratio: Hidden channels of the MLPs per channel of the map; 0 for blocks without MLP.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        stem_layer: Called with (in_chans, embed_dim).
        downsample_layer: Called with (dim, out_dim), before each stage but the first.
        mixer_layer: Called with (dim, d_state, ssm_ratio).
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        embed_dim: int = 96,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        stem_layer: Any = ConvStem,
        downsample_layer: Any = ConvDownsample,
        mixer_layer: Any = SS2D,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [embed_dim * 2**i for i in range(len(depths))]

        def block(stage: int, drop_path: float) -> PreNormBlock:
            dim = dims[stage]
            mlp = Mlp(dim, int(dim * mlp_ratio), **dd) if mlp_ratio else None
            return PreNormBlock(dim, mixer_layer(dim, d_state, ssm_ratio, **dd), mlp, drop_path, **dd)

        stages = make_stages(depths, dims, drop_path_rate, block, partial(downsample_layer, **dd))
        stem = stem_layer(in_chans, embed_dim, **dd)
        super().__init__(stem, stages, in_chans=in_chans, num_classes=num_classes, **kwargs, **dd)


# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Turns a published checkpoint of any generation into this package's names and shapes; own ones pass unchanged.

    Args:
        state_dict: Weights under published or own names, bare or in their wrapper.
        model: The :class:`VMamba` they are for.
    """
    weights = unwrap(state_dict)
    if not _vmamba_layout.is_published(weights):
        return weights
    tables = (
        _vmamba_layout.JANUARY_2024_NAMES,
        _vmamba_layout.NAMES,
        _vmamba_layout.layer_names(model),
        {r"(\.blocks\.\d+)\.norm\.": r"\1.norm1."},
    )
    renamed = {rename(key, *tables): value for key, value in weights.items()}
    return {key: _own_shape(key, value) for key, value in renamed.items()}


def _own_shape(key: str, value: Tensor) -> Tensor:
    """Beside the scans, whose shapes differ, projections may be published as 1x1 kernels."""
    if value.dim() == 4 and value.shape[2:] == (1, 1) and key.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
        return value.flatten(1)
    return _vmamba_layout.scan_shape(key, value)


# ---------------------------------------------------------------------------------------------------------------------
# Pretrained configurations
# ---------------------------------------------------------------------------------------------------------------------

_cfg = partial(imagenet_cfg, first_conv="stem.conv1", license="apache-2.0")  # this package's own

PUBLISHED_TOP1 = published_top1("vanilla_vmamba_*") | published_top1("vmamba_*")
"""ImageNet-1K top-1 accuracy in percent at 224x224, as the authors published it."""

ALIASES = aliases()
"""Short names, with what they stand for."""

default_cfgs = generate_default_cfgs(
    {
        **published_cfgs("vanilla_vmamba_*", first_conv="stem.conv"),
        **published_cfgs("vmamba_*", first_conv="stem.conv1"),
        "vmamba_nano_32.untrained": _cfg(num_classes=10, input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0),
        "test_vmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
        "test_vanilla_vmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), first_conv="stem.conv"),
    }
)


# ---------------------------------------------------------------------------------------------------------------------
# Entry points
# ---------------------------------------------------------------------------------------------------------------------


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    return build_model(
        VMamba,
        variant,
        pretrained,
        checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(kwargs["depths"]))), "flatten_sequential": True},
        **kwargs,
    )


def _create_vanilla(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    first_generation = {
        "d_state": 16,
        "ssm_ratio": 2.0,
        "mlp_ratio": 0.0,
        "stem_layer": PatchStem,
        "downsample_layer": PatchMerging,
        "mixer_layer": GatedSS2D,
    }
    return _create_vmamba(variant, pretrained, **{**first_generation, **kwargs})


@register_model
def vanilla_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first generation's tiny model: 22.9 M parameters, 5.6 G, 82.2 % top-1."""
    model_args = {"depths": (2, 2, 9, 2), "embed_dim": 96}
    return _create_vanilla("vanilla_vmamba_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def vanilla_vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first generation's small model: 44.4 M parameters, 11.2 G, 83.5 % top-1."""
    model_args = {"depths": (2, 2, 27, 2), "embed_dim": 96}
    return _create_vanilla("vanilla_vmamba_small", pretrained, **{**model_args, **kwargs})


@register_model
def vanilla_vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first generation's base model: 76.3 M parameters, 18.0 G, 83.7 % top-1."""
    model_args = {"depths": (2, 2, 27, 2), "embed_dim": 128}
    return _create_vanilla("vanilla_vmamba_base", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Tiny, scans twice as wide as the map: 30.7 M parameters, 4.9 G, 82.5 % top-1."""
    model_args = {"depths": (2, 2, 5, 2), "embed_dim": 96, "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Small, scans twice as wide as the map: 50.1 M parameters, 8.7 G, 83.6 % top-1."""
    model_args = {"depths": (2, 2, 15, 2), "embed_dim": 96, "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_small_s2l15", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Base, scans twice as wide as the map: 88.6 M parameters, 15.4 G, 83.9 % top-1."""
    model_args = {"depths": (2, 2, 15, 2), "embed_dim": 128, "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_base_s2l15", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Tiny, scans as wide as the map: 30.2 M parameters, 4.9 G, 82.6 % top-1."""
    model_args = {"depths": (2, 2, 8, 2), "embed_dim": 96}
    return _create_vmamba("vmamba_tiny_s1l8", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Small, scans as wide as the map: 49.0 M parameters, 8.6 G, 83.3 % top-1."""
    model_args = {"depths": (2, 2, 20, 2), "embed_dim": 96}
    return _create_vmamba("vmamba_small_s1l20", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Base, scans as wide as the map: 86.6 M parameters, 15.2 G, 83.8 % top-1."""
    model_args = {"depths": (2, 2, 20, 2), "embed_dim": 128}
    return _create_vmamba("vmamba_base_s1l20", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The authors' VMamba-T: :func:`vmamba_tiny_s1l8`."""
    return vmamba_tiny_s1l8(pretrained, **kwargs)


@register_model
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The authors' VMamba-S: :func:`vmamba_small_s2l15`."""
    return vmamba_small_s2l15(pretrained, **kwargs)


@register_model
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The authors' VMamba-B: :func:`vmamba_base_s2l15`."""
    return vmamba_base_s2l15(pretrained, **kwargs)


@register_model
def vmamba_nano_32(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """For 32x32 images such as CIFAR's and for one CPU core: three stages behind a stem of stride 2. Not published."""
    small_stem = partial(ConvStem, strides=(2, 1))
    model_args = {"depths": (1, 2, 1), "embed_dim": 32, "mlp_ratio": 2.0, "stem_layer": small_stem}
    return _create_vmamba("vmamba_nano_32", pretrained, **{**model_args, **kwargs})


@register_model
def test_vmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:  # noqa: PT028
    """The second generation at the smallest size that still has every part, for tests."""
    model_args = {"depths": (1, 1, 1, 1), "embed_dim": 16}
    return _create_vmamba("test_vmamba", pretrained, **{**model_args, **kwargs})


@register_model
def test_vanilla_vmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:  # noqa: PT028
    """The first generation at the smallest size that still has every part, for tests."""
    model_args = {"depths": (1, 1, 1, 1), "embed_dim": 16, "d_state": 4}
    return _create_vanilla("test_vanilla_vmamba", pretrained, **{**model_args, **kwargs})
