"""The MLP of residual blocks."""

from typing import Any

import timm.layers
from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.layers.norm import BranchNorm, norm_of
from vmamba.layers.plain import is_plain, is_plain_linear
from vmamba.ops.gelu import linear_gelu, serves_linear_gelu
from vmamba.ops.mlp import Projection, mlp, residual_mlp, serves_mlp, serves_residual_mlp
from vmamba.ops.positions import by_position


@register_notrace_module  # how it computes depends on the device
class Mlp(timm.layers.Mlp):
    """timm's MLP, of maps (batch, height, width, dim); faster on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return by_position(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        if not self.begins_plainly():
            return super().forward(x)
        if self.ends_plainly() and serves_mlp(x, *self.weights()):
            return mlp(x, *self.weights())
        fc1: Any = self.fc1
        if not serves_linear_gelu(fc1.weight, fc1.bias):
            return super().forward(x)
        x = self.drop1(linear_gelu(x, fc1.weight, fc1.bias))
        return self.drop2(self.fc2(self.norm(x)))

    def serves_residual(self, x: Tensor, norm: nn.Module) -> bool:
        """Whether :meth:`residual` has a kernel for this map, and nobody can tell it from a call of the parts."""
        return (
            is_plain(norm, BranchNorm)
            and self.begins_plainly()
            and self.ends_plainly()
            and serves_residual_mlp(x, norm_of(norm), *self.weights())
        )

    def residual(
        self, x: Tensor, branch: Tensor | None, norm: nn.Module, projection: Projection | None = None
    ) -> Tensor:
        """A residual branch in one pass: ``total + self(norm(total))``, where the total is ``x + branch``.

        Args:
            x: (batch, height, width, dim).
            branch: Of the same shape; None for none.
            norm: The branch's :class:`BranchNorm`.
            projection: What is still to be done with ``branch`` first.
        """
        maps = (x,) if branch is None else (x, branch)

        def in_one_pass(x: Tensor, branch: Tensor | None = None) -> Tensor:
            return residual_mlp(x, branch, norm_of(norm), *self.weights(), projection=projection)

        return by_position(in_one_pass, *maps)

    def weights(self) -> tuple[Any, ...]:
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias

    def begins_plainly(self) -> bool:
        """Whether nobody can tell if the first layer and its activation are called, or computed in one."""
        return _is_linear(self.fc1) and is_plain(self.act, nn.GELU) and self.act.approximate == "none"

    def ends_plainly(self) -> bool:
        """The same of what is behind the activation."""
        return (
            _is_linear(self.fc2)
            and is_plain(self.norm, nn.Identity)
            and all(is_plain(drop, nn.Dropout) and not (drop.training and drop.p) for drop in (self.drop1, self.drop2))
        )


def _is_linear(layer: Any) -> bool:
    return is_plain_linear(layer) and type(layer.bias) is nn.Parameter
