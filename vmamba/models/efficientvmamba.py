"""EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba (arXiv 2403.09977, AAAI 2025).

The early stages scan every second row and column: four routes, one for each position of a 2x2 cell, which together
visit the map once. A convolution runs beside the scan. The late stages are inverted residuals. The README of the
published code and the pages of its weights say Apache-2.0; the licence file itself is missing
(github.com/TerryPei/EfficientVMamba).
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from timm.models._efficientnet_blocks import InvertedResidual as TimmInvertedResidual
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from vmamba.layers import ConvStem, DepthwiseConv2d, GatedSS2D, PatchMerging, PatchStem
from vmamba.models import _vmamba_layout
from vmamba.models._builder import build_model, imagenet_cfg, published_cfgs, published_top1
from vmamba.models._checkpoint import Names, rename, unwrap
from vmamba.models._hierarchical import HierarchicalBackbone, make_stages
from vmamba.ops import DECAY_ONLY, register_route
from vmamba.ops.positions import by_position, channels_first, channels_last

__all__ = ["EfficientVMamba"]  # timm adds the entry points


@register_route("atrous")
def atrous(grid: Tensor) -> Tensor:
    """Every second position, from each corner of the first 2x2 cell: (4, ceil(height / 2) * ceil(width / 2)).

    Directions 0 and 2 take the even rows row by row, 1 and 3 the odd rows column by column; 0 and 1 the even columns,
    2 and 3 the odd ones. All run forward. Where an odd side cuts a cell, the missing positions are steps that only
    decay: published models pad the map with zeros there. (The offsets of the paper's closed formula do not make up
    all four phases; these are the code's.)
    """
    height, width = grid.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    cells = F.pad(grid, (0, 2 * columns - width, 0, 2 * rows - height), value=DECAY_ONLY)
    cells = cells.view(rows, 2, columns, 2)
    phases = [cells[:, 0, :, 0], cells[:, 1, :, 0].t(), cells[:, 0, :, 1], cells[:, 1, :, 1].t()]
    return torch.stack([phase.reshape(-1) for phase in phases])


class ChannelGate(nn.Module):
    """Scales the channels of a map (batch, height, width, dim) by what it holds on average.

    The average is that of the normalised map, what is scaled is the map itself.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.reduce = nn.Linear(dim, dim // 8, **dd)
        self.act = nn.GELU()
        self.expand = nn.Linear(dim // 8, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        # The norm is per position: it does not commute with the average.
        average = by_position(self.norm, x).mean((1, 2), keepdim=True)
        return by_position(torch.mul, x, self.expand(self.act(self.reduce(average))).sigmoid())


class ConvBranch(nn.Module):
    """Depthwise 3x3 convolution, batch norm, GELU, pointwise convolution, on (batch, height, width, dim)."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv_dw = DepthwiseConv2d(dim, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU()
        self.conv_pw = nn.Conv2d(dim, dim, kernel_size=1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_first(self.conv_dw(x))
        return channels_last(self.conv_pw(self.act(self.norm(x))))


class EVSSBlock(nn.Module):
    """Residual block of the early stages: scan and convolution of the same normalised map, both gated, and added.

    Maps (batch, height, width, dim) to the same shape.

    Args:
        dim: Channels of the map.
        d_state: States per channel of the scan.
        ssm_ratio: Channels of the scan per channel of the map.
        drop_path: Probability of dropping the branches, per image.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.mixer = GatedSS2D(dim, d_state, ssm_ratio, route="atrous", **dd)
        self.conv_branch = ConvBranch(dim, **dd)
        self.gate = ChannelGate(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shared = by_position(self.norm, x)
        # One gate, two calls: each branch is scaled by its own average.
        scanned, convolved = self.gate(self.mixer(shared)), self.gate(self.conv_branch(shared))
        return by_position(lambda x, y, z: x + self.drop_path(y + z), x, scanned, convolved)


@register_notrace_module
class ChannelsFirstDepthwiseConv(DepthwiseConv2d):
    """:class:`DepthwiseConv2d` of maps (batch, dim, height, width) that lie channels last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(super().forward(channels_last(x)))


class InvertedResidual(TimmInvertedResidual):
    """Residual block of the late stages, MobileNet's with squeeze-and-excitation, on (batch, height, width, dim).

    Args:
        dim: Channels of the map.
        drop_path: Probability of dropping the branch, per image.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        squeeze_excite: Any = partial(SqueezeExcite, rd_ratio=0.125)
        super().__init__(
            dim, dim, exp_ratio=4.0, se_layer=squeeze_excite, drop_path_rate=drop_path, device=device, dtype=dtype
        )
        self.conv_dw = ChannelsFirstDepthwiseConv(self.conv_dw.in_channels, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(super().forward(channels_first(x)))


class EfficientVMamba(HierarchicalBackbone):
    """EfficientVMamba with timm's interface; see :class:`HierarchicalBackbone` for the arguments not listed.

    Args:
        depths: Blocks per stage.
        embed_dim: Channels of the first stage; each stage doubles them.
        scan_stages: How many of the stages, the first ones, scan; the others are inverted residuals.
        d_state: States per channel of the scans.
        ssm_ratio: Channels of the scans per channel of the map.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        stem_layer: Called with (in_chans, embed_dim).
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: tuple[int, ...] = (2, 2, 4, 2),
        embed_dim: int = 48,
        scan_stages: int = 2,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
        stem_layer: Any = PatchStem,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [embed_dim * 2**i for i in range(len(depths))]

        def block(stage: int, drop_path: float) -> nn.Module:
            if stage < scan_stages:
                return EVSSBlock(dims[stage], d_state, ssm_ratio, drop_path, **dd)
            return InvertedResidual(dims[stage], drop_path, **dd)

        stages = make_stages(depths, dims, drop_path_rate, block, partial(PatchMerging, **dd))
        stem = stem_layer(in_chans, embed_dim, **dd)
        super().__init__(stem, stages, in_chans=in_chans, num_classes=num_classes, **kwargs, **dd)


# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints
# ---------------------------------------------------------------------------------------------------------------------

_NAMES: Names = {
    # Stages of inverted residuals were published as one sequence: a change of layout, the blocks, the change back, and
    # the downsampling. So blocks count from 1.
    r"^layers\.(\d+)\.\d+\.(reduction|norm)\.": lambda match: f"stages.{int(match[1]) + 1}.downsample.{match[2]}.",
    r"^layers\.(\d+)\.(\d+)\.": lambda match: f"stages.{match[1]}.blocks.{int(match[2]) - 1}.",
    r"\.conv_pw\.0\.": ".conv_pw.",
    r"\.conv_pw\.1\.": ".bn1.",
    r"\.conv_dw\.0\.": ".conv_dw.",
    r"\.conv_dw\.1\.": ".bn2.",
    r"\.conv_pw2\.0\.": ".conv_pwl.",
    r"\.conv_pw2\.1\.": ".bn3.",
    r"\.conv_branch\.0\.": ".conv_branch.conv_dw.",
    r"\.conv_branch\.1\.": ".conv_branch.norm.",
    r"\.conv_branch\.3\.": ".conv_branch.conv_pw.",
    r"\.se\.norm\.": ".gate.norm.",
    r"\.se\.global_reduce\.": ".gate.reduce.",
    r"\.se\.channel_select\.": ".gate.expand.",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Turns a published checkpoint into this package's names and shapes; own ones pass unchanged.

    Args:
        state_dict: Weights under published or own names, bare or in their wrapper.
        model: The :class:`EfficientVMamba` they are for.
    """
    weights = unwrap(state_dict)
    if not _vmamba_layout.is_published(weights):
        return weights
    tables = _vmamba_layout.JANUARY_2024_NAMES, _vmamba_layout.NAMES, _NAMES, _vmamba_layout.layer_names(model)
    renamed = {rename(key, *tables): value for key, value in weights.items()}
    return {key: _vmamba_layout.scan_shape(key, value) for key, value in renamed.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Pretrained configurations
# ---------------------------------------------------------------------------------------------------------------------

_cfg = partial(imagenet_cfg, first_conv="stem.conv", license="apache-2.0")  # this package's own

PUBLISHED_TOP1 = published_top1("efficientvmamba_*")
"""ImageNet-1K top-1 accuracy in percent at 224x224, as the authors published it."""

default_cfgs = generate_default_cfgs(
    {
        **published_cfgs("efficientvmamba_*", first_conv="stem.conv"),
        "efficientvmamba_nano_32.untrained": _cfg(
            num_classes=10, input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0, first_conv="stem.conv1"
        ),
        "test_efficientvmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    }
)


# ---------------------------------------------------------------------------------------------------------------------
# Entry points
# ---------------------------------------------------------------------------------------------------------------------


def _create_efficientvmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    return build_model(
        EfficientVMamba,
        variant,
        pretrained,
        checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(kwargs["depths"]))), "flatten_sequential": True},
        **kwargs,
    )


@register_model
def efficientvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-T: 6.5 M parameters, 0.8 G, 76.5 % top-1."""
    model_args = {"depths": (2, 2, 4, 2), "embed_dim": 48}
    return _create_efficientvmamba("efficientvmamba_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def efficientvmamba_small(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-S: 11.3 M parameters, 1.3 G, 78.7 % top-1.

    It is 64 channels wide, as its weights and training log are, and not 96 as the paper's table and the published
    configurations say.
    """
    model_args = {"depths": (2, 2, 4, 2), "embed_dim": 64}
    return _create_efficientvmamba("efficientvmamba_small", pretrained, **{**model_args, **kwargs})


@register_model
def efficientvmamba_base(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-B: 33.7 M parameters, 4.0 G, 81.8 % top-1."""
    model_args = {"depths": (2, 2, 9, 2), "embed_dim": 96}
    return _create_efficientvmamba("efficientvmamba_base", pretrained, **{**model_args, **kwargs})


@register_model
def efficientvmamba_nano_32(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """For 32x32 images and one CPU core: two scanning stages and one of convolutions. Not published."""
    small_stem = partial(ConvStem, strides=(2, 1))
    model_args = {"depths": (1, 2, 1), "embed_dim": 32, "d_state": 4, "stem_layer": small_stem}
    return _create_efficientvmamba("efficientvmamba_nano_32", pretrained, **{**model_args, **kwargs})


@register_model
def test_efficientvmamba(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:  # noqa: PT028
    """The smallest size that still has every part, for tests."""
    model_args = {"depths": (1, 1, 1, 1), "embed_dim": 16, "d_state": 4}
    return _create_efficientvmamba("test_efficientvmamba", pretrained, **{**model_args, **kwargs})
