"""PlainMamba for segmentation."""

from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from vmamba.mm.backbone import DenseBackbone, rising
from vmamba.models.plainmamba import PlainMamba


@MODELS.register_module()
class PlainMambaSegBackbone(DenseBackbone):
    """Maps of four blocks, all of stride 16 and as wide as the model, each behind a LayerNorm.

    The last block's is the classifier's; the others are new and start at weight 1, bias 0.

    Args:
        model_name: A registered PlainMamba, such as ``"plainmamba_l1"``.
        out_indices: The blocks, counted from 0, in rising order: ``(8, 17, 26, 35)`` for L3.
        **kwargs: See :class:`DenseBackbone`.
    """

    model_type = PlainMamba
    own_parts = r"norm_layer\d+\."

    def __init__(self, model_name: str, out_indices: Sequence[int] = (5, 11, 17, 23), **kwargs: Any) -> None:
        super().__init__(model_name, **kwargs)
        blocks = self.model.blocks
        self.out_indices = rising(out_indices, len(blocks))
        self.channels = [self.model.num_features] * len(self.out_indices)
        self.final = len(blocks) - 1
        last = self.out_indices[-1]
        if last != self.final:
            # In the classifier, and of no use here.
            self.model.norm.requires_grad_(False)
            blocks[last + 1 :].requires_grad_(False)
        for i in self.out_indices:
            if i != self.final:
                self.add_module(f"norm_layer{i}", nn.LayerNorm(self.model.num_features, eps=1e-6))

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.forward_intermediates(
            images, self.out_indices, stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        normed = [self._norm(i)(x) for i, x in zip(self.out_indices, maps, strict=True)]
        return tuple(x.permute(0, 3, 1, 2).contiguous() for x in normed)

    def _norm(self, index: int) -> nn.Module:
        return self.model.norm if index == self.final else getattr(self, f"norm_layer{index}")
