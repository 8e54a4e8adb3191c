"""PlainMamba: Improving Non-hierarchical Mamba in Visual Recognition (arXiv 2403.17695, BMVC 2024).

One width and one scale throughout. Four snakes scan the map, by rows and by columns, each way, so that every step goes
to a neighbour, and B is told by which move the step arrived. The weights were published under Apache-2.0
(github.com/ChenhongyiYang/PlainMamba).

The published weights need the published scan, which is not what the paper describes:

- only the input follows the snakes; step sizes, B and C are read in raster order, at step t those of position t;
- the bias of the step sizes is added twice, once by the projection and once by the scan;
- the skip is added by each direction, so four times.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, named_apply, register_model
from torch import Tensor, nn

from vmamba.layers import ConvNormAct, DepthwiseConv2d, PreNormBlock, SelectiveSSM, dt_rank, init_weights
from vmamba.models._builder import build_model, imagenet_cfg, published_cfgs, published_top1
from vmamba.models._checkpoint import Names, rename, unwrap
from vmamba.models._plain import PlainBackbone, fit_pos_embed, square_map
from vmamba.ops import get_route, grid_table, register_route, reverse, selective_scan
from vmamba.ops.positions import by_position, channels_first, channels_last
from vmamba.ops.routes import raster

__all__ = ["PlainMamba"]  # timm adds the entry points

DIRECTIONS = 4
MOVES = 5
"""Ways to arrive at a position: as the first of all, or by going right, left, up or down."""


@register_route("snake")
def snake(grid: Tensor) -> Tensor:
    """Rows from the top left, every other one backwards; that reversed; columns likewise; that reversed: (4, H * W).

    Consecutive positions are neighbours.
    """
    rows, columns = _snake_rows(grid), _snake_rows(grid.t())
    return torch.stack([rows, reverse(rows), columns, reverse(columns)])


def _snake_rows(grid: Tensor) -> Tensor:
    odd = torch.arange(grid.shape[0], device=grid.device).unsqueeze(1) % 2 == 1
    return torch.where(odd, grid.flip(1), grid).reshape(-1)


@grid_table
def arriving_moves(grid: Tensor) -> Tensor:
    """The move that led to each step of :func:`snake`: 0 at the start, 1 right, 2 left, 3 up, 4 down; (4, H * W)."""
    route, width = snake(grid), grid.shape[1]
    down = (route // width).diff()
    right = (route % width).diff()
    moves = (right > 0) * 1 + (right < 0) * 2 + (down < 0) * 3 + (down > 0) * 4
    return F.pad(moves, (1, 0))


@grid_table
def raster_for_all(grid: Tensor) -> Tensor:
    """Row by row from the top left, in each of the four directions: (4, H * W)."""
    return raster(grid).repeat(DIRECTIONS, 1)


class SnakeMixer(nn.Module):
    """PlainMamba's mixer: projection, 7x7 depthwise convolution, SiLU, scan along four snakes, gate, projection.

    Maps (batch, height, width, dim) to the same shape. One set of parameters serves all directions, but for
    ``direction_B`` (5, d_state): a row for each of the :func:`arriving_moves`, added to B before it is discretised.

    Args:
        dim: Channels of the map.
        d_state: States per channel of the scan.
        ssm_ratio: Channels of the scan per channel of the map.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        inner = int(dim * ssm_ratio)
        self.in_proj = nn.Linear(dim, 2 * inner, **dd)
        self.conv = DepthwiseConv2d(inner, kernel_size=7, activation="silu", **dd)
        self.act = nn.SiLU()
        self.ssm = SelectiveSSM(inner, dt_rank(dim), d_state, **dd)
        self.direction_B = nn.Parameter(torch.empty(MOVES, d_state, **dd))
        self.out_proj = nn.Linear(inner, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The scan's parameters as published training starts them.

        It draws the step sizes' projection like any other and zeroes its bias, so that steps start near softplus(0) and
        not at Mamba's 0.001 to 0.1.
        """
        for weight in (self.ssm.x_proj.weight, self.ssm.dt_weight, self.direction_B):
            trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.ssm.dt_bias)

    def scan(self, u: Tensor) -> Tensor:
        """The scan of ``u`` (batch, height, width, inner), summed over directions: float32 of the same shape."""
        height, width = u.shape[1], u.shape[2]
        flat = u.flatten(1, 2)
        dt, B, C = self.ssm.project(flat)
        moves = arriving_moves(height, width, u.device)
        # Raster order for the parameters and the bias twice: as published, see the top of this file.
        y = selective_scan(
            flat,
            dt,
            -torch.exp(self.ssm.A_log.float()),
            B + F.embedding(moves.t(), self.direction_B.to(B.dtype)),
            C,
            self.ssm.D,
            dt_weight=self.ssm.dt_weight,
            dt_bias=2 * self.ssm.dt_bias,
            route=get_route("snake", height, width, u.device),
            param_route=raster_for_all(height, width, u.device),
        )
        return y.unflatten(1, (height, width))

    def forward(self, x: Tensor) -> Tensor:
        x, z = by_position(lambda x: self.in_proj(x).chunk(2, dim=-1), x)
        y = self.scan(self.conv(x))
        # The gate acts in the scan's float32: no norm follows that would bring large sums back into float16's range.
        return by_position(lambda y, z: self.out_proj((y * self.act(z)).to(z.dtype)), y, z)


class ConvTailBlock(PreNormBlock):
    """A block with a depthwise 3x3 convolution, batch norm and GELU behind it, without a residual around them.

    Args:
        dim: Channels of the map (batch, height, width, dim).
        mixer: The block's mixer.
        drop_path: Probability of dropping the mixer, per image.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, mixer, drop_path=drop_path, **dd)
        self.tail = ConvNormAct(dim, dim, 3, groups=dim, act=nn.GELU(), **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return channels_last(self.tail(channels_first(x)))


class ConvPatchStem(nn.Module):
    """Convolutions at half resolution, then patches: (batch, C, H, W) to (batch, height, width, dim).

    The map of half resolution is padded with zeros, below and at the right, to whole patches.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the map.
        convs: 3x3 convolutions after the first one, which is 7x7 with stride 2.
        patch_size: Side of the patches, on the map of half resolution.
    """

    hidden = 64

    def __init__(
        self,
        in_chans: int,
        dim: int,
        convs: int = 1,
        patch_size: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.patch_size = patch_size
        self.reduction = 2 * patch_size
        self.convs = nn.Sequential(
            ConvNormAct(in_chans, self.hidden, 7, stride=2, act=nn.ReLU(inplace=True), **dd),
            *(ConvNormAct(self.hidden, self.hidden, 3, act=nn.ReLU(inplace=True), **dd) for _ in range(convs)),
        )
        self.proj = nn.Conv2d(self.hidden, dim, kernel_size=patch_size, stride=patch_size, **dd)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Patches of an image of height x width, by rows and columns."""
        return self._patches((height + 1) // 2), self._patches((width + 1) // 2)

    def _patches(self, side: int) -> int:
        return (side + self.patch_size - 1) // self.patch_size

    def forward(self, image: Tensor) -> Tensor:
        x = self.convs(image.contiguous(memory_format=torch.channels_last))
        height, width = x.shape[2], x.shape[3]
        below = self._patches(height) * self.patch_size - height
        right = self._patches(width) * self.patch_size - width
        return channels_last(self.proj(F.pad(x, (0, right, 0, below))))


class PlainMamba(PlainBackbone):
    """PlainMamba with timm's interface; see :class:`PlainBackbone` for the arguments not listed.

    Args:
        depth: Blocks.
        embed_dim: Channels.
        d_state: States per channel of the scans.
        ssm_ratio: Channels of the scans per channel of the map.
        stem_convs: 3x3 convolutions in the stem.
        patch_size: Side of the patches, on the map of half resolution.
        conv_tail: Whether a convolution follows the first block.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        stem_convs: int = 1,
        patch_size: int = 8,
        conv_tail: bool = False,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)

        def block(index: int, drop_path: float) -> PreNormBlock:
            layer = ConvTailBlock if conv_tail and index == 0 else PreNormBlock
            return layer(embed_dim, SnakeMixer(embed_dim, d_state, ssm_ratio, **dd), drop_path=drop_path, **dd)

        super().__init__(
            ConvPatchStem(in_chans, embed_dim, stem_convs, patch_size, **dd),
            [block(i, rate) for i, rate in enumerate(rates)],
            nn.LayerNorm(embed_dim, eps=1e-6, **dd),  # the blocks' norms have 1e-5
            ClassifierHead(
                embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
            ),
            dim=embed_dim,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            **kwargs,
            **dd,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all parameters anew."""
        super().init_weights()
        named_apply(init_weights, self)
        for module in self.modules():
            if isinstance(module, SnakeMixer):
                module.reset_parameters()
        if isinstance(self.head.fc, nn.Linear):
            nn.init.normal_(self.head.fc.weight, std=0.01)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """What published training leaves undecayed besides norms and biases.

        The biases of the mixers' convolutions are an exception there: a rule for depthwise convolutions came before
        the one for biases. They are not decayed here.
        """
        scans = [name for name, module in self.named_modules() if isinstance(module, SnakeMixer)]
        return super().no_weight_decay() | {
            f"{name}.{parameter}" for name in scans for parameter in ("direction_B", "ssm.A_log", "ssm.dt_bias")
        }


# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints
# ---------------------------------------------------------------------------------------------------------------------

_NAMES: Names = {
    r"^patch_embed\.stem\.0\.": "stem.convs.0.conv.",
    r"^patch_embed\.stem\.1\.": "stem.convs.0.bn.",
    # Convolution, norm and activation of each were published as three entries of one sequence.
    r"^patch_embed\.convs\.(\d+)\.": lambda match: (
        f"stem.convs.{int(match[1]) // 3 + 1}.{('conv', 'bn')[int(match[1]) % 3]}."
    ),
    r"^patch_embed\.projection\.": "stem.proj.",
    r"^layers\.(\d+)\.norm\.": r"blocks.\1.norm1.",
    r"^layers\.(\d+)\.dw\.0\.": r"blocks.\1.tail.conv.",
    r"^layers\.(\d+)\.dw\.1\.": r"blocks.\1.tail.bn.",
    r"^layers\.(\d+)\.mamba\.": r"blocks.\1.mixer.",
    r"\.direction_Bs$": ".direction_B",
    r"\.conv2d\.": ".conv.",
    r"\.mixer\.(A_log|D|x_proj\.weight)$": r".mixer.ssm.\1",
    r"\.dt_proj\.(weight|bias)$": r".ssm.dt_\1",
    r"^ln1\.": "norm.",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Turns a published checkpoint into this package's names and shapes; own ones keep theirs.

    The position embedding is resized to the model's grid.

    Args:
        state_dict: Weights under published or own names, bare or in their wrapper.
        model: The :class:`PlainMamba` they are for.
    """
    weights = unwrap(state_dict)
    if any(key.startswith("layers.") for key in weights):
        renamed = {rename(key, _NAMES): value for key, value in weights.items()}
        weights = {key: _own_shape(key, value) for key, value in renamed.items()}
    return fit_pos_embed(weights, model)


def _own_shape(key: str, value: Tensor) -> Tensor:
    """Scans have a dimension for directions here, of size one, and the position embedding is a map."""
    if key.endswith((".ssm.A_log", ".ssm.D", ".ssm.dt_weight", ".ssm.dt_bias")):
        return value.unsqueeze(0)
    return square_map(value) if key == "pos_embed" else value


# ---------------------------------------------------------------------------------------------------------------------
# Pretrained configurations
# ---------------------------------------------------------------------------------------------------------------------

_FIRST_CONV = "stem.convs.0.conv"
_cfg = partial(imagenet_cfg, first_conv=_FIRST_CONV, license="apache-2.0")  # this package's own

PUBLISHED_TOP1 = published_top1("plainmamba_*")
"""ImageNet-1K top-1 accuracy in percent at 224x224, as the authors published it."""

default_cfgs = generate_default_cfgs(
    {
        **published_cfgs("plainmamba_*", first_conv=_FIRST_CONV, pool_size=(14, 14)),
        "plainmamba_nano_32.untrained": _cfg(num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0),
        "test_plainmamba.untrained": _cfg(input_size=(3, 64, 64), pool_size=(16, 16)),
    }
)


# ---------------------------------------------------------------------------------------------------------------------
# Entry points
# ---------------------------------------------------------------------------------------------------------------------


def _create_plainmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    return build_model(
        PlainMamba,
        variant,
        pretrained,
        checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def plainmamba_l1(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L1: 7.6 M parameters (7.3 M published, without the classifier), 3.0 G, 77.9 % top-1."""
    model_args = {"depth": 24, "embed_dim": 192, "stem_convs": 1, "conv_tail": True}
    return _create_plainmamba("plainmamba_l1", pretrained, **{**model_args, **kwargs})


@register_model
def plainmamba_l2(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L2: 26.1 M parameters (25.7 M published, without the classifier), 8.1 G, 81.6 % top-1."""
    model_args = {"depth": 24, "embed_dim": 384, "stem_convs": 2}
    return _create_plainmamba("plainmamba_l2", pretrained, **{**model_args, **kwargs})


@register_model
def plainmamba_l3(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L3: 51.0 M parameters (50.5 M published, without the classifier), 14.4 G, 82.3 % top-1."""
    model_args = {"depth": 36, "embed_dim": 448, "stem_convs": 2}
    return _create_plainmamba("plainmamba_l3", pretrained, **{**model_args, **kwargs})


@register_model
def plainmamba_nano_32(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """For 32x32 images and one CPU core: patches of 4 pixels. Not published."""
    model_args = {"depth": 4, "embed_dim": 64, "d_state": 4, "patch_size": 2, "conv_tail": True, "img_size": 32}
    return _create_plainmamba("plainmamba_nano_32", pretrained, **{**model_args, **kwargs})


@register_model
def test_plainmamba(pretrained: bool = False, **kwargs: Any) -> PlainMamba:  # noqa: PT028
    """The smallest size that still has every part, for tests."""
    small = {"depth": 4, "embed_dim": 16, "d_state": 4, "patch_size": 2, "img_size": 64}
    model_args = {**small, "stem_convs": 2, "conv_tail": True}
    return _create_plainmamba("test_plainmamba", pretrained, **{**model_args, **kwargs})
