"""Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion (arXiv 2410.15091, ICLR 2025).

A single scan, row by row, gives the hidden states of all positions. Dilated convolutions then fuse each state with
those of its neighbours in the plane, and only the fused states are observed. Stem and downsampling are MLLA's.

The published code and weights are under the Apache-2.0 licence (github.com/EdwardChasel/Spatial-Mamba). Its evaluation
merges the kernels of the fusion once and never again, so there later training steps do not reach them; here they are
always the current ones.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from vmamba.layers import (
    DepthwiseConv2d,
    InvertedDownsample,
    Mlp,
    PositionalBlock,
    ResidualConvStem,
    ScanNorm,
    SelectiveSSM,
    dt_rank,
)
from vmamba.layers.ssm import kept_dtype
from vmamba.models import _mlla_layout
from vmamba.models._builder import build_model, imagenet_cfg, published_cfgs, published_top1
from vmamba.models._checkpoint import Names, rename, unwrap
from vmamba.models._hierarchical import HierarchicalBackbone, make_stages
from vmamba.models._vmamba_layout import is_published
from vmamba.ops import depthwise_conv, get_route, selective_scan
from vmamba.ops.positions import by_position

__all__ = ["SpatialMamba"]  # timm adds the entry points

DILATIONS = (1, 3, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Mixer
# ---------------------------------------------------------------------------------------------------------------------


@register_notrace_module  # whether autocast is on is a question for when it runs
class StateFusion(nn.Module):
    """A weighted sum of depthwise 3x3 convolutions of growing dilation, of a map (batch, height, width, dim).

    The map is continued beyond its border by its border's values; all other convolutions of the network continue theirs
    by zeros. It stays in the dtype of the states under autocast too: they may exceed float16.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.kernels = nn.Parameter(torch.empty(dim, len(DILATIONS), 3, 3, **dd))
        self.alpha = nn.Parameter(torch.empty(len(DILATIONS), **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All ones: the fusion starts as a plain sum of 27 samples."""
        self.kernels.fill_(1.0)
        self.alpha.fill_(1.0)

    def forward(self, states: Tensor) -> Tensor:
        dtype = torch.promote_types(states.dtype, torch.float32)
        kernels = self.alpha.view(1, -1, 1, 1).to(dtype) * self.kernels.to(dtype)
        with _without_autocast(states.device.type):
            scales = [
                depthwise_conv(states, kernel, padding=dilation, dilation=dilation, padding_mode="replicate")
                for kernel, dilation in zip(kernels.split(1, dim=1), DILATIONS, strict=True)
            ]
        return by_position(lambda *scales: scales[0] + scales[1] + scales[2], *scales)


def _without_autocast(device_type: str) -> AbstractContextManager:
    # There is no autocast to leave on the device that computes nothing.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


class StructureAwareSSM(SelectiveSSM):
    """A selective scan in raster order whose states are fused in the plane before C observes them.

    The parameters are those of :class:`SelectiveSSM` for one direction and one state, and those of the fusion.
    """

    def __init__(
        self, dim: int, rank: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(dim, rank, device=device, dtype=dtype)
        self.fusion = StateFusion(dim, device=device, dtype=dtype)

    def forward(self, u: Tensor) -> Tensor:  # type: ignore[override]
        """(batch, height, width, dim) to float32 of the same shape."""
        size = u.shape[1], u.shape[2]
        sequence = u.flatten(1, 2)
        dt, B, C = self.project(sequence)
        states = selective_scan(
            sequence,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            dt_weight=self.dt_weight,
            dt_bias=self.dt_bias,
            route=get_route("raster", *size, u.device),
            result="states",
            out_dtype=kept_dtype(sequence),
        )
        fused = self.fusion(states.flatten(1, 2).squeeze(-1).unflatten(1, size))
        # C observes the fused state, the skip passes the input by.
        C = C.squeeze(-1).unflatten(1, size)
        return by_position(lambda C, fused, u: C * fused + self.D * u, C, fused, u)


class SASSM(nn.Module):
    """The mixer: projection, depthwise convolution, SiLU, structure-aware scan, gate, projection.

    Maps (batch, height, width, dim) to the same shape.

    Args:
        dim: Channels of the map.
        ssm_ratio: Channels of the scan per channel of the map.
    """

    def __init__(
        self,
        dim: int,
        ssm_ratio: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        inner = int(dim * ssm_ratio)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = DepthwiseConv2d(inner, activation="silu", **dd)
        self.act = nn.SiLU()
        self.ssm = StructureAwareSSM(inner, dt_rank(dim), **dd)
        self.out_norm = ScanNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, z = by_position(lambda x: self.in_proj(x).chunk(2, dim=-1), x)
        u = self.conv(x)
        y = self.out_norm(self.ssm(u), u.dtype)
        return by_position(lambda y, z: self.out_proj(y * self.act(z)), y, z)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class SpatialMamba(HierarchicalBackbone):
    """Spatial-Mamba with timm's interface; see :class:`HierarchicalBackbone` for the arguments not listed.

    Args:
        depths: Blocks per stage.
        embed_dim: Channels of the first stage; each stage doubles them.
        ssm_ratio: Channels of the scans per channel of the map.
        mlp_ratio: Hidden channels of the MLPs per channel of the map.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        stem_layer: Called with (in_chans, embed_dim).
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: tuple[int, ...] = (2, 4, 8, 4),
        embed_dim: int = 64,
        ssm_ratio: float = 2.0,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        stem_layer: Any = ResidualConvStem,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [embed_dim * 2**i for i in range(len(depths))]

        def block(stage: int, drop_path: float) -> nn.Module:
            dim = dims[stage]
            return PositionalBlock(
                dim, SASSM(dim, ssm_ratio, **dd), Mlp(dim, int(dim * mlp_ratio), **dd), drop_path, **dd
            )

        stages = make_stages(depths, dims, drop_path_rate, block, partial(InvertedDownsample, **dd))
        stem = stem_layer(in_chans, embed_dim, **dd)
        super().__init__(stem, stages, in_chans=in_chans, num_classes=num_classes, **kwargs, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Beside the scans' skips also the biases of their step sizes, which this family has of one dimension."""
        biases = {f"{name}.dt_bias" for name, module in self.named_modules() if isinstance(module, SelectiveSSM)}
        return super().no_weight_decay() | biases


# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints
# ---------------------------------------------------------------------------------------------------------------------

_NAMES: Names = {
    r"\.ln_(\d)\.": r".norm\1.",
    r"\.self_attention\.(in_proj|out_norm|out_proj)\.": r".mixer.\1.",
    r"\.self_attention\.conv2d\.": ".mixer.conv.",
    r"\.self_attention\.x_proj_weight$": ".mixer.ssm.x_proj.weight",
    r"\.self_attention\.dt_projs_(weight|bias)$": r".mixer.ssm.dt_\1",
    r"\.self_attention\.A_logs$": ".mixer.ssm.A_log",
    r"\.self_attention\.Ds$": ".mixer.ssm.D",
    r"\.self_attention\.state_fusion\.alpha$": ".mixer.ssm.fusion.alpha",
    r"\.self_attention\.state_fusion\.kernel_3": ".mixer.ssm.fusion.kernels",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Turns a published checkpoint into this package's names and shapes; own ones pass unchanged.

    Args:
        state_dict: Weights under published or own names, bare or in their wrapper.
        model: The :class:`SpatialMamba` they are for.
    """
    weights = unwrap(state_dict)
    if not is_published(weights):
        return weights
    renamed = {rename(key, _mlla_layout.NAMES, _NAMES): value for key, value in weights.items()}
    for name in [key for key in renamed if key.endswith(".fusion.kernels")]:
        published = [name, f"{name}_1", f"{name}_2"]
        if all(key in renamed for key in published):
            renamed[name] = torch.cat([renamed.pop(key) for key in published], dim=1)
    # The only direction has no dimension of its own in published tensors.
    return {
        key: value.unsqueeze(0) if key.endswith((".dt_weight", ".dt_bias", ".A_log", ".ssm.D")) else value
        for key, value in renamed.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pretrained configurations
# ---------------------------------------------------------------------------------------------------------------------

_FIRST_CONV = "stem.conv1.conv"
_cfg = partial(imagenet_cfg, first_conv=_FIRST_CONV, license="apache-2.0")  # this package's own

PUBLISHED_TOP1 = published_top1("spatialmamba_*")
"""ImageNet-1K top-1 accuracy in percent at 224x224, as the authors published it."""

default_cfgs = generate_default_cfgs(
    {
        **published_cfgs("spatialmamba_*", first_conv=_FIRST_CONV),
        "spatialmamba_nano_32.untrained": _cfg(num_classes=10, input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0),
        "test_spatialmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    }
)


# ---------------------------------------------------------------------------------------------------------------------
# Entry points
# ---------------------------------------------------------------------------------------------------------------------


def _create_spatialmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    return build_model(
        SpatialMamba,
        variant,
        pretrained,
        checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(kwargs["depths"]))), "flatten_sequential": True},
        **kwargs,
    )


@register_model
def spatialmamba_tiny(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """Spatial-Mamba-T: 26.7 M parameters, 4.5 G, 83.5 % top-1."""
    model_args = {"depths": (2, 4, 8, 4), "embed_dim": 64}
    return _create_spatialmamba("spatialmamba_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def spatialmamba_small(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """Spatial-Mamba-S: 43.1 M parameters, 7.1 G, 84.6 % top-1."""
    model_args = {"depths": (2, 4, 21, 5), "embed_dim": 64}
    return _create_spatialmamba("spatialmamba_small", pretrained, **{**model_args, **kwargs})


@register_model
def spatialmamba_base(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """Spatial-Mamba-B: 95.7 M parameters, 15.8 G, 85.3 % top-1."""
    model_args = {"depths": (2, 4, 21, 5), "embed_dim": 96}
    return _create_spatialmamba("spatialmamba_base", pretrained, **{**model_args, **kwargs})


@register_model
def spatialmamba_nano_32(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """For 32x32 images such as CIFAR's and for one CPU core: three stages behind a stem of stride 2. Not published."""
    small_stem = partial(ResidualConvStem, strides=(2, 1))
    model_args = {"depths": (1, 2, 1), "embed_dim": 32, "mlp_ratio": 2.0, "stem_layer": small_stem}
    return _create_spatialmamba("spatialmamba_nano_32", pretrained, **{**model_args, **kwargs})


@register_model
def test_spatialmamba(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:  # noqa: PT028
    """The smallest size that still has every part, for tests."""
    model_args = {"depths": (1, 1, 1, 1), "embed_dim": 16}
    return _create_spatialmamba("test_spatialmamba", pretrained, **{**model_args, **kwargs})
