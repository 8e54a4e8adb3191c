"""Feature maps as pictures: principal components as colours, or the norm over channels as brightness."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from vmamba.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

View = Literal["pca", "norm"]
"""How a map becomes a picture: see :func:`pca_colours` and :func:`channel_norm`."""

_MOST_MAPS = 4


class FeatureMap(NamedTuple):
    """What one part of a model made of a batch.

    Attributes:
        name: The part, as timm's ``feature_info`` has it.
        values: (batch, C, h, w).
    """

    name: str
    values: Tensor


def feature_maps(model: nn.Module, images: Tensor, indices: Sequence[int] | None = None) -> list[FeatureMap]:
    """Maps behind stages, or behind blocks where a model has one scale, in eval mode.

    Args:
        model: Any model with timm's ``forward_intermediates``.
        images: (batch, C, H, W).
        indices: Which, counted from 0; all of at most four, otherwise four at equal distances, the last among them.

    Raises:
        UserError: if the model has no intermediates, or none of a given index.
    """
    module: Any = model
    if not hasattr(module, "forward_intermediates"):
        raise UserError(f"{type(model).__name__} has no forward_intermediates, which its maps are read with")
    names = [info["module"] for info in module.feature_info]
    taken = _spread(len(names)) if indices is None else sorted(set(indices))
    wrong = [index for index in taken if not 0 <= index < len(names)]
    if wrong:
        raise UserError(f"{type(model).__name__} has no map {wrong[0]}; there are 0 to {len(names) - 1}")
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            maps = module.forward_intermediates(images, indices=taken, intermediates_only=True)
    finally:
        model.train(mode)
    return [FeatureMap(names[index], values) for index, values in zip(taken, maps, strict=True)]


def _spread(count: int) -> list[int]:
    if count <= _MOST_MAPS:
        return list(range(count))
    return [round((i + 1) * count / _MOST_MAPS) - 1 for i in range(_MOST_MAPS)]


def pca_colours(values: Tensor) -> Tensor:
    """The three strongest principal components of a batch of maps as red, green and blue.

    The components are those of all positions of all images together, so that one colour means one thing in the batch.
    Each is stretched so that the middle 98 % of its values fill the range. A component's sign is arbitrary; it is
    chosen such that its largest weight is positive.

    Args:
        values: (batch, C, h, w).

    Returns:
        (batch, 3, h, w) in [0, 1]; components that do not exist (less than three channels or positions) are grey.
    """
    batch, channels, height, width = values.shape
    rows = values.double().permute(0, 2, 3, 1).reshape(-1, channels)
    rows = rows - rows.mean(0)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    directions = directions[:3]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    scores = rows @ (directions * largest.sign()).t()
    low, high = scores.quantile(torch.tensor([0.01, 0.99], dtype=torch.float64, device=rows.device), dim=0)
    span = high - low
    flat = span <= 1e-9 * span.max()
    colours = ((scores - low) / torch.where(flat, 1.0, span)).clamp(0, 1)
    colours = torch.where(flat, 0.5, colours)
    colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]), value=0.5)
    return colours.reshape(batch, height, width, 3).permute(0, 3, 1, 2).float()


def channel_norm(values: Tensor) -> Tensor:
    """The Euclidean norm over channels, (batch, C, h, w) to (batch, h, w)."""
    return values.float().norm(dim=1)


def draw_features(
    pictures: Tensor, maps: Sequence[FeatureMap], views: Sequence[View] = ("pca",), title: str | None = None
) -> "Figure":
    """Draws maps beside their images: for each image one row for each view.

    Args:
        pictures: The images in colours in [0, 1], (batch, 3, H, W).
        maps: Maps of the same images.
        views: One or both of ``"pca"`` and ``"norm"``.
        title: Written above the panels.

    Returns:
        A matplotlib figure, not shown.

    Raises:
        ValueError: for a view of another name.
    """
    from matplotlib.figure import Figure

    unknown = [view for view in views if view not in get_args(View)]
    if unknown or not views:
        raise ValueError(f"views must be of {', '.join(get_args(View))}, got {list(views)}")
    height, width = pictures.shape[-2:]
    side = 1.9
    rows = len(pictures) * len(views)
    figure = Figure(figsize=(side * (1 + len(maps)), (side * height / width + 0.1) * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, 1 + len(maps), squeeze=False)
    for panel in grid.flat:
        panel.set_axis_off()
    for offset, view in enumerate(views):
        for panels, picture in zip(grid[offset :: len(views)], pictures, strict=True):
            panels[0].imshow(picture.permute(1, 2, 0).cpu().numpy())
        for column, feature in enumerate(maps, 1):
            shown = pca_colours(feature.values).permute(0, 2, 3, 1) if view == "pca" else channel_norm(feature.values)
            for panel, values in zip(grid[offset :: len(views), column], shown, strict=True):
                panel.imshow(values.cpu().numpy(), cmap="magma")
    grid[0, 0].set_title("image", fontsize=9)
    for panel, feature in zip(grid[0, 1:], maps, strict=True):
        panel.set_title(f"{feature.name}\n{' x '.join(map(str, feature.values.shape[-2:]))}", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure
