"""The norm behind a scan."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScanNorm(nn.LayerNorm):
    """LayerNorm of a scan's float32 result, returned in the dtype of the activations.

    The scan's sums can exceed float16, so the norm is computed in the dtype of its input whatever the parameters' is,
    and only the normalised values are cast. Same parameters as :class:`torch.nn.LayerNorm`.
    """

    def forward(self, y: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        weight, bias = self.weight.to(y.dtype), self.bias.to(y.dtype)
        return F.layer_norm(y, self.normalized_shape, weight, bias, self.eps).to(dtype)
