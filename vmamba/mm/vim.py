"""Vim for segmentation and for detection: the maps of its blocks, brought to several scales.

Both were published for square images of one size; here the position embedding, and the rotary one, follow the image.
The class token takes no part. Nothing that the authors trained so has been released, and their models are not those of
the released classifiers: a rotary embedding turns the stream (``rope=True``) and the directions are summed
(``average=False``) in all but the tiny segmentation model. Leave both alone to start from a released classifier.
"""

from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.mm.backbone import DenseBackbone, rising
from vmamba.models.vim import Feature, Vim


def upsample(dim: int, out_dim: int) -> nn.ConvTranspose2d:
    """Doubles the sides of a map."""
    return nn.ConvTranspose2d(dim, out_dim, kernel_size=2, stride=2)


def halve() -> nn.MaxPool2d:
    """Halves the sides of a map, an odd one to the next number."""
    return nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)


@MODELS.register_module()
class VimSegBackbone(DenseBackbone):
    """Maps of four blocks at strides 4, 8, 16 and 32, by transposed convolutions and pooling, all as wide as the model.

    Its batch norm is a common one: the authors synchronise it between processes, which ``sync_bn="torch"`` in a
    config does.

    Args:
        model_name: A registered Vim with patches of stride 16 or 8, such as ``"vim_tiny_patch16_224"``.
        out_indices: The four blocks, counted from 0, in rising order.
        feature: What is read behind them, one for all or one for each; see :meth:`Vim.forward_intermediates`. The
            published tiny model reads ``"hidden"``. The small one reads ``"residual"`` three times, then ``"sum"``, of
            the blocks 6, 12, 18 and 23.
        **kwargs: See :class:`DenseBackbone`; ``img_size`` is the size whose grid the position embedding has.
    """

    model_type = Vim
    own_parts = r"fpn\d\."

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (5, 11, 17, 23),
        feature: Feature | Sequence[Feature] = "sum",
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, class_token="none", **kwargs)
        if len(out_indices) != 4:
            raise UserError(f"out_indices must be four blocks, got {tuple(out_indices)}")
        self.out_indices = rising(out_indices, len(self.model.blocks))
        self.feature = feature
        # In the published layout, and of no use.
        self.model.norm.requires_grad_(False)
        dim = self.model.num_features
        self.channels = [dim] * 4
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = _scales(dim, self.model.stem.reduction)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.forward_intermediates(
            images, self.out_indices, stop_early=True, intermediates_only=True, feature=self.feature
        )
        scales = self.fpn1, self.fpn2, self.fpn3, self.fpn4
        return tuple(scale(x) for scale, x in zip(scales, maps, strict=True))


def _scales(dim: int, stride: int) -> list[nn.Module]:
    """What brings four maps of a stride of 16 or 8 to strides of 4, 8, 16 and 32."""
    if stride == 16:
        first = nn.Sequential(upsample(dim, dim), nn.BatchNorm2d(dim), nn.GELU(), upsample(dim, dim))
        return [first, nn.Sequential(upsample(dim, dim)), nn.Identity(), halve()]
    if stride == 8:
        return [nn.Sequential(upsample(dim, dim)), nn.Identity(), halve(), nn.Sequential(halve(), halve())]
    raise UserError(f"VimSegBackbone takes models of stride 16 or 8, got one of {stride}")


class NormedConv(nn.Conv2d):
    """A convolution without bias, and a LayerNorm over the channels behind it."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int) -> None:
        super().__init__(dim, out_dim, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = LayerNorm2d(out_dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


@MODELS.register_module()
class VimDetBackbone(DenseBackbone):
    """The last block's map as a pyramid of five, at strides 4 to 64: ViTDet's simple feature pyramid.

    A detector needs no neck behind it.

    Args:
        model_name: A registered Vim with patches of stride 16, such as ``"vim_tiny_patch16_224"``.
        out_channels: Channels of the maps.
        **kwargs: See :class:`DenseBackbone`; ``img_size`` is the size whose grid the position embedding has, 1024 in
            the published models.
    """

    model_type = Vim
    own_parts = r"simfp_\d\."
    model_prefix = "net."

    def __init__(self, model_name: str, out_channels: int = 256, **kwargs: Any) -> None:
        super().__init__(model_name, class_token="none", **kwargs)
        if self.model.stem.reduction != 16:
            raise UserError(f"VimDetBackbone takes models of stride 16, got one of {self.model.stem.reduction}")
        self.model.prune_intermediate_layers(1, prune_norm=True)
        dim = self.model.num_features
        self.channels = [out_channels] * 5
        self.simfp_2 = nn.Sequential(
            upsample(dim, dim // 2),
            LayerNorm2d(dim // 2, eps=1e-6),
            nn.GELU(),
            upsample(dim // 2, dim // 4),
            *_to_width(dim // 4, out_channels),
        )
        self.simfp_3 = nn.Sequential(upsample(dim, dim // 2), *_to_width(dim // 2, out_channels))
        self.simfp_4 = nn.Sequential(*_to_width(dim, out_channels))
        self.simfp_5 = nn.Sequential(halve(), *_to_width(dim, out_channels))
        self.simfp_6 = nn.MaxPool2d(kernel_size=1, stride=2)

    def last_map(self, images: Tensor) -> Tensor:
        """The sum of all blocks, without a norm: (batch, dim, rows, columns)."""
        return self.model.forward_intermediates(images, indices=1, intermediates_only=True)[0]

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        x = self.last_map(images)
        coarsest = self.simfp_5(x)
        return self.simfp_2(x), self.simfp_3(x), self.simfp_4(x), coarsest, self.simfp_6(coarsest)


def _to_width(dim: int, out_dim: int) -> tuple[NormedConv, NormedConv]:
    """The last two layers of each scale."""
    return NormedConv(dim, out_dim, 1), NormedConv(out_dim, out_dim, 3)
