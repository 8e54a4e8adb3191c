"""The effective receptive field: which pixels the feature in the middle of the last map depends on, and how much.

As Luo et al. define it (Understanding the Effective Receptive Field in Deep Convolutional Neural Networks, NeurIPS
2016): the gradient of the central feature with respect to the image, averaged over images. The feature is the sum of
the positive channels of the last map before its norm, as in the pictures that were published for large kernels and for
VMamba: over all channels, the sum behind a norm would be constant. Gradients are averaged by magnitude.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES = (0.2, 0.3, 0.5, 0.99)
"""Shares of the field for which areas are usually reported."""


@dataclass(frozen=True)
class Square:
    """The smallest square that holds a given share of a receptive field, wherever it lies.

    Attributes:
        side: In pixels. Where it is longer than a side of the image, the square is cut there.
        top: First row.
        left: First column.
        area: Its share of the image's pixels.
    """

    side: int
    top: int
    left: int
    area: float


@dataclass(frozen=True)
class ReceptiveField:
    """An effective receptive field.

    Attributes:
        heat: Each pixel's share of the gradient, (H, W) in float64; sums to 1.
        images: How many were averaged.
    """

    heat: Tensor
    images: int

    def square(self, share: float) -> Square:
        """The smallest square that holds at least ``share``, which is in (0, 1].

        It need not lie in the middle: the padding of strided convolutions moves the field of the central feature.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        integral = F.pad(self.heat.cumsum(0).cumsum(1), (1, 0, 1, 0))
        enough = share * float(integral[-1, -1]) * (1 - 1e-9)  # the sums are rounded
        too_small, side = 0, max(self.heat.shape)
        while side - too_small > 1:
            middle = (side + too_small) // 2
            if float(_window_sums(integral, middle).max()) >= enough:
                side = middle
            else:
                too_small = middle
        sums = _window_sums(integral, side)
        top, left = divmod(int(sums.argmax()), sums.shape[1])
        height, width = (min(side, length) for length in self.heat.shape)
        return Square(side, top, left, height * width / self.heat.numel())


def _window_sums(integral: Tensor, side: int) -> Tensor:
    """The sum in each square of that side, cut to the size of the image, from sums over rectangles at the origin."""
    rows, columns = (min(side, length - 1) for length in integral.shape)
    above, below = integral[:-rows], integral[rows:]
    return below[:, columns:] - below[:, :-columns] - above[:, columns:] + above[:, :-columns]


def effective_receptive_field(model: nn.Module, batches: Iterable[Tensor]) -> ReceptiveField:
    """Measures the effective receptive field of a model, in eval mode.

    Args:
        model: Any model with timm's ``forward_intermediates``.
        batches: Images of one size as the model takes them, (batch, C, H, W).

    Raises:
        UserError: if the model has no intermediates, or the gradient is zero everywhere or not finite.
        ValueError: if there are no images.
    """
    if not hasattr(model, "forward_intermediates"):
        raise UserError(
            f"{type(model).__name__} has no forward_intermediates, which a receptive field is measured with"
        )
    total, images = torch.zeros(()), 0
    mode = model.training
    model.eval()
    try:
        for batch in batches:
            total = total + _central_gradient(model, batch).abs().sum((0, 1)).double().cpu()
            images += len(batch)
    finally:
        model.train(mode)
    if images == 0:
        raise ValueError("a receptive field is averaged over images; there are none")
    mass = float(total.sum())
    if not 0 < mass < float("inf"):
        raise UserError("the gradient of the central feature is zero or not finite; are the weights sound?")
    return ReceptiveField(total / mass, images)


def _central_gradient(model: Any, images: Tensor) -> Tensor:
    """The gradient to the images, (batch, C, H, W)."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        last = model.forward_intermediates(images, indices=1, norm=False, intermediates_only=True)[-1]
        rows, columns = last.shape[-2:]
        feature = last[..., rows // 2, columns // 2].relu().sum()
        return torch.autograd.grad(feature, images)[0]


def draw_receptive_fields(fields: Sequence[tuple[str, ReceptiveField]], title: str | None = None) -> "Figure":
    """Draws receptive fields side by side: each pixel's share to the power of 0.2, and the square that holds half.

    Args:
        fields: Each with its name.
        title: Written above the panels.

    Returns:
        A matplotlib figure, not shown.
    """
    from matplotlib.figure import Figure

    height, width = fields[0][1].heat.shape
    side = 3.4
    figure = Figure(figsize=(side * len(fields), side * height / width + 0.9), layout="constrained")
    for panel, (name, field) in zip(figure.subplots(1, len(fields), squeeze=False)[0], fields, strict=True):
        _draw_field(panel, name, field)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _draw_field(panel: "Axes", name: str, field: ReceptiveField) -> None:
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Rectangle

    values = (field.heat / field.heat.max()).numpy()
    panel.imshow(values, cmap="viridis", norm=PowerNorm(0.2, vmin=0, vmax=1))
    half = field.square(0.5)
    corner = (half.left - 0.5, half.top - 0.5)
    panel.add_patch(Rectangle(corner, half.side, half.side, fill=False, color="white", linestyle="--"))
    panel.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(values.shape[0] - 0.5, -0.5), xticks=[], yticks=[])
    panel.set_title(f"{name}\nhalf of it within {half.side} x {half.side} px", fontsize=9)
