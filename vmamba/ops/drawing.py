"""Routes as pictures: every direction on its own grid, coloured from the first step to the last."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vmamba.ops.routes import check_route

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LARGEST_DOTTED = 32
"""Rows or columns up to which the positions themselves are drawn."""


def draw_route(route: Tensor, height: int, width: int, title: str | None = None) -> "Figure":
    """Draws a route on its grid, one panel a direction: a line from step to step, dark at the start, bright at the end.

    Args:
        route: int32 (K, T), for a grid of ``height`` x ``width``. Steps that read nothing (-1) are left out.
        title: Written above the panels.

    Returns:
        A matplotlib figure, not shown; ``figure.savefig("route.png")`` or ``"route.svg"`` writes it.

    Raises:
        ValueError: if ``route`` is no (K, T) table for this grid.
    """
    from matplotlib.figure import Figure

    check_route(route, height * width)
    if route.dim() != 2:
        raise ValueError(f"draw one image's route, (K, T), at a time; got {tuple(route.shape)}")
    directions = route.shape[0]
    columns = min(directions, 4)
    rows = -(-directions // columns)
    side = 2.6
    figure = Figure(figsize=(side * columns, side * height / width * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for direction, panel in enumerate(panels):
        if direction < directions:
            draw_direction(panel, route[direction].cpu(), height, width)
            panel.set_title(f"direction {direction}", fontsize=9)
        else:
            panel.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def draw_direction(panel: "Axes", visits: Tensor, height: int, width: int) -> None:
    """Draws one direction, (T,), into a panel of matplotlib; what :func:`draw_route` does for each."""
    from matplotlib.collections import LineCollection

    visits = visits[visits >= 0].long()
    points = torch.stack([visits % width, visits // width], dim=1).float()
    segments = torch.stack([points[:-1], points[1:]], dim=1)
    # A jump (the end of a row to the start of the next) is drawn thin, so that the eye follows the walk.
    lengths = (segments[:, 1] - segments[:, 0]).abs().amax(1)
    jumps = lengths > 1.5 * lengths.median() if len(lengths) else lengths > 0
    stroke = min(2.0, 40.0 / max(height, width))
    lines = LineCollection(
        [tuple(map(tuple, segment)) for segment in segments.tolist()],
        array=torch.arange(len(segments)).numpy(),
        cmap="plasma",
        linewidths=[0.25 * stroke if jump else stroke for jump in jumps.tolist()],
    )
    panel.add_collection(lines)
    if len(points):
        panel.plot(*points[0], marker="o", color="black", markersize=6)
        panel.plot(*points[-1], marker="s", color="black", markersize=5, fillstyle="none")
    panel.set(xlim=(-0.6, width - 0.4), ylim=(height - 0.4, -0.6), aspect="equal", xticks=[], yticks=[])
    if max(height, width) <= _LARGEST_DOTTED:
        for row in range(height):
            panel.scatter(range(width), [row] * width, s=3, color="0.75", zorder=0)
