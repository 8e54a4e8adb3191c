"""The MLP of residual blocks."""

import timm.layers
from torch import Tensor

from vmamba.ops.positions import by_position


class Mlp(timm.layers.Mlp):
    """timm's MLP, of maps (batch, height, width, dim)."""

    def forward(self, x: Tensor) -> Tensor:
        return by_position(super().forward, x)
