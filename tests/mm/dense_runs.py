"""Runs the commands for detectors and segmentors on a few tiny scenes."""

import itertools
import json
import os
from contextlib import contextmanager
from pathlib import Path

from tests.running import Result, vmamba
from vmamba.data.scenes import SceneRecipe, make_scenes

CONFIGS = ("digits_mask_rcnn", "digits_upernet")
RECIPE = SceneRecipe(train=16, val=4, size=64, seed=1)
EPOCH = 4  # iterations, with batches of four

# The demonstrations, shortened: four iterations an epoch, full learning rate after two, from random weights.
QUICK = (
    *("train_dataloader.batch_size=4", "val_dataloader.batch_size=2", "test_dataloader.batch_size=2"),
    *("param_scheduler.0.end=2", "default_hooks.logger.interval=1"),
    *("digits_classifier=None", "model.backbone.pretrained=None"),
)


_RUNS = itertools.count()


def quick(*options: str) -> tuple[str, ...]:
    """Arguments that shorten a demonstration, and more entries to change."""
    return ("--cfg-options", *QUICK, *options)


def make_data(folder: Path) -> Path:
    """Tiny scenes in a folder."""
    make_scenes(folder, RECIPE)
    return folder


@contextmanager
def scenes_in(folder: Path):
    """The configurations find their data in a folder."""
    before = os.environ.get("SCENES_ROOT")
    os.environ["SCENES_ROOT"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SCENES_ROOT"]
        else:
            os.environ["SCENES_ROOT"] = before


def train(config: str, work_dir: Path, *arguments: object, epochs: int = 1, options: tuple[str, ...] = ()) -> Result:
    """Train a demonstration for a few epochs, and validate after the last one."""
    length = (f"train_cfg.max_epochs={epochs}", f"train_cfg.val_interval={epochs}", *_own_visualizer())
    return vmamba("train-dense", config, "--work-dir", work_dir, *arguments, *quick(*length, *options))


def _own_visualizer() -> tuple[str, ...]:
    """MMEngine keeps visualizers by name, and a second run in one process would write into the first one's files."""
    return (f"visualizer.name=visualizer_{next(_RUNS)}",)


def losses(work_dir: Path) -> list[float]:
    """The losses of all iterations of the latest run in a folder."""
    latest = max(work_dir.glob("*/vis_data/scalars.json"))
    rows = [json.loads(line) for line in latest.read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def metrics(work_dir: Path) -> dict[str, float]:
    """What the latest test in a folder measured."""
    latest = max(path for path in work_dir.glob("*/*.json"))
    return json.loads(latest.read_text().splitlines()[-1])
