"""Scenes of real handwritten digits on textured grounds: detection and segmentation data that need no download.

A scene shows scikit-learn's scans (:mod:`vmamba.data.digits`) as if written with coloured chalk on a dark texture: at
several sizes, turned, partly hidden by one another, among plain shapes that are no digits. A folder of scenes is laid
out as two well-known data sets are, so that whatever reads those reads it::

    images/training/*.jpg         images/validation/*.jpg
    annotations/training/*.png    annotations/validation/*.png      ADE20K: one label a pixel
    annotations/instances_train.json, instances_val.json            COCO: one entry an object
    scenes.json                                                     how the folder was made

Labels are ADE20K's kind (``reduce_zero_label=True``): 0 is not labelled and never counts, 1 is background, ``d + 2`` is
the digit d. Objects whose outline has no hole are polygons, others run lengths; a heap of digits too small to tell
apart is one object with ``iscrowd`` 1, and 0 on the label map. The category of the digit d is ``d + 1``.

Scenes for training show training scans alone, scenes for validation held-out ones alone. A scene follows from the seed
and its own number, not from how many there are.
"""

import dataclasses
import json
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from vmamba.data.digits import CLASS_NAMES, DigitsReader
from vmamba.errors import UserError

SEGMENTATION_CLASSES = ("background", *CLASS_NAMES)
"""What the labels 1, 2, ... of a label map stand for."""

FOLDERS = {"train": "training", "val": "validation"}
"""Sub-folder of ``images/`` and ``annotations/`` for each split."""

_UNLABELLED, _BACKGROUND = 0, 1
_RECIPE = "scenes.json"

# Shares of the scene's width, and of a digit's ink.
_DIGIT_HEIGHTS = (0.25, 0.5)
_HEAP_DIGIT_HEIGHT = 0.1
_MOST_HIDDEN = 0.1

_DIGITS = (2, 7)  # at least, and the first number that is too many
_MOST_TURNED = 20  # degrees; a 6 turned further could be a 9
_HEAP_SHARE = 0.1  # of the scenes
_BRIGHTEST_GROUND = 140
_DARKEST_CHALK = 120
_LEAST_CONTRAST = 80  # grey levels between a digit and what it covers


@dataclass(frozen=True)
class SceneRecipe:
    """All that a folder of scenes follows from.

    Args:
        train: Scenes for training.
        val: Scenes for validation.
        size: Their width and height in pixels.
        seed: Anything random follows from it.

    Raises:
        UserError: A number is out of range.
    """

    train: int = 1500
    val: int = 150
    size: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("train", 1), ("val", 1), ("size", 64), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"scenes: {name} is {getattr(self, name)}, expected at least {least}")


@dataclass
class SceneObject:
    """A digit, or a heap of equal digits too small to be told apart.

    Args:
        digit: 0 to 9.
        mask: The pixels of it that are seen, (size, size), bool.
        crowd: Whether it is a heap.
    """

    digit: int
    mask: np.ndarray
    crowd: bool = False


@dataclass
class Scene:
    """A picture and what is on it.

    Args:
        pixels: RGB, (size, size, 3), float in 0 to 255.
        objects: From the one furthest back to the one in front.
    """

    pixels: np.ndarray
    objects: list[SceneObject] = field(default_factory=list)

    @property
    def image(self) -> Image.Image:
        """The picture."""
        return Image.fromarray(self.pixels.clip(0, 255).round().astype(np.uint8))

    def label_map(self) -> Image.Image:
        """The label of every pixel, 8 bits."""
        labels = np.full(self.pixels.shape[:2], _BACKGROUND, np.uint8)
        for one in self.objects:
            labels[one.mask] = _UNLABELLED if one.crowd else one.digit + 2
        return Image.fromarray(labels)


# ---------------------------------------------------------------------------------------------------------------------
# A folder of scenes
# ---------------------------------------------------------------------------------------------------------------------


def make_scenes(folder: Path, recipe: SceneRecipe | None = None) -> bool:
    """Make a folder of scenes, complete or not at all.

    Several processes may ask for the same folder at once.

    Args:
        folder: Where to; it does not exist yet, or is empty, or holds what the recipe makes.
        recipe: What to make; :class:`SceneRecipe`'s defaults if None.

    Returns:
        False if the folder was there already.

    Raises:
        UserError: The folder holds something else, or cannot be written.
    """
    recipe = recipe or SceneRecipe()
    if _is_made(folder, recipe):
        return False
    unfinished = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        for split, count in (("train", recipe.train), ("val", recipe.val)):
            _make_split(unfinished, split, count, recipe)
        (unfinished / _RECIPE).write_text(json.dumps(dataclasses.asdict(recipe), indent=2) + "\n", encoding="utf-8")
        try:
            unfinished.replace(folder)
        except OSError:
            if not _is_made(folder, recipe):  # not even by another process in the meantime
                raise
    except OSError as error:
        raise UserError(f"cannot write the scenes to {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def _is_made(folder: Path, recipe: SceneRecipe) -> bool:
    """Whether a folder holds the scenes of a recipe; False if there is nothing in it."""
    try:
        made = json.loads((folder / _RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        made = None
    if made == dataclasses.asdict(recipe):
        return True
    if folder.is_dir() and not any(folder.iterdir()):
        return False
    if folder.exists():
        holds = f"scenes of another kind, {made}" if made is not None else "something else"
        raise UserError(f"{folder} holds {holds} and is left as it is; name a new folder, or move this one away")
    return False


def _make_split(folder: Path, split: str, count: int, recipe: SceneRecipe) -> None:
    images, labels = (folder / kind / FOLDERS[split] for kind in ("images", "annotations"))
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    scans = _scans(split)
    coco: dict[str, Any] = {
        "info": {"description": "handwritten digits on textured grounds", "version": "1"},
        "images": [],
        "annotations": [],
        "categories": [
            {"id": digit + 1, "name": name, "supercategory": "digit"} for digit, name in enumerate(CLASS_NAMES)
        ],
    }
    for index in tqdm(range(count), desc=f"scenes for {FOLDERS[split]}", unit="scene"):
        scene = draw_scene(scans, recipe.size, np.random.default_rng((recipe.seed, list(FOLDERS).index(split), index)))
        name = f"{split}_{index:06d}"
        scene.image.save(images / f"{name}.jpg", quality=95, subsampling=0)
        scene.label_map().save(labels / f"{name}.png")
        coco["images"].append(
            {"id": index + 1, "file_name": f"{name}.jpg", "width": recipe.size, "height": recipe.size}
        )
        for one in scene.objects:
            coco["annotations"].append(_coco_entry(one, index + 1, len(coco["annotations"]) + 1))
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco), encoding="utf-8")


def _scans(split: str) -> list[tuple[Image.Image, int]]:
    """The scans that scenes of a split may show, and their digits."""
    reader = DigitsReader("train" if split == "train" else "validation")
    return [(Image.open(file).convert("L"), digit) for file, digit in map(reader.__getitem__, range(len(reader)))]


def _coco_entry(one: SceneObject, image_id: int, entry_id: int) -> dict[str, Any]:
    rows, columns = (np.flatnonzero(one.mask.any(axis)) for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "id": entry_id,
        "image_id": image_id,
        "category_id": one.digit + 1,
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "area": int(one.mask.sum()),
        "segmentation": _run_lengths(one.mask) if one.crowd else _polygons(one.mask) or _run_lengths(one.mask),
        "iscrowd": int(one.crowd),
    }


def _polygons(mask: np.ndarray) -> list[list[float]]:
    """COCO's polygons [x, y, x, y, ...] around a mask; none if it has a hole, which they cannot say."""
    from contourpy import FillType, contour_generator

    # A pixel's value stands at its middle, and the ring of nothing closes outlines at the edge of the picture.
    padded = np.pad(mask.astype(float), 1)
    outlines = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, math.inf)
    polygons = []
    for points, offsets in zip(*outlines, strict=True):
        if len(offsets) > 2:
            return []
        polygons.append((points[:-1] - 0.5).ravel().tolist())
    return polygons


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths, not compressed: of zeros, of ones, of zeros, ... down the columns."""
    pixels = mask.T.ravel()
    changes = np.flatnonzero(np.diff(pixels)) + 1
    ends = [*([0] if pixels[0] else []), *changes.tolist(), pixels.size]
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


# ---------------------------------------------------------------------------------------------------------------------
# One scene
# ---------------------------------------------------------------------------------------------------------------------


def draw_scene(scans: list[tuple[Image.Image, int]], size: int, random: Generator) -> Scene:
    """Draw a scene.

    Args:
        scans: Grey pictures to choose digits from, white on black, and the digits they show.
        size: Width and height of the scene in pixels.
        random: Anything random comes from it.
    """
    scene = Scene(_ground(size, random))
    for _ in range(random.integers(0, 4)):
        _add_shape(scene, random)
    if random.random() < _HEAP_SHARE:
        _add_heap(scene, scans, random)
    for _ in range(random.integers(*_DIGITS)):
        _add_digit(scene, scans, random)
    scene.pixels += random.normal(0, random.uniform(1, 6), scene.pixels.shape)
    return scene


def _ground(size: int, random: Generator) -> np.ndarray:
    """A texture between two colours: clouds, and on some grounds waves that the clouds bend."""
    clouds = sum(_noise(size, cells, random) / cells for cells in (2, 4, 8, 16, 32))
    pattern = clouds / np.abs(clouds).max()
    if random.random() < 0.5:
        angle, waves = random.uniform(0, math.pi), random.uniform(4, 16)
        y, x = np.mgrid[:size, :size] / size
        pattern = np.sin(math.tau * waves * (x * math.cos(angle) + y * math.sin(angle)) + 4 * pattern)
    colors = random.uniform(0, _BRIGHTEST_GROUND, (2, 1, 1, 3))
    colors[1] = colors[0] + (colors[1] - colors[0]) * random.uniform(0.1, 0.5)
    return colors[0] + (colors[1] - colors[0]) * (pattern[..., None] + 1) / 2


def _noise(size: int, cells: int, random: Generator) -> np.ndarray:
    """Smooth noise with features as large as ``size / cells``."""
    coarse = Image.fromarray(random.normal(0, 1, (cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _add_shape(scene: Scene, random: Generator) -> None:
    """A disc or a block: things that are not digits."""
    size = len(scene.pixels)
    shape = Image.new("L", (size, size))
    center, extent = random.uniform(0, size, 2), random.uniform(0.05, 0.2, 2) * size
    draw = ImageDraw.Draw(shape)
    (draw.ellipse if random.random() < 0.5 else draw.rectangle)([*(center - extent), *(center + extent)], fill=255)
    _paint(scene, np.asarray(shape.filter(ImageFilter.GaussianBlur(1))) / 255, random.uniform(0, _BRIGHTEST_GROUND, 3))


def _add_digit(scene: Scene, scans: list[tuple[Image.Image, int]], random: Generator) -> None:
    """Put a digit in front of the others, unless there is no place where it leaves enough of them to see."""
    scan, digit = scans[random.integers(len(scans))]
    ink = _ink(scan, random.uniform(*_DIGIT_HEIGHTS) * len(scene.pixels), random)
    for _ in range(20):
        layer = _placed(ink, scene, random.uniform(0, 1, 2))
        mask = layer > 0.5
        hidden = [(one.mask & mask).sum() / one.mask.sum() for one in scene.objects]
        if max(hidden, default=0) <= _MOST_HIDDEN:
            break
    else:
        return
    for one in scene.objects:
        one.mask = one.mask & ~mask
    _paint(scene, layer, _chalk(scene, layer, random))
    scene.objects.append(SceneObject(digit, mask))


def _add_heap(scene: Scene, scans: list[tuple[Image.Image, int]], random: Generator) -> None:
    """Many small copies of one digit, over one another."""
    size = len(scene.pixels)
    scan, digit = scans[random.integers(len(scans))]
    center = random.uniform(0.15, 0.85, 2)
    mask = np.zeros((size, size), bool)
    for _ in range(random.integers(8, 14)):
        layer = _placed(_ink(scan, _HEAP_DIGIT_HEIGHT * size, random), scene, center + random.normal(0, 0.05, 2))
        _paint(scene, layer, _chalk(scene, layer, random))
        mask |= layer > 0.5
    scene.objects.append(SceneObject(digit, mask, crowd=True))


def _ink(scan: Image.Image, height: float, random: Generator) -> np.ndarray:
    """A scan at a height in pixels, turned a little: how much of each pixel is ink, 0 to 1, without empty borders."""
    large = scan.resize((round(height), round(height)), Image.Resampling.BICUBIC)
    turned = large.rotate(random.uniform(-_MOST_TURNED, _MOST_TURNED), Image.Resampling.BICUBIC, expand=True)
    # Enlarged, a stroke has wide grey borders; a steep ramp around the middle makes them as sharp as the picture.
    ink = ((np.asarray(turned) / 255 - 0.5) * max(2.0, height / 8) + 0.5).clip(0, 1)
    rows, columns = (np.flatnonzero((ink > 0).any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _placed(ink: np.ndarray, scene: Scene, position: np.ndarray) -> np.ndarray:
    """Ink on a layer as large as the scene, at a position between 0 (left, top) and 1 (right, bottom)."""
    size = len(scene.pixels)
    top, left = (round(share * (size - length)) for share, length in zip(position.clip(0, 1), ink.shape, strict=True))
    layer = np.zeros((size, size))
    layer[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return layer


def _chalk(scene: Scene, layer: np.ndarray, random: Generator) -> np.ndarray:
    """A colour that differs well from what a layer will cover, which may be another digit."""
    covered = scene.pixels[layer > 0.5]
    colors = random.uniform(_DARKEST_CHALK, 255, (20, 3))
    contrasts = np.abs(colors[:, None] - covered).mean(axis=(1, 2))
    return colors[np.argmax(contrasts >= min(_LEAST_CONTRAST, contrasts.max()))]


def _paint(scene: Scene, layer: np.ndarray, color: np.ndarray) -> None:
    scene.pixels += layer[..., None] * (color - scene.pixels)
