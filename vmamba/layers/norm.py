"""LayerNorms of channels-last maps. All have the parameters of :class:`torch.nn.LayerNorm` and agree with it."""

from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from vmamba.ops import add_layer_norm, layer_norm
from vmamba.ops.autocast import autocast_dtype
from vmamba.ops.layer_norm import Norm


def norm_of(layer: Any) -> Norm:
    """The parameters of a LayerNorm, for operators that apply it on their way."""
    return Norm(layer.weight, layer.bias, layer.eps)


@register_notrace_module
class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` over the channels, faster on a GPU. Under autocast its result is float32."""

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x, x.dtype if autocast_dtype(x) is None else torch.float32)

    def _norm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, dtype)


@register_notrace_module
class BranchNorm(LayerNorm):
    """The norm at the head of a residual branch: under autocast its result has the autocast dtype.

    The linear layer behind it would cast it to that dtype anyway; here the cast costs nothing.
    """

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Any:
        """The norm of ``x``; with a branch that ends here, ``x + branch`` and its norm, on a GPU in one pass."""
        if branch is None:
            return self._norm(x, autocast_dtype(x) or x.dtype)
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps)


@register_notrace_module
class ScanNorm(LayerNorm):
    """LayerNorm of a scan's result, returned in the dtype of the activations.

    The scan's sums can exceed float16, so they come in float32 then, and only the normalised values are cast.
    """

    def forward(self, y: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        return self._norm(y, dtype)
