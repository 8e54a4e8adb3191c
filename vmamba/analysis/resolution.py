"""Accuracy over the size of the images, as a table and a picture."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from vmamba.errors import UserError

_TOP1, _TOP5, _TRAINED = "#1f6fb4", "#9bbfe0", "#d1495b"


@dataclass(frozen=True)
class SizeRecord:
    """Accuracy at one size; percent, and the mean loss.

    Attributes:
        size: Side of the images the model sees, in pixels.
        images: How many there were.
    """

    model: str
    data: str
    split: str
    size: int
    top1: float
    top5: float
    loss: float
    images: int
    images_per_second: float


def as_csv(records: Sequence[SizeRecord]) -> str:
    """A line for each size."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(SizeRecord)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _rounded(value) for key, value in asdict(record).items()} for record in records)
    return text.getvalue()


def _rounded(value: object) -> object:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def draw(records: Sequence[SizeRecord], trained_at: int, path: Path) -> None:
    """Draws top-1 and top-5 accuracy over the size.

    Args:
        records: Of one model on the same images.
        trained_at: The size that the model was trained for, marked.
        path: Picture to write; its suffix picks the format.

    Raises:
        UserError: It cannot be written.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    records = sorted(records, key=lambda record: record.size)
    sizes = [record.size for record in records]
    axes.plot(sizes, [r.top5 for r in records], color=_TOP5, marker="o", markersize=4, label="top-5")
    axes.plot(sizes, [r.top1 for r in records], color=_TOP1, marker="o", markersize=5, label="top-1")
    axes.axvline(trained_at, color=_TRAINED, linestyle="--", linewidth=1.2, label=f"trained at {trained_at}")
    axes.set_xscale("log")
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("side of the image (pixels)")
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend()
    first = records[0]
    axes.set_title(f"{first.model} on {first.data} ({first.split}, {first.images} images)", fontsize=10, loc="left")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
