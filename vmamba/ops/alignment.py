"""Projections to a number of features that is no multiple of eight, as a GPU computes them fast.

Its 16-bit products read and write eight numbers at a time where rows are a multiple of that, and few where they are
not. Step sizes, B and C are as many features as ranks and states make. Rows of zeros below the weight that projects to
them cost little: it is small beside the map.
"""

import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor

from vmamba.ops.autocast import autocast_dtype

_PACK = 8


@register_notrace_function
def aligned_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``linear(x, weight)``; of a weight that had to be aligned, a view that leaves the further columns out."""
    y = F.linear(x, align_rows(weight, x))
    return y if y.shape[-1] == weight.shape[0] else y[..., : weight.shape[0]]


@register_notrace_function
def align_rows(weight: Tensor, x: Tensor) -> Tensor:
    """A weight (..., rows, columns) with the rows of zeros below it that make its product with ``x`` fast."""
    missing = missing_rows(x, weight.shape[-2])
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def missing_rows(x: Tensor, rows: int) -> int:
    """How many rows a weight of ``rows`` lacks for its product with ``x`` to be fast."""
    dtype = autocast_dtype(x) or x.dtype
    return -rows % _PACK if x.is_cuda and dtype.itemsize == 2 else 0
