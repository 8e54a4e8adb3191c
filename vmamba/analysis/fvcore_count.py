"""fvcore's count of a model, made comparable with torch's FlopCounter's, and what only one of them counts.

fvcore follows the traced graph, and calls a multiply-add one flop; torch's counter follows the calls, and calls it
two. Both count matrix products and convolutions, and here the same scans. Only fvcore counts norms, pooling and
interpolation (by rules of thumb, five operations per element for a norm); neither counts activations, sums and other
elementwise operations.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import nn

from vmamba.analysis.flops import SCAN_OPS, InputSize, traced_scan
from vmamba.errors import UserError

_PRODUCTS = ("conv", "linear", "matmul", "addmm", "bmm", "einsum")
_SCAN = "scan"


@dataclass(frozen=True)
class FvcoreCount:
    """What fvcore counts for one image.

    Attributes:
        product_macs: Multiply-adds of matrix products and convolutions.
        scan_flops: Operations of the scans.
        others: What torch's counter leaves out, by operator.
    """

    product_macs: int
    scan_flops: int
    others: dict[str, int]

    @property
    def flops(self) -> int:
        """In torch's terms: two for a multiply-add, without ``others``."""
        return 2 * self.product_macs + self.scan_flops


def count_by_fvcore(model: nn.Module, input_size: InputSize = 224) -> FvcoreCount:
    """Counts one image in eval mode. fvcore runs the model, so it takes as long, and real weights.

    Args:
        model: Any model of images, on the CPU.
        input_size: Side, (height, width) or (channels, height, width) of the image; three channels unless said.

    Raises:
        UserError: if fvcore is not installed.
    """
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        raise UserError("fvcore is not installed; run: pip install fvcore") from error
    sizes = to_2tuple(input_size)
    image = torch.zeros(1, *(sizes if len(sizes) == 3 else (3, *sizes)))
    mode = model.training
    analysis = FlopCountAnalysis(model.eval(), image).set_op_handle(**_handlers())
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    try:
        with torch.no_grad():
            by_operator = {name: int(value) for name, value in analysis.by_operator().items()}
    finally:
        model.train(mode)
    return FvcoreCount(
        product_macs=sum(by_operator.get(name, 0) for name in _PRODUCTS),
        scan_flops=by_operator.get(_SCAN, 0),
        others={name: value for name, value in by_operator.items() if name not in (*_PRODUCTS, _SCAN)},
    )


def _handlers() -> dict[str, Callable[[list[Any], list[Any]], Any]]:
    """Ours for the scans, by the formula that torch's counter has for them, and for what fvcore counts inexactly."""

    def scan(inputs: list[Any], outputs: list[Any]) -> Any:
        elements, states, rank = traced_scan(inputs)
        return Counter({_SCAN: elements * (9 * states + 1 + 2 * rank)})

    def einsum(inputs: list[Any], outputs: list[Any]) -> int:
        """fvcore's own reads the cost from NumPy's printout of four significant digits."""
        terms = inputs[0].toIValue().replace(" ", "").split("->")[0].split(",")
        shapes = [tensor.type().sizes() for tensor in inputs[1].node().inputs()]
        sizes: dict[str, int] = {}
        for term, shape in zip(terms, shapes, strict=True):
            sizes.update(zip(term, shape, strict=True))
        return math.prod(sizes.values())

    def attention(inputs: list[Any], outputs: list[Any]) -> Any:
        """Both products, where they are fused into one operator, which fvcore does not know."""
        (*heads, queries, width), (*_, keys, _), (*_, out_width) = (x.type().sizes() for x in inputs[:3])
        return Counter(matmul=math.prod(heads) * queries * keys * (width + out_width))

    scans = {f"vmamba::{op}": scan for op in SCAN_OPS}
    return {**scans, "aten::einsum": einsum, "aten::scaled_dot_product_attention": attention}
