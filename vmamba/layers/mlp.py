"""The MLP of residual blocks."""

from typing import Any

import timm.layers
from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.layers.plain import is_plain
from vmamba.ops.gelu import linear_gelu, serves_linear_gelu
from vmamba.ops.mlp import mlp, serves_mlp
from vmamba.ops.positions import by_position


@register_notrace_module  # how it computes depends on the device
class Mlp(timm.layers.Mlp):
    """timm's MLP, of maps (batch, height, width, dim); faster on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return by_position(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        fc1: Any = self.fc1
        fc2: Any = self.fc2
        if not self._begins_plainly():
            return super().forward(x)
        if self._ends_plainly() and serves_mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias):
            return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        if not serves_linear_gelu(fc1.weight, fc1.bias):
            return super().forward(x)
        x = self.drop1(linear_gelu(x, fc1.weight, fc1.bias))
        return self.drop2(self.fc2(self.norm(x)))

    def _begins_plainly(self) -> bool:
        """Whether nobody can tell if the first layer and its activation are called, or computed in one."""
        return _is_linear(self.fc1) and is_plain(self.act, nn.GELU) and self.act.approximate == "none"

    def _ends_plainly(self) -> bool:
        """The same of what is behind the activation."""
        return (
            _is_linear(self.fc2)
            and is_plain(self.norm, nn.Identity)
            and all(is_plain(drop, nn.Dropout) and not (drop.training and drop.p) for drop in (self.drop1, self.drop2))
        )


def _is_linear(layer: Any) -> bool:
    return (
        is_plain(layer, nn.Linear) and type(layer.weight) is nn.Parameter and type(layer.bias) is nn.Parameter
    )  # quantised weights, say, are of other classes
