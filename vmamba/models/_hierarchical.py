"""What every backbone of four stages shares: timm's model interface over a stem, stages and a head.

A family builds its stem and its stages and passes them on; everything timm asks of a model is here.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import checkpoint_seq, named_apply
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vmamba.layers import BlockSequence, LayerNorm, init_weights
from vmamba.models._backbone import Backbone


class Stage(nn.Module):
    """An optional downsampling followed by blocks, on maps of shape (batch, height, width, channels).

    Args:
        dim: Channels of the blocks.
        blocks: The blocks, in order.
        downsample: What brings the map of the stage before to this stage's size and width.
    """

    def __init__(self, dim: int, blocks: Iterable[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = BlockSequence(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


def make_stages(
    depths: Sequence[int],
    dims: Sequence[int],
    drop_path_rate: float,
    block: Callable[[int, float], nn.Module],
    downsample: Callable[[int, int], nn.Module],
) -> list[Stage]:
    """Stages of the given depths and widths.

    Args:
        depths: Blocks per stage.
        dims: Channels per stage.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        block: Called with (index of the stage, drop path) for each block.
        downsample: Called with (dim, out_dim) before each stage but the first.
    """
    rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
    return [
        Stage(dim, [block(i, rate) for rate in rates[i]], downsample(dims[i - 1], dim) if i else None)
        for i, dim in enumerate(dims)
    ]


class HierarchicalBackbone(Backbone):
    """Stem, stages, LayerNorm, global pooling, linear classifier; channels last throughout.

    Any input size works that the stem maps to at least one position.

    Args:
        stem: From the image (batch, C, H, W) to the first map; has ``reduction``.
        stages: The stages; each halves the map of the one before.
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for none.
        global_pool: timm's name of the pooling, ``"avg"`` as published; ``""`` for none.
        drop_rate: Dropout before the classifier.
        img_size: Accepted for timm's sake and checked; the model does not depend on it.
        device: Where to create the parameters.
        dtype: Their dtype; the parameters of the scans stay float32.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        stem: Any,
        stages: Sequence[Stage],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = stages[-1].dim
        self.feature_info = [
            {"num_chs": stage.dim, "reduction": stem.reduction * 2**i, "module": f"stages.{i}"}
            for i, stage in enumerate(stages)
        ]
        self.set_input_size(img_size)

        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = LayerNorm(self.num_features, device=device, dtype=dtype)
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            input_fmt=self.output_fmt,
            device=device,
            dtype=dtype,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all parameters anew."""
        named_apply(init_weights, self)

    # -- Inference ----------------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (batch, C, H, W) to the last normalised map (batch, height, width, num_features)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stages' outputs beside the final one.

        Args:
            x: Images (batch, C, H, W).
            indices: Which stages: the last n for an int, all for None.
            norm: Whether the last stage's map passes the final norm.
            stop_early: Whether to leave out the stages that no index needs.
            output_fmt: ``"NCHW"`` or ``"NHWC"``, for the intermediates.
            intermediates_only: Whether to return the list alone.

        Returns:
            The final features as :meth:`forward_features` gives them, and the list of intermediates.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got '{output_fmt}'")
        taken, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(x)
        # The final norm is as wide as the last stage, so it is applied behind that one only. A pruned model ends early.
        reached = len(self.stages) if not stop_early else last + 1
        ends = reached == len(self.stages)
        for i, stage in zip(range(reached), self.stages, strict=False):
            x = stage(x)
            if i in taken:
                feature = self.norm(x) if norm and i == len(self.stages) - 1 else x
                intermediates.append(feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if ends else x), intermediates

    # -- Surgery ------------------------------------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what the given stages do not need; returns their indices."""
        taken, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        if prune_norm or shortened:
            self.norm = nn.Identity()  # it is as wide as the last stage
        self.stages = nn.Sequential(*list(self.stages)[: last + 1])
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return taken

    # -- Training -----------------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for layer-wise learning rates."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades memory for time: blocks keep their input only and run again in the backward pass."""
        for stage in self.stages.children():
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable
