"""Pictures of a benchmark: speed against accuracy, and against the size of the images."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from vmamba.analysis.benchmark.jobs import Job
from vmamba.analysis.benchmark.peers import published_top1
from vmamba.analysis.benchmark.results import PICTURES, Environment, Figures, Measured, Result, measured
from vmamba.files import replaced

_COLORS = ("#1f6fb4", "#d1495b", "#3a7d44", "#edae49", "#7b5ea7", "#4a4a4a", "#00798c", "#b5651d")
_FULL_SIZE = 224  # what the accuracies were measured at

Group = list[Measured]


def draw(results: list[Result], environment: Environment, stem: Path) -> list[Path]:
    """Draws what there is enough of, into STEM-accuracy.png and STEM-resolution.png.

    Args:
        results: Of one environment.
        environment: Named in the title.
        stem: Path of the pictures, without their suffix.

    Returns:
        The files written.
    """
    good = measured(results)
    title = f"{environment.get('hardware')}, torch {environment.get('torch')}, vmamba {environment.get('vmamba')}"
    written = []
    for end, figure in zip(PICTURES, (_accuracy(good), _resolution(good)), strict=True):
        if figure is not None:
            figure.suptitle(title, fontsize=9, x=0.01, ha="left")
            _place_labels(figure)
            path = stem.with_name(stem.name + end)
            with replaced(path) as temporary:
                figure.savefig(temporary, dpi=120)
            written.append(path)
    return written


def _accuracy(results: Group) -> Figure | None:
    """A panel for each setting at full size in which two models have a published accuracy."""
    accuracy = {job.model: top1 for job, _ in results if (top1 := published_top1(job.model)) is not None}
    known = [pair for pair in results if pair[0].size == _FULL_SIZE and pair[0].model in accuracy]
    panels = [(settings, group) for settings, group in _grouped(known, _settings).items() if len(group) > 1]
    if not panels:
        return None
    colors = _colors(panels)
    figure, axes = _panels(len(panels))
    for ax, (settings, group) in zip(axes, panels, strict=True):
        for job, figures in group:
            point = (figures.images_per_s, accuracy[job.model])
            ax.plot(*point, "o", color=colors[job.model], markersize=_MARKER)
            label = ax.annotate(_short(job.model), point, xytext=(0, 0), textcoords="offset points", fontsize=8)
            label.set_in_layout(False)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(_plain)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.margins(0.25, 0.2)
        _finish(ax, settings, "images/s", "published ImageNet top-1 (%)")
    return figure


def _place_labels(figure: Figure) -> None:
    """Puts each point's label above it, or where else in the panel it covers least of points and other labels."""
    figure.draw_without_rendering()  # which is when the layout is made
    for ax in figure.axes:
        half = _MARKER / 2 * figure.dpi / 72
        labels = [text for text in ax.texts if isinstance(text, Annotation)]
        centers = [ax.transData.transform(label.xy) for label in labels]
        points = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in centers]
        boxes: dict[Annotation, Bbox] = {}
        for label in 2 * labels:  # the second time round, each knows where all others are
            others = points + [box for other, box in boxes.items() if other is not label]
            boxes[label] = _place(label, others, ax.bbox)


def _place(label: Annotation, others: list[Bbox], panel: Bbox) -> Bbox:
    """Moves a label to the first of its places that covers least, of others or of what is outside its panel."""

    def box_at(place: dict[str, Any]) -> Bbox:
        label.set(**place)
        return label.get_window_extent()

    def hidden(place: dict[str, Any]) -> float:
        box = box_at(place)
        return sum(_common_area(box, other) for other in others) + _area(box) - _common_area(box, panel)

    return box_at(min(_LABEL_PLACES, key=hidden))


def _common_area(a: Bbox, b: Bbox) -> float:
    common = Bbox.intersection(a, b)
    return 0.0 if common is None else _area(common)


def _area(box: Bbox) -> float:
    return box.width * box.height


_MARKER = 7  # points
_LABEL_PLACES: tuple[dict[str, Any], ...] = (
    {"position": (0, 5), "ha": "center", "va": "bottom"},
    {"position": (0, -5), "ha": "center", "va": "top"},
    {"position": (6, 0), "ha": "left", "va": "center"},
    {"position": (-6, 0), "ha": "right", "va": "center"},
    {"position": (4, 4), "ha": "left", "va": "bottom"},
    {"position": (-4, 4), "ha": "right", "va": "bottom"},
    {"position": (4, -4), "ha": "left", "va": "top"},
    {"position": (-4, -4), "ha": "right", "va": "top"},
)


def _resolution(results: Group) -> Figure | None:
    """Three panels for each setting with two sizes: throughput in pixels, latency, memory."""
    rows = [
        (settings, group)
        for settings, group in _grouped(results, _settings_but_size).items()
        if len({job.size for job, _ in group}) > 1
    ]
    if not rows:
        return None
    colors = _colors(rows)
    figure, axes = _panels(3 * len(rows))
    for index, (settings, group) in enumerate(rows):
        panels = dict(zip(_AGAINST_SIZE, axes[3 * index : 3 * index + 3], strict=True))
        for model, of_model in _grouped(group, lambda job: job.model).items():
            points = sorted(of_model, key=lambda pair: pair[0].size)
            for label, ax in panels.items():
                sizes = [job.size for job, _ in points]
                values = [_AGAINST_SIZE[label](*point) for point in points]
                ax.plot(sizes, values, color=colors[model], marker="o", markersize=4, label=_short(model))
        for label, ax in panels.items():
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xticks(sorted({job.size for job, _ in group}))
            ax.xaxis.set_major_formatter(_plain)
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(_plain)
            ax.yaxis.set_minor_formatter(NullFormatter())
            _finish(ax, settings, "side of the image (pixels)", label)
        axes[3 * index].legend(fontsize=8)
    return figure


_AGAINST_SIZE: dict[str, Callable[[Job, Figures], float]] = {
    "megapixels/s": lambda job, figures: figures.images_per_s * job.size**2 / 1e6,
    "latency (ms)": lambda job, figures: figures.latency_ms,
    "peak memory (GiB)": lambda job, figures: figures.peak_gib,
}


_plain = FuncFormatter(lambda value, _: f"{value:,g}")


def _settings(job: Job) -> str:
    return job.settings


def _settings_but_size(job: Job) -> str:
    return job.settings.replace(f" at {job.size}", "")


def _grouped(results: Group, key: Callable[[Job], str]) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for job, figures in results:
        groups.setdefault(key(job), []).append((job, figures))
    return groups


def _colors(groups: list[tuple[str, Group]]) -> dict[str, str]:
    models = dict.fromkeys(job.model for _, group in groups for job, _ in group)
    return dict(zip(models, cycle(_COLORS), strict=False))


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 3.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes[:count]


def _finish(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.3, linewidth=0.6)


def _short(model: str) -> str:
    """A name without what says the size of its images and windows."""
    return model.split("_patch")[0]
