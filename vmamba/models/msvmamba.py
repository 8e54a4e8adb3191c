"""MSVMamba: Multi-Scale VMamba, Hierarchy in Hierarchy Visual State Space Model (arXiv 2405.14174, NeurIPS 2024).

One direction scans the map at full resolution; the three others scan a copy of half the resolution, one behind the
other in a single sequence whose state is never reset. A squeeze-and-excitation follows the scans, and the MLPs have a
depthwise convolution inside.

Two generations were released, and their weights are not interchangeable (there is no second version; "v2" is but the
name of the branch that holds the third):

====================  ==========================================  ==================================================
                      v1 (Nano, Micro, Tiny; May 2024)            v3 (Tiny, Small, Base; December 2024)
====================  ==========================================  ==================================================
stem, downsampling    4x4 patches, patch merging                  3x3 convolutions of stride 2
width of the scans    2C, gated                                   C, gated in Base only
norm of the scans     on each pass, before they are summed        on the sum
to full resolution    bilinear                                    nearest
MLP                   2C wide, behind its norm                    4C wide, before its norm
====================  ==========================================  ==================================================

The published code is at github.com/YuHengsss/MSVMamba (v3 on branch ``v2``), without a licence.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vmamba.layers import (
    ConvDownsample,
    ConvStem,
    DepthwiseConv2d,
    LayerNorm,
    PatchMerging,
    PatchStem,
    PreNormBlock,
    ScanNorm,
    SelectiveSSM,
    dt_rank,
)
from vmamba.models import _vmamba_layout
from vmamba.models._builder import build_model, imagenet_cfg, published_cfgs, published_top1
from vmamba.models._checkpoint import Names, rename, unwrap
from vmamba.models._hierarchical import HierarchicalBackbone, make_stages
from vmamba.ops import get_route, register_route
from vmamba.ops.positions import by_position, channels_first, channels_last
from vmamba.ops.routes import columns, raster, reverse
from vmamba.ops.selective_scan import Result

__all__ = ["MSVMamba"]  # timm adds the entry points

PASSES = 3


@register_route("three_passes")
def three_passes(grid: Tensor) -> Tensor:
    """Rows reversed, then columns, then columns reversed, as one sequence: (1, 3 * height * width).

    The walk never jumps further than from one line to the next: a pass begins where the last one ended.
    """
    by_columns = columns(grid)
    return torch.cat([reverse(raster(grid)), by_columns, reverse(by_columns)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Mixer
# ---------------------------------------------------------------------------------------------------------------------


class ConvScan(nn.Module):
    """Depthwise convolution, SiLU, and a scan along one route.

    Args:
        dim: Channels of the map.
        rank: Rank of the scan's step sizes.
        route: Name of a registered route of one direction.
        kernel_size: Side of the convolution.
        stride: Its stride; maps become 1/stride the size, rounded up.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        route: str,
        kernel_size: int,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.route = route
        self.conv = DepthwiseConv2d(dim, kernel_size, stride, activation="silu", **dd)
        self.ssm = SelectiveSSM(dim, rank, **dd)

    def forward(self, x: Tensor, result: Result = "merged") -> tuple[Tensor, tuple[int, int]]:
        """Scans a map (batch, height, width, dim).

        Returns:
            The result as :class:`SelectiveSSM` gives it, and the (height, width) that was scanned.
        """
        u = self.conv(x)
        size = u.shape[1], u.shape[2]
        return self.ssm(u.flatten(1, 2), get_route(self.route, *size, u.device), result), size


class MultiScaleScan(nn.Module):
    """What the generations share: a scan of the whole map, and one of three passes over its half-resolution copy.

    Both read the same map; the passes do not see what the other scan's convolution made of it.

    Args:
        dim: Channels of the map.
        rank: Rank of the scans' step sizes.
    """

    def __init__(
        self, dim: int, rank: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.full = ConvScan(dim, rank, "raster", kernel_size=3, **dd)
        self.low = ConvScan(dim, rank, "three_passes", kernel_size=7, stride=2, **dd)
        self.out_norm = ScanNorm(dim, **dd)


class PassNormedScan(MultiScaleScan):
    """v1: each pass has a norm of its own, all of the same weights; their sum is interpolated to full resolution."""

    low_first = True
    """Whether the published parameters of the half-resolution scan come before those of the other."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, dim) to the same shape and dtype."""
        full, size = self.full(x)
        passes, low_size = self.low(x, result="steps")
        full = self.out_norm(full, x.dtype).unflatten(1, size)
        # Normalised in scan order: a LayerNorm of channels does not mind where a position lies.
        low = _sum_passes(self.out_norm(passes.squeeze(1), x.dtype), low_size)
        return by_position(torch.add, full, _resize(low, size, mode="bilinear"))


class SumNormedScan(MultiScaleScan):
    """v3: one norm, of the sum of all directions at full resolution."""

    low_first = False

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, dim) to the same shape and dtype."""
        full, size = self.full(x)
        low, low_size = self.low(x)
        low = _resize(low.unflatten(1, low_size), size, mode="nearest")
        y = by_position(torch.add, full.unflatten(1, size), low)
        return self.out_norm(y, x.dtype)


def _sum_passes(steps: Tensor, size: tuple[int, int]) -> Tensor:
    """Steps of :func:`three_passes`, (batch, 3 * h * w, dim), summed at their positions: (batch, h, w, dim)."""
    height, width = size
    rows_reversed, by_columns, columns_reversed = steps.unflatten(1, (PASSES, -1)).unbind(1)
    by_rows = rows_reversed.flip(1).unflatten(1, (height, width))
    by_columns = (by_columns + columns_reversed.flip(1)).unflatten(1, (width, height))
    return by_rows + by_columns.transpose(1, 2)


def _resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """A map (batch, h, w, dim) interpolated to a size: not to twice its own, which an odd map would not have."""
    return channels_last(F.interpolate(channels_first(x), size=size, mode=mode))


class SqueezeExcite(nn.Module):
    """Scales the channels of a map (batch, height, width, dim) by what it holds on average."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.reduce = nn.Linear(dim, dim // 8, bias=False, **dd)
        self.act = nn.ReLU()
        self.expand = nn.Linear(dim // 8, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        average = x.mean((1, 2), keepdim=True)
        return by_position(torch.mul, x, self.expand(self.act(self.reduce(average))).sigmoid())


class MS2D(nn.Module):
    """The mixer: projection, scans of two resolutions, squeeze-and-excitation, projection.

    Maps (batch, height, width, dim) to the same shape.

    Args:
        dim: Channels of the map.
        ssm_ratio: Channels of the scans per channel of the map.
        scan_layer: The generation's :class:`MultiScaleScan`.
    """

    streams = 1

    def __init__(
        self,
        dim: int,
        ssm_ratio: float,
        scan_layer: type[MultiScaleScan],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        inner = int(dim * ssm_ratio)
        self.in_proj = nn.Linear(dim, self.streams * inner, bias=False, **dd)
        self.scan = scan_layer(inner, dt_rank(dim), **dd)
        self.se = SqueezeExcite(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return by_position(self.out_proj, self.se(self.scan(by_position(self.in_proj, x))))


class GatedMS2D(MS2D):
    """:class:`MS2D` whose result is gated."""

    streams = 2  # what is scanned, and its gate

    def forward(self, x: Tensor) -> Tensor:
        x, z = by_position(lambda x: self.in_proj(x).chunk(2, dim=-1), x)
        return by_position(lambda y, z: self.out_proj(y * F.silu(z)), self.se(self.scan(x)), z)


# ---------------------------------------------------------------------------------------------------------------------
# Block and model
# ---------------------------------------------------------------------------------------------------------------------


class ConvFFN(nn.Module):
    """An MLP with a depthwise 3x3 convolution, itself residual, before its GELU; (batch, height, width, dim).

    Args:
        dim: Channels of the map.
        hidden: Channels inside.
    """

    def __init__(
        self, dim: int, hidden: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.conv = DepthwiseConv2d(hidden, residual=True, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def reset_parameters(self) -> None:
        """Draws the linear layers as the 1x1 convolutions that published training had."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return by_position(lambda hidden: self.fc2(self.act(hidden)), self.conv(by_position(self.fc1, x)))


class PostNormFFNBlock(PreNormBlock):
    """v3's block: the second norm acts on what the MLP returns, and not on what it reads.

    Neither the paper nor the published options say so (a setting ``pre_norm`` is never read), but the weights are
    trained this way. The norm ends its branch, so under autocast its result is float32, as the stream it is added to.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, mixer, mlp, drop_path, device=device, dtype=dtype)
        self.norm2 = LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        assert self.mlp is not None
        x = self.mix_positions(x)
        return by_position(torch.add, x, self.drop_path(self.norm2(self.mlp(x))))


class MSVMamba(HierarchicalBackbone):
    """MSVMamba with timm's interface; see :class:`HierarchicalBackbone` for the arguments not listed.

    Args:
        depths: Blocks per stage.
        embed_dim: Channels of the first stage; each stage doubles them.
        ssm_ratio: Channels of the scans per channel of the map.
        mlp_ratio: Hidden channels of the MLPs per channel of the map.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        stem_layer: Called with (in_chans, embed_dim).
        downsample_layer: Called with (dim, out_dim), before each stage but the first.
        mixer_layer: Called with (dim, ssm_ratio, scan_layer).
        scan_layer: The generation's :class:`MultiScaleScan`.
        block_layer: Called with (dim, mixer, mlp, drop_path).
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: tuple[int, ...] = (2, 2, 9, 2),
        embed_dim: int = 96,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        stem_layer: Any = ConvStem,
        downsample_layer: Any = ConvDownsample,
        mixer_layer: Any = MS2D,
        scan_layer: Any = SumNormedScan,
        block_layer: Any = PostNormFFNBlock,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [embed_dim * 2**i for i in range(len(depths))]

        def block(stage: int, drop_path: float) -> nn.Module:
            dim = dims[stage]
            mlp = ConvFFN(dim, int(dim * mlp_ratio), **dd)
            return block_layer(dim, mixer_layer(dim, ssm_ratio, scan_layer, **dd), mlp, drop_path, **dd)

        stages = make_stages(depths, dims, drop_path_rate, block, partial(downsample_layer, **dd))
        stem = stem_layer(in_chans, embed_dim, **dd)
        super().__init__(stem, stages, in_chans=in_chans, num_classes=num_classes, **kwargs, **dd)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all parameters anew."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, ConvFFN):
                module.reset_parameters()


# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints
# ---------------------------------------------------------------------------------------------------------------------

_NAMES: Names = {
    r"(\.blocks\.\d+)\.norm\.": r"\1.norm1.",
    r"\.op\.conv2d_b1\.": ".mixer.scan.low.conv.",
    r"\.op\.conv2d\.": ".mixer.scan.full.conv.",
    r"\.op\.out_norm\.": ".mixer.scan.out_norm.",
    r"\.op\.se\.fc\.0\.": ".mixer.se.reduce.",
    r"\.op\.se\.fc\.2\.": ".mixer.se.expand.",
    r"\.convFFN\.linear1\.": ".mlp.fc1.",
    r"\.convFFN\.dwc\.": ".mlp.conv.",
    r"\.convFFN\.linear2\.": ".mlp.fc2.",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Turns a published checkpoint into this package's names and shapes; own ones pass unchanged.

    Args:
        state_dict: Weights under published or own names, bare or in their wrapper.
        model: The :class:`MSVMamba` they are for.
    """
    weights = unwrap(state_dict)
    if not _vmamba_layout.is_published(weights):
        return weights
    tables = (_vmamba_layout.JANUARY_2024_NAMES, _NAMES, _vmamba_layout.NAMES, _vmamba_layout.layer_names(model))
    renamed = {rename(key, *tables): value for key, value in weights.items()}
    low_first = model.stages[0].blocks[0].mixer.scan.low_first
    return {key: value for item in renamed.items() for key, value in _own_tensors(*item, low_first)}


def _own_tensors(key: str, value: Tensor, low_first: bool) -> Iterator[tuple[str, Tensor]]:
    """The parameters of both scans were published as one tensor each, linear layers of maps as 1x1 kernels."""
    name = re.search(r"\.mixer\.ssm\.(.*)", key)
    if name is None:
        is_kernel = value.dim() == 4 and key.endswith(("proj.weight", "fc1.weight", "fc2.weight"))
        yield key, value.flatten(1) if is_kernel else value
        return
    scans = ("low", "full") if low_first else ("full", "low")
    for scan, own in zip(scans, value.chunk(2), strict=False):
        if name[1] in ("A_log", "D"):
            own = own.unsqueeze(0)
        elif name[1] == "x_proj.weight":
            own = own.squeeze(0)
        yield key.replace(".mixer.ssm.", f".mixer.scan.{scan}.ssm."), own


# ---------------------------------------------------------------------------------------------------------------------
# Pretrained configurations
# ---------------------------------------------------------------------------------------------------------------------

_cfg = partial(imagenet_cfg, first_conv="stem.conv1", license="apache-2.0")  # this package's own

PUBLISHED_TOP1 = published_top1("msvmamba_*") | published_top1("msvmambav3_*")
"""ImageNet-1K top-1 accuracy in percent at 224x224, as the authors published it."""

default_cfgs = generate_default_cfgs(
    {
        **published_cfgs("msvmamba_*", first_conv="stem.conv"),
        **published_cfgs("msvmambav3_*", first_conv="stem.conv1"),
        "msvmambav3_nano_32.untrained": _cfg(num_classes=10, input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0),
        "test_msvmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), first_conv="stem.conv"),
        "test_msvmambav3.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    }
)


# ---------------------------------------------------------------------------------------------------------------------
# Entry points
# ---------------------------------------------------------------------------------------------------------------------


def _create_msvmambav3(variant: str, pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    return build_model(
        MSVMamba,
        variant,
        pretrained,
        checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(kwargs["depths"]))), "flatten_sequential": True},
        **kwargs,
    )


def _create_msvmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    first_generation = {
        "ssm_ratio": 2.0,
        "mlp_ratio": 2.0,
        "stem_layer": PatchStem,
        "downsample_layer": PatchMerging,
        "mixer_layer": GatedMS2D,
        "scan_layer": PassNormedScan,
        "block_layer": PreNormBlock,
    }
    return _create_msvmambav3(variant, pretrained, **{**first_generation, **kwargs})


@register_model
def msvmamba_nano(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-N: 6.9 M parameters, 0.9 G, 77.3 % top-1."""
    model_args = {"depths": (1, 2, 5, 2), "embed_dim": 48}
    return _create_msvmamba("msvmamba_nano", pretrained, **{**model_args, **kwargs})


@register_model
def msvmamba_micro(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-M: 11.9 M parameters, 1.5 G, 79.8 % top-1."""
    model_args = {"depths": (1, 2, 5, 2), "embed_dim": 64}
    return _create_msvmamba("msvmamba_micro", pretrained, **{**model_args, **kwargs})


@register_model
def msvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-T: 33.0 M parameters, 4.6 G, 82.8 % top-1."""
    model_args = {"depths": (1, 2, 9, 2), "embed_dim": 96}
    return _create_msvmamba("msvmamba_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def msvmambav3_tiny(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMambav3-T: 32.3 M parameters, 5.1 G (published as 5.0), 83.0 % top-1."""
    model_args = {"depths": (2, 2, 9, 2), "embed_dim": 96}
    return _create_msvmambav3("msvmambav3_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def msvmambav3_small(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMambav3-S: 50.2 M parameters, 8.8 G, 84.1 % top-1."""
    model_args = {"depths": (2, 3, 20, 2), "embed_dim": 96}
    return _create_msvmambav3("msvmambav3_small", pretrained, **{**model_args, **kwargs})


@register_model
def msvmambav3_base(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMambav3-B, the only gated one of its generation: 90.6 M parameters, 16.3 G, 84.4 % top-1."""
    model_args = {"depths": (2, 4, 18, 2), "embed_dim": 128, "mixer_layer": GatedMS2D}
    return _create_msvmambav3("msvmambav3_base", pretrained, **{**model_args, **kwargs})


@register_model
def msvmambav3_nano_32(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """For 32x32 images such as CIFAR's and for one CPU core: three stages behind a stem of stride 2. Not published."""
    small_stem = partial(ConvStem, strides=(2, 1))
    model_args = {"depths": (1, 2, 1), "embed_dim": 32, "mlp_ratio": 2.0, "stem_layer": small_stem}
    return _create_msvmambav3("msvmambav3_nano_32", pretrained, **{**model_args, **kwargs})


@register_model
def test_msvmamba(pretrained: bool = False, **kwargs: Any) -> MSVMamba:  # noqa: PT028
    """The first generation at the smallest size that still has every part, for tests."""
    model_args = {"depths": (1, 1, 1, 1), "embed_dim": 16}
    return _create_msvmamba("test_msvmamba", pretrained, **{**model_args, **kwargs})


@register_model
def test_msvmambav3(pretrained: bool = False, **kwargs: Any) -> MSVMamba:  # noqa: PT028
    """The third generation at the smallest size that still has every part, for tests."""
    model_args = {"depths": (1, 1, 1, 1), "embed_dim": 16}
    return _create_msvmambav3("test_msvmambav3", pretrained, **{**model_args, **kwargs})
