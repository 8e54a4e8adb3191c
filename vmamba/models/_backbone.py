"""What every backbone shares of timm's model interface: features, then a head that pools and classifies."""

from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from vmamba.layers import SelectiveSSM


class Backbone(nn.Module):
    """Features and a head; subclasses make both.

    The head is timm's :class:`timm.layers.ClassifierHead` or has its attributes ``fc``, ``global_pool`` and
    ``in_features`` and its method ``reset``.
    """

    head: Any
    stem: Any
    num_features: int
    num_classes: int
    global_pool: str

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (batch, C, H, W) to the last normalised features, not pooled."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last features to logits, or with ``pre_logits`` to what the classifier would see."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, C, H, W) to logits (batch, num_classes)."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of ``num_classes`` outputs (0: none), and a new pooling if one is named."""
        reference = next(self.stem.parameters())
        self.num_classes = num_classes
        self.head.in_features = self.num_features
        self.head.reset(num_classes, pool_type=global_pool)
        self.head.to(device=reference.device, dtype=reference.dtype)
        if global_pool is not None:
            self.global_pool = global_pool

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: Any = None) -> None:
        """Checks the request; nothing has to change unless a family says otherwise.

        Raises:
            ValueError: for a size that is not positive, or for a patch size.
        """
        if img_size is not None and min(to_2tuple(img_size)) < 1:
            raise ValueError(f"img_size must be positive, got {img_size}")
        if patch_size is not None:
            raise ValueError("the stem's patch size is part of the weights and cannot be changed")

    @property
    def head_hidden_size(self) -> int:
        """Width of what the classifier sees."""
        return self.num_features * self.head.global_pool.feat_mult()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The scans' skips, which published training leaves undecayed as it does biases and norms."""
        return {f"{name}.D" for name, module in self.named_modules() if isinstance(module, SelectiveSSM)}
