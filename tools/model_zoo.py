"""The model zoo as Markdown, made of the manifest of published weights, the models, and the CSVs in results/.

    python tools/model_zoo.py

prints it. The documentation makes it anew whenever it is built, so there is no copy that could fall behind.
"""

import csv
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

import vmamba  # noqa: F401  (registers the models)
from vmamba.analysis.flops import Cost, count
from vmamba.weights import Checkpoint, aliases, checkpoints

RESULTS = Path(__file__).resolve().parents[1] / "results"

_HEADING = "# Model zoo"
_INTRODUCTION = """
Accuracies, and the GFLOPs of detectors and segmentors, are the authors' own; parameters and MACs are counted by this
package (`vmamba models`), at 224 x 224. Weights keep their authors' licences. `vmamba weights list` prints the same
names, and `vmamba weights download NAME` fetches one.
"""
_SPEED = "Speed measured here"
_SPEED_NOTE = """
Images per second, from the files in `results/`, which name versions and settings in full. Compare only rows of the same
hardware, mode, dtype, batch and size.
"""


def model_zoo(published: Iterable[Checkpoint], results: Path = RESULTS) -> str:
    """The whole page.

    Args:
        published: The checkpoints to list.
        results: Folder of measured speeds.
    """
    published = list(published)
    speeds = read_speeds(results)
    parts = [_HEADING, _INTRODUCTION.strip()]
    for task, (title, note) in _TABLES.items():
        own = [checkpoint for checkpoint in published if checkpoint.task == task]
        parts += [f"## {title}", note, _table(task, own, speeds)]
    parts += [f"## {_SPEED}", _SPEED_NOTE.strip(), _speed_table(speeds)]
    return "\n\n".join(parts) + "\n"


_TABLES = {
    "classification": ("ImageNet-1K", "Top-1 in percent. `timm.create_model(NAME, pretrained=True)` loads one."),
    "detection": ("COCO val2017", "Box and mask AP; parameters and GFLOPs are those of the whole detector."),
    "segmentation": ("ADE20K val", "Mean IoU, single- and multi-scale; parameters and GFLOPs of the whole segmentor."),
}


# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def _table(task: str, found: Sequence[Checkpoint], speeds: "Sequence[Speed]") -> str:
    if task == "classification":
        head = ["name", "params (M)", "MACs (G)", "top-1", "images/s here"]
        rows = [[*_classifier(checkpoint, speeds), *_origin(checkpoint)] for checkpoint in found]
    else:
        metrics = ("box_ap", "mask_ap") if task == "detection" else ("miou_ss", "miou_ms")
        titles = {"box_ap": "box AP", "mask_ap": "mask AP", "miou_ss": "mIoU", "miou_ms": "mIoU, multi-scale"}
        head = ["name", "params (M)", "GFLOPs", *(titles[metric] for metric in metrics)]
        rows = [[*_dense(checkpoint, metrics), *_origin(checkpoint)] for checkpoint in found]
    return markdown_table([*head, "licence", "configuration", "paper", "weights", "notes"], rows)


def _classifier(checkpoint: Checkpoint, speeds: "Sequence[Speed]") -> list[str]:
    cost = cost_of(checkpoint.backbone)
    return [
        f"`{checkpoint.name}`",
        f"{cost.params / 1e6:.2f}",
        f"{cost.macs / 1e9:.2f}",
        _percent(checkpoint.metrics.get("top1")),
        _best_speed(checkpoint.backbone, speeds),
    ]


def _dense(checkpoint: Checkpoint, metrics: Iterable[str]) -> list[str]:
    size = map(_figure, (checkpoint.params_m, checkpoint.gflops))
    return [f"`{checkpoint.name}`", *size, *(_percent(checkpoint.metrics.get(metric)) for metric in metrics)]


def _origin(checkpoint: Checkpoint) -> list[str]:
    """Licence, where things are, and what a reader should know of them."""
    return [
        checkpoint.license,
        f"`{checkpoint.config or checkpoint.backbone}`",
        f"[{checkpoint.paper}](https://arxiv.org/abs/{checkpoint.paper})",
        f"[file]({checkpoint.page})",
        "; ".join(note for note in (checkpoint.license_note, checkpoint.note) if note),
    ]


@functools.cache
def cost_of(model: str) -> Cost:
    """Parameters and operations of a model, without making its weights."""
    with torch.device("meta"):
        return count(timm.create_model(model), 224)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """One row of a benchmark.

    Args:
        model: timm name.
        task: ``"inference"`` or ``"training"``.
        images_per_s: The figure.
        settings: Hardware, mode, dtype, batch and size, in this order.
        source: The file it is from.
    """

    model: str
    task: str
    images_per_s: float
    settings: tuple[str, str, str, str, str]
    source: str


def read_speeds(folder: Path) -> list[Speed]:
    """All figures in a folder, written by `vmamba benchmark`, or before it under other names of two columns."""
    speeds = []
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                figure = row.get("images_per_s") or row.get("img_per_s")
                if figure:
                    hardware = row.get("hardware") or row["gpu"]
                    settings = (hardware, row["mode"], row["dtype"], row["batch"], row["size"])
                    model = aliases().get(row["model"], row["model"])
                    speeds.append(Speed(model, row["task"], float(figure), settings, path.name))
    return speeds


def _best_speed(model: str, speeds: Sequence[Speed]) -> str:
    own = [speed.images_per_s for speed in speeds if speed.model == model and speed.task == "inference"]
    return f"[{max(own):,.0f}](#{_SPEED.lower().replace(' ', '-')})" if own else "-"


def _speed_table(speeds: Sequence[Speed]) -> str:
    figures: dict[tuple, dict[str, float]] = {}
    for speed in speeds:
        figures.setdefault((speed.settings, speed.model, speed.source), {})[speed.task] = speed.images_per_s
    rows = [
        [f"`{model}`", *(f"{tasks[task]:,.0f}" if task in tasks else "-" for task in ("inference", "training")),
         *settings, f"`{source}`"]
        for (settings, model, source), tasks in figures.items()
    ]  # fmt: skip
    head = ["model", "inference", "training", "hardware", "mode", "dtype", "batch", "size", "file"]
    return markdown_table(head, rows)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar in a cell would end it, so it is escaped."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(model_zoo(checkpoints().values()), end="")
