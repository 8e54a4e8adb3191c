"""The routes of a model, each on the grid where its blocks walk it."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from vmamba.analysis.scans import BlockScan, model_scans
from vmamba.ops.drawing import draw_direction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Walk(NamedTuple):
    """A route that blocks of a model walk.

    Attributes:
        title: Who walks it, and what for.
        route: (K, T) on the grid, without a class token.
        height: Rows of the grid.
        width: Its columns.
    """

    title: str
    route: Tensor
    height: int
    width: int


def model_routes(model: nn.Module, images: Tensor) -> list[Walk]:
    """The distinct routes of a model, taken from the calls of the operator while it looks at ``images``.

    A single sequence that passes several times over the grid counts as that many directions.

    Raises:
        UserError: if the model does not scan.
    """
    walks: dict[tuple, list[BlockScan]] = {}
    for scan in model_scans(model, images):
        stage = scan.block.rpartition("blocks.")[0]
        walks.setdefault((stage, scan.height, scan.width, tuple(scan.call.route.shape)), []).append(scan)
    drawn = []
    for (stage, height, width, _), scans in walks.items():
        scan = scans[0]
        who = f"{stage.rstrip('.') or f'{len(scans)} blocks'}, {height} x {width}"
        drawn.append(Walk(_named(who, scan), _on_grid(scan, scan.call.route), height, width))
        params = scan.call.param_route
        if params is not None and not torch.equal(params, scan.call.route):
            distinct = params[:1] if (params == params[0]).all() else params
            drawn.append(Walk(f"{who}: order of dt, B and C", _on_grid(scan, distinct), height, width))
    return drawn


def _named(who: str, scan: BlockScan) -> str:
    if scan.class_token is not None:
        return f"{who}, a class token between"
    passes = scan.call.route.shape[1] // (scan.height * scan.width)
    return f"{who}: one sequence of {passes} passes" if passes > 1 else who


def _on_grid(scan: BlockScan, route: Tensor) -> Tensor:
    route = route.cpu()
    if scan.class_token is not None:
        kept = [visits[visits != scan.class_token] for visits in route]
        route = torch.stack([visits - (visits > scan.class_token).int() for visits in kept])
    passes = route.shape[1] // (scan.height * scan.width)
    return route.unflatten(1, (passes, -1)).flatten(0, 1) if passes > 1 else route


def draw_model_routes(walks: list[Walk], title: str | None = None) -> "Figure":
    """Draws routes, a row each, a panel a direction; each panel as :func:`vmamba.ops.draw_route` draws it."""
    from matplotlib.figure import Figure

    columns = max(len(walk.route) for walk in walks)
    side = 2.6
    heights = [side * walk.height / walk.width + 0.5 for walk in walks]
    figure = Figure(figsize=(max(side * columns, 5.0), sum(heights) + 0.3), layout="constrained")
    rows = figure.subfigures(len(walks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for row, walk in zip(rows, walks, strict=True):
        row.suptitle(walk.title, fontsize=10)
        for panel, visits in zip(row.subplots(1, columns, squeeze=False)[0], _padded(walk, columns), strict=True):
            if visits is None:
                panel.set_axis_off()
            else:
                draw_direction(panel, visits, walk.height, walk.width)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _padded(walk: Walk, columns: int) -> list[Tensor | None]:
    return [*walk.route, *[None] * (columns - len(walk.route))]
