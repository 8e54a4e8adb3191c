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
from torch import Tensor, nn

from vmamba.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES = (0.2, 0.3, 0.5, 0.99)
"""Shares of the field for which areas are usually reported."""


@dataclass(frozen=True)
class Square:
    """The smallest square around the centre that holds a given share of a receptive field.

    Attributes:
        side: In pixels; beyond the image it counts as if that went on, empty.
        area: The part of the image inside, as a share of its pixels.
    """

    side: int
    area: float


@dataclass(frozen=True)
class ReceptiveField:
    """An effective receptive field.

    Attributes:
        heat: Each pixel's share of the gradient, (H, W) in float64; sums to 1.
        centre: (row, column) of the middle of the central feature, in pixels.
        images: How many were averaged.
    """

    heat: Tensor
    centre: tuple[float, float]
    images: int

    def square(self, share: float) -> Square:
        """The smallest square around the centre that holds at least ``share``, which is in (0, 1]."""
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        height, width = self.heat.shape
        rows = (torch.arange(height, dtype=torch.float64) - self.centre[0]).abs().unsqueeze(1)
        columns = (torch.arange(width, dtype=torch.float64) - self.centre[1]).abs().unsqueeze(0)
        distance = torch.maximum(rows, columns).flatten()
        distances, order = distance.sort()
        mass = self.heat.flatten()[order].cumsum(0)
        reached = distances[int(torch.searchsorted(mass, min(share, float(mass[-1]))))]
        return Square(side=int(2 * reached) + 1, area=float((distance <= reached).double().mean()))


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
    total, images, centre = torch.zeros(()), 0, (0.0, 0.0)
    mode = model.training
    model.eval()
    try:
        for batch in batches:
            gradient, centre = _central_gradient(model, batch)
            total = total + gradient.abs().sum((0, 1)).double().cpu()
            images += len(batch)
    finally:
        model.train(mode)
    if images == 0:
        raise ValueError("a receptive field is averaged over images; there are none")
    mass = float(total.sum())
    if not 0 < mass < float("inf"):
        raise UserError("the gradient of the central feature is zero or not finite; are the weights sound?")
    return ReceptiveField(total / mass, centre, images)


def _central_gradient(model: Any, images: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """The gradient to the images (batch, C, H, W), and where the feature's middle lies in pixels."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        last = model.forward_intermediates(images, indices=1, norm=False, intermediates_only=True)[-1]
        rows, columns = last.shape[-2:]
        feature = last[..., rows // 2, columns // 2].relu().sum()
        (gradient,) = torch.autograd.grad(feature, images)
    height, width = images.shape[-2:]
    return gradient, ((rows // 2 + 0.5) * height / rows - 0.5, (columns // 2 + 0.5) * width / columns - 0.5)


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
    top, left = (middle - half.side / 2 for middle in field.centre)
    panel.add_patch(Rectangle((left, top), half.side, half.side, fill=False, color="white", linestyle="--"))
    panel.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(values.shape[0] - 0.5, -0.5), xticks=[], yticks=[])
    panel.set_title(f"{name}\nhalf of it within {half.side} x {half.side} px", fontsize=9)
