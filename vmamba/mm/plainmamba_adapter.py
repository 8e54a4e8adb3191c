"""PlainMamba for detection: its adapter, which gives the plain model maps of four strides.

A small convolutional branch sees the image beside the model. Four times they exchange what they found, by deformable
attention: the branch's maps are put into the model's before a quarter of its blocks and read from it behind them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from timm.layers import DropPath
from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.mm.backbone import DenseBackbone
from vmamba.mm.packages import require
from vmamba.models.plainmamba import PlainMamba

INTERACTIONS = 4
"""Exchanges between the model and the branch."""

PUBLISHED_HEADS = {"plainmamba_l1": 6, "plainmamba_l2": 6, "plainmamba_l3": 8}
"""Heads of the attention, as the authors have them."""

Size = tuple[int, int]
"""Rows and columns of a map."""


def to_tokens(x: Tensor) -> Tensor:
    """A map (batch, dim, rows, columns) as tokens (batch, rows * columns, dim)."""
    return x.flatten(2).transpose(1, 2)


def to_maps(tokens: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """Tokens of several maps, one after the other, as maps (batch, dim, rows, columns)."""
    parts = tokens.split([rows * columns for rows, columns in sizes], dim=1)
    return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


def centres(sizes: Sequence[Size], device: torch.device) -> Tensor:
    """Where each token of several maps stands in the image, as (x, y) from 0 to 1: (1, tokens, 1, 2)."""
    places = []
    for rows, columns in sizes:
        y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) / rows
        x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) / columns
        places.append(torch.stack([x.expand(rows, -1), y.unsqueeze(1).expand(-1, columns)], dim=-1).flatten(0, 1))
    return torch.cat(places)[None, :, None]


def conv_bn_relu(dim: int, out_dim: int, stride: int) -> list[nn.Module]:
    """A 3x3 convolution, batch norm and ReLU."""
    return [
        nn.Conv2d(dim, out_dim, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_dim),
        nn.ReLU(inplace=True),
    ]


class SpatialPrior(nn.Module):
    """The branch: the image (batch, C, H, W) to maps (batch, dim, rows, columns) of strides 4, 8, 16 and 32."""

    def __init__(self, in_chans: int, dim: int, inner: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *conv_bn_relu(in_chans, inner, 2),
            *conv_bn_relu(inner, inner, 1),
            *conv_bn_relu(inner, inner, 1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*conv_bn_relu(inner, 2 * inner, 2))
        self.conv3 = nn.Sequential(*conv_bn_relu(2 * inner, 4 * inner, 2))
        self.conv4 = nn.Sequential(*conv_bn_relu(4 * inner, 4 * inner, 2))
        self.fc1 = nn.Conv2d(inner, dim, 1)
        self.fc2 = nn.Conv2d(2 * inner, dim, 1)
        self.fc3 = nn.Conv2d(4 * inner, dim, 1)
        self.fc4 = nn.Conv2d(4 * inner, dim, 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        x1 = self.stem(image)
        x2 = self.conv2(x1)
        x3 = self.conv3(x2)
        x4 = self.conv4(x3)
        return [self.fc1(x1), self.fc2(x2), self.fc3(x3), self.fc4(x4)]


class Exchange(nn.Module):
    """What tokens find in other maps, by MMCV's multi-scale deformable attention: (batch, tokens, dim).

    Computed in float32, whatever the autocast dtype is.

    Args:
        dim: Channels.
        heads: Heads of the attention.
        levels: Maps that are looked into.
        points: Places a head looks at in each.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int = 4) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        attention = require("mmcv.ops").MultiScaleDeformableAttention
        self.attn = attention(dim, heads, levels, points, dropout=0.0, batch_first=True)

    def attend(self, tokens: Tensor, places: Tensor, seen: Tensor, sizes: Sequence[Size]) -> Tensor:
        """What the tokens find.

        Args:
            tokens: Those that look, (batch, tokens, dim).
            places: Where they stand; see :func:`centres`.
            seen: The tokens of the maps they look into, one map after the other.
            sizes: Rows and columns of these maps.
        """
        shapes = torch.tensor(sizes, device=tokens.device)
        areas = shapes.prod(1)
        with torch.autocast(tokens.device.type, enabled=False):
            query = self.query_norm(tokens.float())
            return self.attn(
                query,
                value=self.feat_norm(seen.float()),
                identity=torch.zeros_like(query),
                reference_points=places.expand(len(query), -1, len(sizes), -1),
                spatial_shapes=shapes,
                level_start_index=areas.cumsum(0) - areas,
            )


class Injector(Exchange):
    """Adds to the model's tokens what they find in the branch's maps."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, levels=3)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, size: Size, prior: Tensor, sizes: Sequence[Size]) -> Tensor:
        return x + self.gamma * self.attend(x, centres([size], x.device), prior, sizes)


class ConvFFN(nn.Module):
    """Two linear layers with a depthwise 3x3 convolution, the same for all maps, and GELU between them."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.dwconv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, tokens: Tensor, sizes: Sequence[Size]) -> Tensor:
        maps = to_maps(self.fc1(tokens), sizes)
        return self.fc2(self.act(torch.cat([to_tokens(self.dwconv(x)) for x in maps], dim=1)))


class Extractor(Exchange):
    """Adds to the branch's tokens what they find in the model's map, then a ConvFFN of the sum."""

    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__(dim, heads, levels=1)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ConvFFN(dim, dim // 4)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, prior: Tensor, sizes: Sequence[Size], x: Tensor, size: Size) -> Tensor:
        prior = prior + self.attend(prior, centres(sizes, x.device), x, [size])
        return prior + self.drop_path(self.ffn(self.ffn_norm(prior), sizes))


class Interaction(nn.Module):
    """One exchange: into the model, and after its blocks back from it.

    Args:
        dim: Channels.
        heads: Heads of the attention.
        drop_path: Stochastic depth of the extractors' ConvFFNs.
        extra: Whether two more extractors follow.
    """

    def __init__(self, dim: int, heads: int, drop_path: float, extra: bool) -> None:
        super().__init__()
        self.injector = Injector(dim, heads)
        self.extractor = Extractor(dim, heads, drop_path)
        self.extra_extractors = nn.ModuleList(Extractor(dim, heads, drop_path) for _ in range(2 if extra else 0))

    def extract(self, prior: Tensor, sizes: Sequence[Size], x: Tensor, size: Size) -> Tensor:
        """The branch's tokens after all extractors."""
        for extractor in (self.extractor, *self.extra_extractors):
            prior = extractor(prior, sizes, x, size)
        return prior


@MODELS.register_module()
class PlainMambaAdapter(DenseBackbone):
    """Maps of strides 4, 8, 16 and 32, all as wide as the model, from it and the branch beside it.

    The published one takes images whose sides are multiples of 32. Here any size works, and gives maps of the sides
    divided by the strides, rounded up. Its batch norms are common ones: the authors synchronise all of a detector's
    between processes, which ``sync_bn="torch"`` in a config does.

    Args:
        model_name: A registered PlainMamba, such as ``"plainmamba_l1"``.
        drop_path_rate: Stochastic depth of the model's last block, which rises linearly from 0 at the first, and of all
            extractors.
        num_heads: Heads of the attention; None for as many as published, 6 for L1 and L2 and 8 for L3.
        **kwargs: See :class:`DenseBackbone`.

    Raises:
        MissingPackage: without MMCV's operators.
    """

    model_type = PlainMamba
    own_parts = r"(level_embed$|(spm|interactions|up|ad_norm\d)\.)"

    def __init__(
        self,
        model_name: str,
        drop_path_rate: float = 0.0,
        num_heads: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, drop_path_rate=drop_path_rate, **kwargs)
        self.model.prune_intermediate_layers(1, prune_norm=True)
        dim = self.model.num_features
        heads = PUBLISHED_HEADS.get(model_name, 4) if num_heads is None else num_heads
        if len(self.model.blocks) % INTERACTIONS:
            raise UserError(f"the adapter needs a multiple of {INTERACTIONS} blocks, got {len(self.model.blocks)}")
        if dim % heads:
            raise UserError(f"num_heads is {heads}, which does not divide the {dim} channels of '{model_name}'")
        self.channels = [dim] * 4
        self.level_embed = nn.Parameter(torch.randn(3, dim))
        self.spm = SpatialPrior(self.model.in_chans, dim)
        self.interactions = nn.ModuleList(
            Interaction(dim, heads, drop_path_rate, extra=k == INTERACTIONS - 1) for k in range(INTERACTIONS)
        )
        self.up = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.ad_norm1, self.ad_norm2, self.ad_norm3, self.ad_norm4 = (nn.BatchNorm2d(dim) for _ in range(4))
        for part in (self.spm, self.interactions, self.up):
            part.apply(init_part)

    def own_name(self, key: str) -> str:
        return key.replace(".dwconv.dwconv.", ".dwconv.")

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        finest, *priors = self.spm(images)
        x, prior, sizes = self._interact(self.model.embed(images), priors)
        second, third, fourth = to_maps(prior, sizes)
        rows, columns = finest.shape[2:]
        first = finest + self.up(second)[:, :, :rows, :columns]
        norms = self.ad_norm1, self.ad_norm2, self.ad_norm3, self.ad_norm4
        return tuple(
            norm(out + resize(x, out)) for norm, out in zip(norms, (first, second, third, fourth), strict=True)
        )

    def _interact(self, x: Tensor, priors: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Size]]:
        """The model's map (batch, dim, rows, columns) at its end, and the branch's tokens with the sizes of its maps.

        Args:
            x: The model's map at its start, (batch, rows, columns, dim).
            priors: The branch's maps at strides 8, 16 and 32.
        """
        size: Size = (x.shape[1], x.shape[2])
        sizes: list[Size] = [(prior.shape[2], prior.shape[3]) for prior in priors]
        prior = torch.cat(
            [to_tokens(prior) + level for prior, level in zip(priors, self.level_embed, strict=True)], dim=1
        )
        blocks = list(self.model.blocks)
        count = len(blocks) // INTERACTIONS
        for k, interaction in enumerate(self.interactions):
            assert isinstance(interaction, Interaction)
            tokens = interaction.injector(x.flatten(1, 2), size, prior, sizes)
            x = self.model.run_blocks(blocks[k * count : (k + 1) * count], tokens.unflatten(1, size))
            prior = interaction.extract(prior, sizes, x.flatten(1, 2), size)
        return x.permute(0, 3, 1, 2), prior, sizes


def resize(x: Tensor, like: Tensor) -> Tensor:
    """The map ``x``, resized bilinearly to the sides of another."""
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def init_part(module: nn.Module) -> None:
    """Draws the parameters of a layer as the authors do; the attention has a way of its own."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels / module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ConvFFN):
        for linear in (module.fc1, module.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
    elif isinstance(module, Exchange):
        module.attn.init_weights()
