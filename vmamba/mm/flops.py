"""`vmamba flops-dense`: what a whole detector or segmentor costs, in true operations, and the figures that papers have.

Nothing is computed: everything runs on the meta device. As in the tools of MMDetection and MMSegmentation, a detector
of two stages counts its second one on a fixed number of boxes, post-processing is free, and so is a segmentor's
auxiliary head.
"""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vmamba.analysis.flops import Cost, Rule, counted_by, published_rule
from vmamba.errors import UserError
from vmamba.mm.plainmamba_adapter import Exchange
from vmamba.mm.settings import load_settings
from vmamba.models._backbone import Backbone
from vmamba.models.plainmamba import PlainMamba
from vmamba.models.spatialmamba import SpatialMamba

BOXES = 1000
"""Boxes of the first stage that the second one classifies."""

MASKS = 100
"""Boxes whose masks it draws."""


def published_size(cfg: Config) -> tuple[int, int]:
    """Height and width of the image that published tables count with.

    A detector's is 800x1280 (the shorter side of a test image is 800), or the square that it pads every image to. A
    segmentor's is four times as wide as the crops it was trained on, or the window that it slides over an image.
    """
    if cfg.default_scope == "mmseg":
        height, width = cfg.model.data_preprocessor.size
        return (height, width) if cfg.model.test_cfg.mode == "slide" else (height, 4 * width)
    side = cfg.model.data_preprocessor.pad_size_divisor
    return (side, side) if side > 800 else (800, 1280)


def build_on_meta(cfg: Config) -> Any:
    """The detector or segmentor of a config, in eval mode and without memory for its weights."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device("meta"):
        return MODELS.build(cfg.model).eval()


def count_dense(model: Any, height: int, width: int) -> Cost:
    """The true cost of one image through a model of :func:`build_on_meta`."""
    with FlopCounterMode(display=False) as counter:
        dense_forward(model, height, width)
    flops = counter.get_total_flops()
    return Cost(params=sum(x.numel() for x in model.parameters()), macs=flops // 2, flops=flops)


def dense_forward(model: Any, height: int, width: int) -> None:
    """One image through a model of :func:`build_on_meta`, shapes only."""
    for module in model.modules():
        if isinstance(module, Exchange):
            module.attend = partial(_attend_by_shape, module)  # type: ignore[method-assign]
    with torch.no_grad(), torch.device("meta"):
        maps = model.extract_feat(torch.empty(1, 3, height, width))
        if hasattr(model, "decode_head"):
            model.decode_head(maps)
        elif hasattr(model, "roi_head"):
            model.rpn_head(maps)
            _second_stage(model.roi_head)
        else:
            model.bbox_head(maps)


def _second_stage(roi_head: Any) -> None:
    """The heads behind the boxes; those of a cascade all see all boxes, their masks too."""
    cascade = isinstance(roi_head.bbox_head, nn.ModuleList)
    box_heads = roi_head.bbox_head if cascade else [roi_head.bbox_head]
    mask_heads = roi_head.mask_head if cascade else [roi_head.mask_head]
    for head in box_heads:
        head(torch.empty(BOXES, head.in_channels, *head.roi_feat_size))
    for head in mask_heads:
        head(torch.empty(BOXES if cascade else MASKS, head.in_channels, *head.roi_feat_size))


def _attend_by_shape(exchange: Exchange, tokens: Tensor, places: Tensor, seen: Tensor, sizes: Any) -> Tensor:
    """The linear layers of a deformable attention, which looks at values and so cannot run on the meta device."""
    query, attention = exchange.query_norm(tokens), exchange.attn
    attention.value_proj(exchange.feat_norm(seen))
    attention.sampling_offsets(query)
    attention.attention_weights(query)
    return attention.output_proj(query)


# ---------------------------------------------------------------------------------------------------------------------
# Published rules
# ---------------------------------------------------------------------------------------------------------------------


def published_dense_flops(model: Any, height: int, width: int) -> int | None:
    """The cost of one image through a model of :func:`build_on_meta`, by the rule of the backbone's authors.

    Returns:
        None where the authors published neither figures nor a rule.
    """
    backbone = next(module for module in model.modules() if isinstance(module, Backbone))
    rule = dense_rule(backbone)
    if rule is None:
        return None
    if isinstance(backbone, PlainMamba):
        with counted_by({**rule, **MMCV_RULE}, model) as costs:
            dense_forward(model, height, width)
        return sum(costs)
    with inside(backbone) as is_inside, counted_by(rule, backbone) as costs, OperatorCount(is_inside) as outside:
        dense_forward(model, height, width)
    return sum(costs) + outside.total


def dense_rule(backbone: nn.Module) -> Rule | None:
    """The rule that the authors of a backbone count it by in a detector or segmentor."""
    rule = published_rule(backbone)
    if rule is not None and isinstance(backbone, SpatialMamba):
        # The classifier was counted in training mode, where a batch norm costs more.
        return {**rule, nn.BatchNorm2d: _two_per_element}
    return rule


def _two_per_element(module: nn.Module, x: Tensor, y: Tensor) -> int:
    return 2 * x.numel()


def _transposed_conv(module: Any, x: Tensor, y: Tensor) -> int:
    return x[0, 0].numel() * module.weight.numel() + y.numel()


def _one_per_element(module: nn.Module, x: Tensor, y: Tensor) -> int:
    return x.numel()


MMCV_RULE: Rule = {
    nn.ConvTranspose2d: _transposed_conv,
    nn.SyncBatchNorm: _two_per_element,
    nn.MaxPool2d: _one_per_element,
    nn.AdaptiveAvgPool2d: _one_per_element,
}
"""What MMCV's counter, PlainMamba's, adds in necks and heads; it sees modules, not functions."""


@contextmanager
def inside(module: nn.Module) -> Iterator[Callable[[], bool]]:
    """Within it, tells whether ``module`` or one of its parts is being called."""
    depth = 0

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    hooks = [part.register_forward_pre_hook(enter) for part in module.modules()]
    hooks += [part.register_forward_hook(leave) for part in module.modules()]
    try:
        yield lambda: depth > 0
    finally:
        for hook in hooks:
            hook.remove()


class OperatorCount(TorchDispatchMode):
    """Adds up what operators cost in fvcore's and MMEngine's tables: a multiply-add is one.

    Args:
        is_free: Tells whether an operator is left out now.
    """

    def __init__(self, is_free: Callable[[], bool]) -> None:
        super().__init__()
        self.is_free = is_free
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cost = OPERATORS.get(func.overloadpacket)
        if cost is not None and not self.is_free():
            self.total += cost(args, out[0] if isinstance(out, tuple) else out)
        return out


OperatorCost = Callable[[Any, Tensor], int]
"""Counts one call of an operator from (arguments, output)."""


def _convolution(args: Any, out: Tensor) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    return weight.numel() * math.prod((x if transposed else out).shape[2:]) * x.shape[0]


def _matmul(args: Any, out: Tensor) -> int:
    return out.numel() * args[0].shape[-1]


def _addmm(args: Any, out: Tensor) -> int:
    return out.numel() * args[1].shape[-1]


def _per_input(operations: int) -> OperatorCost:
    return lambda args, out: operations * args[0].numel()


def _per_output(operations: int) -> OperatorCost:
    return lambda args, out: operations * out.numel()


aten = torch.ops.aten
OPERATORS: dict[Any, OperatorCost] = {
    aten.convolution: _convolution,
    aten.mm: _matmul,
    aten.bmm: _matmul,
    aten.addmm: _addmm,
    aten.native_layer_norm: _per_input(5),
    aten.native_batch_norm: _per_input(2),
    aten._native_batch_norm_legit_no_training: _per_input(2),
    aten.upsample_nearest2d: _per_output(1),
    aten.upsample_bilinear2d: _per_output(4),
    aten._adaptive_avg_pool2d: _per_input(1),
    aten.mean: _per_input(1),  # what an adaptive pooling to a single value becomes
    aten.grid_sampler_2d: _per_output(4),
}
"""Operators by packet; the others are free."""


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: ArgumentParser) -> None:
    """What to count."""
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="configurations: files, or names from configs/")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="of the image (default: as in published tables)",
    )


def run(args: Namespace) -> None:
    """Print a line for each config."""
    print(f"{'config':50} {'image':>10} {'params M':>10} {'GFLOPs as published':>20} {'GMACs':>10}")
    for name in args.configs:
        print(_line(name, args.size), flush=True)


def _line(name: str, size: list[int] | None) -> str:
    cfg = load_settings(name)
    height, width = size or published_size(cfg)
    if min(height, width) < 1:
        raise UserError(f"--size is {height} {width}, expected a positive height and width")
    model = build_on_meta(cfg)
    cost = count_dense(model, height, width)
    published = published_dense_flops(model, height, width)
    as_published = "-" if published is None else f"{published / 1e9:.3f}"
    return (
        f"{Path(name).stem:50} {f'{height}x{width}':>10} {cost.params / 1e6:10.3f} {as_published:>20} "
        f"{cost.macs / 1e9:10.3f}"
    )
