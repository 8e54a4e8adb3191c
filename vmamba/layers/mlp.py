"""The MLP of residual blocks."""

import timm.layers
from torch import Tensor, nn

from vmamba.layers.plain import is_plain
from vmamba.ops.gelu import linear_gelu, serves_linear_gelu
from vmamba.ops.positions import by_position


class Mlp(timm.layers.Mlp):
    """timm's MLP, of maps (batch, height, width, dim); faster on a GPU in training."""

    def forward(self, x: Tensor) -> Tensor:
        return by_position(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        if not self._fuses():
            return super().forward(x)
        x = self.drop1(linear_gelu(x, self.fc1.weight, self.fc1.bias))
        return self.drop2(self.fc2(self.norm(x)))

    def _fuses(self) -> bool:
        """Whether the first layer and its activation can be, and are better, computed without calling them."""
        fc1, act = self.fc1, self.act
        return (
            is_plain(fc1, nn.Linear)
            and is_plain(act, nn.GELU)
            and act.approximate == "none"
            and type(fc1.bias) is nn.Parameter
            and type(fc1.weight) is nn.Parameter
            and serves_linear_gelu(fc1.weight, fc1.bias)
        )
