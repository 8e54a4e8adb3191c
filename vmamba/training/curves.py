"""The curves of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vmamba.files import replaced
from vmamba.training.records import EpochRecord

CURVES_NAME = "curves.png"

_TRAIN, _RAW, _EMA, _RATE = "#9a9a9a", "#1f6fb4", "#d1495b", "#3a7d44"


def draw_curves(records: Sequence[EpochRecord], title: str, path: Path) -> None:
    """Draw loss, accuracy and learning rate over the epochs into a PNG file."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3, width_ratios=[1.2, 1.2, 0.9])
    epochs = [record.epoch for record in records]

    _line(loss, epochs, [r.train_loss for r in records], _TRAIN, "training (augmented)")
    _line(loss, epochs, [r.eval_loss for r in records], _RAW, "validation")
    _line(loss, epochs, [r.ema_loss for r in records], _EMA, "validation, EMA")
    _finish(loss, "Loss")

    _line(accuracy, epochs, [r.eval_top1 for r in records], _RAW, "top-1")
    _line(accuracy, epochs, [r.ema_top1 for r in records], _EMA, "top-1, EMA")
    _mark_best(accuracy, records)
    _finish(accuracy, "Validation accuracy (%)")

    _line(rate, epochs, [r.lr for r in records], _RATE, None)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    _finish(rate, "Learning rate")

    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _line(axes: Axes, epochs: list[int], values: Sequence[float | None], color: str, label: str | None) -> None:
    points = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value is not None]
    if points:
        marker = "o" if len(points) < 15 else ""
        axes.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.8, marker=marker, markersize=4)


def _mark_best(axes: Axes, records: Sequence[EpochRecord]) -> None:
    best = max(records, key=lambda record: record.best_top1)
    axes.plot(
        best.epoch,
        best.best_top1,
        "o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor="black",
        label=f"best: {best.best_top1:.2f}, epoch {best.epoch}{' (EMA)' if best.best_is_ema else ''}",
    )
    # The first epochs would squeeze the rest into the top edge.
    settled = sorted(record.eval_top1 for record in records)[len(records) // 4]
    spread = max(best.best_top1 - settled, 1.0)
    axes.set_ylim(max(0.0, best.best_top1 - 2.5 * spread), min(100.0, best.best_top1 + 0.3 * spread) + 0.1)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("epoch", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="best")
