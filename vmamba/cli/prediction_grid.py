"""The picture that `vmamba predict` writes: images with their answers."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vmamba.files import replaced

if TYPE_CHECKING:
    from vmamba.cli.predict import Prediction

MOST_PICTURES = 24

_COLUMNS = 6
_ANSWERS = 3
_NAME_LENGTH = 24
_BAR, _BAR_FIRST = "#c9d6e3", "#1f6fb4"


def draw_predictions(predictions: "Sequence[Prediction]", path: Path) -> None:
    """Draw images with bars for their likeliest classes.

    Args:
        predictions: At most :data:`MOST_PICTURES`.
        path: Picture to write; its suffix picks the format.
    """
    columns = min(_COLUMNS, len(predictions))
    rows = math.ceil(len(predictions) / columns)
    answers = min(_ANSWERS, max(len(prediction.answers) for prediction in predictions))
    bar_height = 0.16 * answers
    figure = Figure(figsize=(2.1 * columns, (2.4 + bar_height * 1.6) * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[2.0, bar_height * 1.6] * rows)
    for index, prediction in enumerate(predictions):
        row, column = divmod(index, columns)
        _draw_image(figure.add_subplot(grid[2 * row, column]), prediction)
        _draw_answers(figure.add_subplot(grid[2 * row + 1, column]), prediction, answers)
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _draw_image(axes: Axes, prediction: "Prediction") -> None:
    axes.imshow(prediction.picture)
    axes.set_title(_shorten(Path(prediction.name).name), fontsize=8)
    axes.axis("off")


def _draw_answers(axes: Axes, prediction: "Prediction", count: int) -> None:
    answers = prediction.answers[:count]
    colors = [_BAR_FIRST] + [_BAR] * (len(answers) - 1)
    axes.barh(range(len(answers)), [share for _, share in answers], color=colors, height=0.82)
    for position, (name, share) in enumerate(answers):
        # Beside a short bar, on top of a long one.
        inside = share > 0.6
        axes.text(
            0.02 if inside else share + 0.02,
            position,
            f"{_shorten(name)}  {100 * share:.1f} %",
            va="center",
            fontsize=7.5,
            color="white" if inside and position == 0 else "black",
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(count - 0.5, -0.5)
    axes.axis("off")


def _shorten(text: str) -> str:
    return text if len(text) <= _NAME_LENGTH else text[: _NAME_LENGTH - 1] + "\N{HORIZONTAL ELLIPSIS}"
