"""What a model costs: true operations, and the figures its authors published.

:func:`count` counts every multiplication and addition of matrix products, convolutions and scans, for any model.
:func:`published_flops` follows the rule behind a family's published table, which is what papers compare; the rules
differ between families, and between them and :func:`count`. :func:`fvcore_handlers` lets fvcore count our scan.
:mod:`.module_costs` has the cost of each part, :mod:`.fvcore_count` fvcore's opinion, :mod:`.cost_table` all models.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, SelectAdaptivePool2d, to_2tuple
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vmamba.layers import GatedSS2D, SelectiveSSM
from vmamba.models import msvmamba, plainmamba, spatialmamba
from vmamba.models.efficientvmamba import EfficientVMamba
from vmamba.models.vmamba import VMamba

InputSize = int | tuple[int, int] | tuple[int, int, int]


@dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
        params: Parameters of the model.
        macs: Half of ``flops``: multiply-adds, where a model does little else.
        flops: Operations of matrix products, convolutions and scans; elementwise ones are not counted.
    """

    params: int
    macs: int
    flops: int


def count(model: nn.Module, input_size: InputSize = 224) -> Cost:
    """The cost of one image through ``model`` in eval mode, found on the meta device: nothing is computed.

    Args:
        model: Any model of images.
        input_size: Side, (height, width) or (channels, height, width) of the image; three channels unless said.
    """
    with FlopCounterMode(display=False) as counter:
        forward_on_meta(model, input_size)
    flops = counter.get_total_flops()
    params = sum(parameter.numel() for parameter in model.parameters())
    return Cost(params=params, macs=flops // 2, flops=flops)


# ---------------------------------------------------------------------------------------------------------------------
# Published rules
# ---------------------------------------------------------------------------------------------------------------------

ModuleCost = Callable[[Any, Tensor, Tensor], int]
"""Counts one call of a module from (module, first input, output)."""

Rule = Mapping[type[nn.Module], ModuleCost]
"""Costs by type of module; a module takes the entry of the nearest of its base classes. What no entry names is free."""


def _conv(module: nn.Conv2d, x: Tensor, y: Tensor) -> int:
    return y.numel() * module.weight[0].numel()


def _linear(module: nn.Linear, x: Tensor, y: Tensor) -> int:
    return x.numel() * module.out_features


def _norm(module: nn.Module, x: Tensor, y: Tensor) -> int:
    return 5 * x.numel()


def _one_per_element(module: nn.Module, x: Tensor, y: Tensor) -> int:
    return x.numel()


def _two_per_element(module: nn.Module, x: Tensor, y: Tensor) -> int:
    return 2 * x.numel()


def _scan(module: SelectiveSSM, x: Tensor, y: Tensor) -> int:
    """9 operations per state (mamba's own estimate), one per skip, and the expansion of the step sizes."""
    elements = x.numel() * module.directions
    return elements * (9 * module.d_state + 1 + module.rank)


FVCORE_RULE: Rule = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.LayerNorm: _norm,
    SelectAdaptivePool2d: _one_per_element,
    SelectiveSSM: _scan,
}
"""fvcore's: a multiply-add is one, a norm five per element, a pooling one, activations and sums nothing; the scans are
true operations."""


def _einsum(multiply_adds: int) -> int:
    """What fvcore makes of an einsum: it parses NumPy's report of the cost, which prints four significant digits."""
    return math.floor(float(f"{2 * multiply_adds:.3e}") / 2)


def _einsum_projections(module: GatedSS2D, x: Tensor, y: Tensor) -> int:
    """The first generation projects by einsum: the difference to the exact count that its modules have entered."""
    ssm = module.ssm
    positions = x.numel() // x.shape[-1]
    elements = positions * module.out_proj.in_features * ssm.directions
    return sum(_einsum(elements * width) - elements * width for width in (ssm.rank + 2 * ssm.d_state, ssm.rank))


def _atrous_scan(module: GatedSS2D, x: Tensor, y: Tensor) -> int:
    """The scan, padded to whole cells, and its einsums; less what ``x_proj`` counts for directions that stay away."""
    batch, height, width, _ = x.shape
    ssm, inner = module.ssm, module.out_proj.in_features
    width_of_params = ssm.rank + 2 * ssm.d_state
    elements = batch * 4 * math.ceil(height / 2) * math.ceil(width / 2) * inner
    scan = elements * (9 * ssm.d_state + 1)
    projections = _einsum(elements * width_of_params) + _einsum(elements * ssm.rank)
    return scan + projections - batch * height * width * inner * ssm.directions * width_of_params


def _multi_scale_scan(module: msvmamba.MultiScaleScan, x: Tensor, y: Tensor, interpolation: int) -> int:
    """Both scans and the interpolation; published code projects the half-resolution map once for each pass."""
    batch, height, width, channels = x.shape
    low = batch * math.ceil(height / 2) * math.ceil(width / 2)
    sequences = batch * height * width + msvmamba.PASSES * low
    rank = module.low.ssm.rank
    repeated_projections = (msvmamba.PASSES - 1) * low * channels * (rank + 2)
    return sequences * channels * (10 + rank) + repeated_projections + interpolation * y.numel()


def _biased_conv(module: nn.Conv2d, x: Tensor, y: Tensor) -> int:
    return _conv(module, x, y) + (y.numel() if module.bias is not None else 0)


def _snake_scan(module: plainmamba.SnakeMixer, x: Tensor, y: Tensor) -> int:
    """One expansion of the step sizes, and in each direction nine operations per state and one per skip."""
    ssm = module.ssm
    elements = x[..., 0].numel() * module.out_proj.in_features
    return elements * (ssm.rank + plainmamba.DIRECTIONS * (9 * ssm.d_state + 1))


def _not_counted(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Takes back what the classifier inside has counted."""
    return -sum(linear.weight.numel() * len(x) for linear in module.modules() if isinstance(linear, nn.Linear))


def _state_fusion(module: spatialmamba.StateFusion, x: Tensor, y: Tensor) -> int:
    return y.numel() * module.kernels[0].numel()


def _state_scan(module: spatialmamba.StructureAwareSSM, x: Tensor, y: Tensor) -> int:
    """The step sizes, and 7 operations per state: C comes after the scan, as an elementwise product, which is free."""
    return x.numel() * (module.rank + 7)


PUBLISHED_RULES: dict[type[nn.Module], Rule] = {
    EfficientVMamba: {
        nn.Conv2d: _conv,
        nn.Linear: _linear,
        nn.LayerNorm: _norm,
        nn.BatchNorm2d: _two_per_element,
        SelectAdaptivePool2d: _one_per_element,
        SqueezeExcite: _one_per_element,
        GatedSS2D: _atrous_scan,
    },
    msvmamba.MSVMamba: {
        nn.Conv2d: _conv,
        nn.Linear: _linear,
        nn.LayerNorm: _norm,
        SelectAdaptivePool2d: _one_per_element,
        msvmamba.SqueezeExcite: _one_per_element,
        msvmamba.PassNormedScan: partial(_multi_scale_scan, interpolation=4),
        msvmamba.SumNormedScan: partial(_multi_scale_scan, interpolation=1),
    },
    plainmamba.PlainMamba: {
        nn.Conv2d: _biased_conv,
        nn.Linear: _linear,
        nn.LayerNorm: _two_per_element,
        nn.BatchNorm2d: _two_per_element,
        nn.ReLU: _one_per_element,
        plainmamba.SnakeMixer: _snake_scan,
        ClassifierHead: _not_counted,
    },
    spatialmamba.SpatialMamba: {  # counted in training mode, where a batch norm costs as much as any other
        nn.Conv2d: _conv,
        nn.Linear: _linear,
        nn.LayerNorm: _norm,
        nn.BatchNorm2d: _norm,
        spatialmamba.StateFusion: _state_fusion,
        spatialmamba.StructureAwareSSM: _state_scan,
    },
    VMamba: {**FVCORE_RULE, GatedSS2D: _einsum_projections},
}
"""The rule behind the published figures, by model class."""


def published_flops(model: nn.Module, input_size: InputSize = 224) -> int:
    """The cost of one image by the rule of the model's authors.

    Args:
        model: A model of a class in :data:`PUBLISHED_RULES`.
        input_size: Side, (height, width) or (channels, height, width) of the image; three channels unless said.

    Raises:
        ValueError: for a model whose authors' rule is not known.
    """
    rule = published_rule(model)
    if rule is None:
        known = ", ".join(cls.__name__ for cls in PUBLISHED_RULES)
        raise ValueError(f"no published rule is known for {type(model).__name__} (known: {known}); use count() instead")
    with counted_by(rule, model) as costs:
        forward_on_meta(model, input_size)
    return sum(costs)


def published_rule(model: nn.Module) -> Rule | None:
    """The rule behind the figures that the model's authors published, if it is known."""
    return next((PUBLISHED_RULES[cls] for cls in type(model).__mro__ if cls in PUBLISHED_RULES), None)


@contextmanager
def counted_by(rule: Rule, model: nn.Module) -> Iterator[list[int]]:
    """Within it, the cost of every call of a module of ``model`` that ``rule`` names goes onto the list."""
    costs: list[int] = []

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        cost = next(rule[cls] for cls in type(module).__mro__ if cls in rule)
        costs.append(cost(module, inputs[0], output))

    counted = [module for module in model.modules() if isinstance(module, tuple(rule))]
    hooks = [module.register_forward_hook(add) for module in counted]
    try:
        yield costs
    finally:
        for hook in hooks:
            hook.remove()


def fvcore_handlers() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Handlers that let fvcore count our scan by the usual rule.

    Example::

        FlopCountAnalysis(model, image).set_op_handle(**fvcore_handlers())
    """

    def scan(inputs: list[Any], outputs: list[Any]) -> int:
        elements, states, rank = traced_scan(inputs)
        return elements * (9 * states + 1 + rank)

    return {f"vmamba::{op}": scan for op in SCAN_OPS}


SCAN_OPS = ("selective_scan", "selective_scan_forward")


def traced_scan(inputs: list[Any]) -> tuple[int, int, int]:
    """Elements, states and rank (0 for steps that are not low-rank) of a scan, by its inputs in a traced graph."""

    def size(position: int) -> list[int] | None:
        sizes = getattr(inputs[position].type(), "sizes", lambda: None)()
        return None if sizes is None else list(sizes)

    u, A, dt_weight, route = size(0), size(2), size(6), size(8)
    assert u is not None
    assert A is not None
    assert route is not None
    return u[0] * route[-2] * route[-1] * u[-1], A[-1], dt_weight[-1] if dt_weight else 0


def forward_on_meta(model: nn.Module, input_size: InputSize) -> None:
    """One image through the model in eval mode, shapes only."""
    sizes = to_2tuple(input_size)
    channels, height, width = sizes if len(sizes) == 3 else (3, *sizes)
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            dtype = next((x.dtype for x in tensors.values() if x.is_floating_point()), torch.float32)
            meta = {name: torch.empty_like(x, device="meta") for name, x in tensors.items()}
            image = torch.empty(1, channels, height, width, dtype=dtype, device="meta")
            torch.func.functional_call(model, meta, (image,))
    finally:
        model.train(mode)
