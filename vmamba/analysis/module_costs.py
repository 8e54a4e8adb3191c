"""What each part of a model costs, by torch's FlopCounter: by module, and by kind of operation."""

from dataclasses import dataclass

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vmamba.analysis.flops import InputSize, forward_on_meta

SCAN_FORMULA = (
    "a scan: 9 N + 1 operations for each direction, step and channel (N states; the skip), 2 R more where it expands "
    "its step sizes from rank R"
)


@dataclass(frozen=True)
class ModuleCost:
    """What a module and all in it cost for one image.

    Attributes:
        name: As in ``model.named_modules()``; empty for the model itself.
        kind: Name of its class.
        params: Its parameters.
        flops: Operations of its matrix products, convolutions and scans.
    """

    name: str
    kind: str
    params: int
    flops: int

    @property
    def depth(self) -> int:
        return self.name.count(".") + 1 if self.name else 0

    @property
    def macs(self) -> int:
        """Half of ``flops``."""
        return self.flops // 2


@dataclass(frozen=True)
class Breakdown:
    """The cost of a model for one image, taken apart.

    Attributes:
        modules: The model, and its modules down to some depth, in the model's order; those that cost nothing left out.
        operators: Operations by torch's name of the operator, such as ``"convolution"``.
    """

    modules: list[ModuleCost]
    operators: dict[str, int]

    @property
    def flops(self) -> int:
        return sum(self.operators.values())


def break_down(model: nn.Module, input_size: InputSize = 224, depth: int = 2) -> Breakdown:
    """Takes the cost of one image in eval mode apart, on the meta device: nothing is computed.

    Args:
        model: Any model of images.
        input_size: Side, (height, width) or (channels, height, width) of the image; three channels unless said.
        depth: How deep the modules go: 1 for those that the model itself holds.
    """
    with FlopCounterMode(display=False) as counter:
        forward_on_meta(model, input_size)
    counts = counter.get_flop_counts()
    root = type(model).__name__  # with which the counter starts all names
    modules = []
    for name, module in model.named_modules():
        flops = sum(counts.get(f"{root}.{name}" if name else "Global", {}).values())
        cost = ModuleCost(name, type(module).__name__, sum(p.numel() for p in module.parameters()), flops)
        if cost.depth <= depth and (cost.params or cost.flops):
            modules.append(cost)
    operators = {str(op).split(".")[-1]: flops for op, flops in counts.get("Global", {}).items()}
    return Breakdown(modules, operators)
