"""The implicit attention of a scan: how much of the input at each position enters the output at one of them.

Unrolled, the recurrence of :func:`vmamba.ops.selective_scan` is linear in u: the output of step t is

    y_t = D * u_t + sum over s <= t of M[t, s] * u_s
    M[t, s] = C_t . (exp(A * (dt_{s+1} + ... + dt_t)) * dt_s * B_s)

so a row of M, brought from steps back to positions, is to a scan what a row of attention is to a transformer (Ali et
al., arXiv 2403.01590; drawn for VMamba in arXiv 2401.10166). It differs from channel to channel, may be negative, and
needs no division by a decay: exponents are differences of sums, and never positive.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba.analysis.scans import BlockScan
from vmamba.ops import ScanCall

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# ---------------------------------------------------------------------------------------------------------------------
# A scan
# ---------------------------------------------------------------------------------------------------------------------


def scan_attention(call: ScanCall, position: int, image: int = 0) -> Tensor:
    """The row of a position in the implicit attention of a scan, without the skip D.

    With ``M[k, d, l]`` the result, the scan's merged output at ``position`` in channel d is the sum over k and l of
    ``M[k, d, l] * u[k, l, d]``, and D's share for every visit.

    Args:
        call: A recorded call that had C; see :func:`vmamba.ops.record_scans`.
        position: Which of the L positions the output is read at. Several visits are summed, none gives zeros.
        image: Index in the batch.

    Returns:
        (K, D, L) in float64.
    """
    length = call.u.shape[-2]
    rows = []
    for direction in _directions(call, image):
        assert direction.C is not None
        row = direction.decay.new_zeros(length, call.u.shape[-1])
        for step in (direction.visits == position).nonzero().flatten().tolist():
            direction.add_inputs(row, step, direction.C[step])
        rows.append(row.t())
    return torch.stack(rows)


def fused_scan_attention(scan: BlockScan, position: int, image: int = 0) -> Tensor:
    """:func:`scan_attention` where the operator returns states that are fused in the plane before C reads them.

    Args:
        scan: A scan that has ``fusion``, of Spatial-Mamba.
        position: Which of the L positions the output is read at.
        image: Index in the batch.

    Returns:
        (K, D, L) in float64.
    """
    assert scan.fusion is not None
    with torch.no_grad():
        _, _, C = scan.fusion.project(scan.call.u[image : image + 1])
    observed = C[0, position].double()  # (K, N), both 1
    shares = _fusion_shares(scan, position)
    (direction,) = _directions(scan.call, image)
    row = torch.zeros_like(shares)
    for step in (shares != 0).any(-1).nonzero().flatten().tolist():
        direction.add_inputs(row, step, shares[step].unsqueeze(-1) * observed)
    return row.t().unsqueeze(0)


def _fusion_shares(scan: BlockScan, position: int) -> Tensor:
    """What the fused state at ``position`` takes of the state at each position: (L, D), the fusion being linear."""
    assert scan.fusion is not None
    channels = scan.call.u.shape[-1]
    with torch.enable_grad():
        states = torch.zeros(
            1, scan.height, scan.width, channels, dtype=torch.float64, device=scan.call.u.device, requires_grad=True
        )
        fused = scan.fusion.fusion(states).flatten(1, 2)[0, position]
        (shares,) = torch.autograd.grad(fused.sum(), states)
    return shares[0].flatten(0, 1)


@dataclass(frozen=True)
class _Direction:
    """One direction of one image, in scan order and float64.

    Attributes:
        visits: Position of each of the T steps, or -1: (T,).
        decay: The exponent of the decay since the first step, (T, D, N).
        gain: dt * B, (T, D, N).
        C: (T, N), or None.
        segment: Counts the resets so far, (T,).
    """

    visits: Tensor
    decay: Tensor
    gain: Tensor
    C: Tensor | None
    segment: Tensor

    def add_inputs(self, row: Tensor, step: int, readout: Tensor) -> None:
        """Adds to ``row`` (L, D) what ``readout`` (D, N) or (N,) of the state at ``step`` holds of each input."""
        past = slice(0, step + 1)
        reached = (self.segment[past] == self.segment[step]) & (self.visits[past] >= 0)
        share = torch.exp(self.decay[step] - self.decay[past][reached]) * self.gain[past][reached]
        row.index_add_(0, self.visits[past][reached], (share * readout).sum(-1))


def _directions(call: ScanCall, image: int) -> Iterator[_Direction]:
    route = _of_image(call.route, image).long()
    params = route if call.param_route is None else _of_image(call.param_route, image).long()
    reset = torch.zeros_like(route) if call.reset is None else _of_image(call.reset, image).long()
    for k in range(route.shape[0]):
        dt = _along(call.dt[image], k, params[k])
        if call.dt_weight is not None:
            dt = dt @ _of_direction(call.dt_weight, k).double().t()
        if call.dt_bias is not None:
            dt = dt + _of_direction(call.dt_bias, k).double()
        dt = (F.softplus(dt) if call.dt_softplus else dt).unsqueeze(-1)
        yield _Direction(
            visits=route[k],
            decay=(dt * _of_direction(call.A, k).double()).cumsum(0),
            gain=dt * _along(call.B[image], k, params[k]).unsqueeze(1),
            C=None if call.C is None else _along(call.C[image], k, params[k]),
            segment=reset[k].cumsum(0),
        )


def _along(x: Tensor, direction: int, positions: Tensor) -> Tensor:
    """(L, K or 1, features) of a direction, read at ``positions``, zero where nothing is read: (T, features)."""
    values = x[:, direction if x.shape[1] > 1 else 0].double()
    return values[positions.clamp(min=0)] * (positions >= 0).unsqueeze(-1)


def _of_direction(x: Tensor, direction: int) -> Tensor:
    return x[direction if x.shape[0] > 1 else 0]


def _of_image(table: Tensor, image: int) -> Tensor:
    return table[image] if table.dim() == 3 else table


# ---------------------------------------------------------------------------------------------------------------------
# A block of a model
# ---------------------------------------------------------------------------------------------------------------------

Place = tuple[float, float]
"""A point of an image: (from the top, from the left), as shares of its height and width, each in [0, 1)."""

CLASS_TOKEN = "class"


@dataclass(frozen=True)
class GridAttention:
    """The implicit attention of a block's scan at a place, on the scanned grid.

    Attributes:
        weights: Signed, by direction and channel: (K, D, height, width), float64. The directions are those that visit
            the place.
        directions: Their numbers.
        query: (row, column) of the grid; None for the class token.
        class_token: Weights of the class token, (K, D); None where there is none.
    """

    weights: Tensor
    directions: list[int]
    query: tuple[int, int] | None
    class_token: Tensor | None = None

    @property
    def strength(self) -> Tensor:
        """The mean magnitude over channels, by direction: (K, height, width)."""
        return self.weights.abs().mean(1)

    @property
    def merged_strength(self) -> Tensor:
        """The mean magnitude over channels of the sum of the directions: (height, width)."""
        return self.weights.sum(0).abs().mean(0)


def grid_attention(scan: BlockScan, place: Place | str = (0.5, 0.5), image: int = 0) -> GridAttention:
    """The implicit attention of a block's scan at a place of the image.

    Args:
        scan: One of :func:`vmamba.analysis.scans.model_scans`.
        place: A point of the image, or ``"class"`` for the class token.
        image: Index in the batch.

    Raises:
        ValueError: for a place outside the image, or ``"class"`` where there is no class token.
    """
    if isinstance(place, str):
        if place != CLASS_TOKEN or scan.class_token is None:
            raise ValueError(f"{scan.block} has no token '{place}'; give a place of the image")
        query, position = None, scan.class_token
    else:
        if not all(0 <= share < 1 for share in place):
            raise ValueError(f"a place is two shares in [0, 1), from the top and from the left; got {place}")
        query = int(place[0] * scan.height), int(place[1] * scan.width)
        position = scan.position(*query)
    if scan.fusion is not None:
        weights = fused_scan_attention(scan, position, image)
        visiting = [0]  # the fusion reaches every position
    else:
        weights = scan_attention(scan.call, position, image)
        visited = (_of_image(scan.call.route, image) == position).any(-1)
        visiting = visited.nonzero().flatten().tolist()
        weights = weights[visiting]
    token = None if scan.class_token is None else weights[..., scan.class_token]
    return GridAttention(scan.to_grid(weights), visiting, query, token)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def draw_attention(
    pictures: Tensor, attentions: Sequence[Sequence[GridAttention]], title: str | None = None
) -> "Figure":
    """Draws the attention of a block's scans, a row an image: the image, then each direction, then their sum.

    Colours grow with the square root of the strength, since influence falls off steeply with distance. Every panel has
    a scale of its own.

    Args:
        pictures: The images in colours in [0, 1], (batch, 3, H, W).
        attentions: For each image, one for each scan of the block.
        title: Written above the panels.

    Returns:
        A matplotlib figure, not shown.
    """
    from matplotlib.figure import Figure

    rows = [
        [panel for number, attention in enumerate(scans) for panel in _panels(attention, number, len(scans))]
        for scans in attentions
    ]
    columns = 1 + max(map(len, rows))
    height, width = pictures.shape[-2:]
    side = 2.2
    figure = Figure(
        figsize=(max(side * columns, 5.5), (side * height / width + 0.3) * len(rows) + 0.4), layout="constrained"
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    grid[0, 0].set_title("image", fontsize=9)
    for axes, picture, scans, panels in zip(grid, pictures, attentions, rows, strict=True):
        for panel in axes:
            panel.set_axis_off()
        axes[0].imshow(picture.permute(1, 2, 0).cpu().numpy())
        _mark(axes[0], scans[0], height, width)
        for panel, (name, strength, attention) in zip(axes[1:], panels, strict=False):
            _draw_strength(panel, name, strength, attention)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _panels(attention: GridAttention, number: int, scans: int) -> list[tuple[str, Tensor, GridAttention]]:
    scan = f"scan {number}" if scans > 1 else ""
    if len(attention.directions) == 1:
        which = "" if attention.weights.shape[0] == 1 and scan else f"direction {attention.directions[0]}"
        return [(scan or which, attention.strength[0], attention)]
    panels = [
        (f"{scan} direction {direction}".strip(), strength, attention)
        for direction, strength in zip(attention.directions, attention.strength, strict=True)
    ]
    return [*panels, (f"{scan} sum".strip(), attention.merged_strength, attention)]


def _draw_strength(panel: "Axes", name: str, strength: Tensor, attention: GridAttention) -> None:
    from matplotlib.colors import PowerNorm

    values = strength.cpu().numpy()
    panel.imshow(values, cmap="magma", norm=PowerNorm(0.5, vmin=0, vmax=max(values.max(), 1e-30)))
    panel.set_title(name, fontsize=9)
    _mark(panel, attention, *strength.shape)


def _mark(panel: "Axes", attention: GridAttention, height: int, width: int) -> None:
    """A ring around the place on a panel of height x width."""
    if attention.query is None:
        return
    rows, columns = attention.weights.shape[-2:]
    row, column = ((index + 0.5) for index in attention.query)
    panel.plot(
        column / columns * width - 0.5, row / rows * height - 0.5,
        marker="o", color="cyan", markersize=9, fillstyle="none", markeredgewidth=1.4,
    )  # fmt: skip
