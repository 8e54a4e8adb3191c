"""One backbone for every family of four stages."""

from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor

from vmamba.layers import LayerNorm
from vmamba.mm.backbone import DenseBackbone, rising
from vmamba.models._hierarchical import HierarchicalBackbone


@MODELS.register_module()
class MambaBackbone(DenseBackbone):
    """The maps of a hierarchical model's stages, each behind a LayerNorm of its own.

    VMamba, EfficientVMamba, MSVMamba and Spatial-Mamba were all published so: the norms (epsilon 1e-5) see what a stage
    returns, the next stage sees it without. A classifier's checkpoint has none of them; they start at weight 1, bias 0.
    Any size of image works that the stem maps to at least one position.

    Args:
        model_name: A registered model of several stages, such as ``"vmamba_tiny_s1l8"``.
        out_indices: The stages whose maps are returned, in rising order.
        out_norm: Whether the norms are there; without them the maps are what the stages return.
        **kwargs: See :class:`DenseBackbone`.

    Example:
        >>> backbone = MODELS.build(dict(type="MambaBackbone", model_name="test_vmamba"))
        >>> [tuple(x.shape) for x in backbone(torch.randn(1, 3, 64, 96))]
        [(1, 16, 16, 24), (1, 32, 8, 12), (1, 64, 4, 6), (1, 128, 2, 3)]
    """

    model_type = HierarchicalBackbone
    own_parts = r"outnorm\d+\."

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, **kwargs)
        stages = len(self.model.stages)
        self.out_indices = rising(out_indices, stages)
        self.out_norm = out_norm
        self.channels = [self.model.feature_info[i]["num_chs"] for i in self.out_indices]
        # The classifier's norm has no use here; neither do the stages behind the last map, which learn nothing.
        self.model.prune_intermediate_layers(stages, prune_norm=True)
        self.model.stages[self.out_indices[-1] + 1 :].requires_grad_(False)
        if out_norm:
            for i, dim in zip(self.out_indices, self.channels, strict=True):
                self.add_module(f"outnorm{i}", LayerNorm(dim))

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.forward_intermediates(
            images, self.out_indices, stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        if self.out_norm:
            maps = [getattr(self, f"outnorm{i}")(x) for i, x in zip(self.out_indices, maps, strict=True)]
        return tuple(x.permute(0, 3, 1, 2).contiguous() for x in maps)
