"""Whether annotations match the images: looked at before training, since a mismatch may show late, or never.

MMDetection drops boxes outside the image and categories it does not know, without a word. Here they are errors of one
line. Whether files exist is checked for all of them; what is inside, for a sample.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image

from vmamba.errors import UserError

_OPENED_IMAGES = 1000  # a few seconds
_OPENED_LABEL_MAPS = 200  # these are decoded whole
_CHANNELS = {"1": 1, "L": 1, "P": 1, "I": 1, "I;16": 1, "LA": 2, "RGB": 3, "YCbCr": 3, "RGBA": 4, "CMYK": 4}

NamedDataset = Mapping[str, Any]


def check_data(settings: Config, *loaders: str) -> None:
    """Look at the data of data loaders.

    Args:
        settings: A detector's or segmentor's configuration.
        loaders: Keys such as ``"train_dataloader"``; what the configuration lacks is passed over.

    Raises:
        UserError: The annotations do not match the images, or there are none, or a file cannot be read.
    """
    for loader in loaders:
        if settings.get(loader) is None:
            continue
        for dataset in _plain_datasets(settings[loader].dataset):
            if "pipeline" not in dataset:  # as inside a wrapper
                dataset = {**dataset, "pipeline": settings[loader].dataset.get("pipeline", [])}
            prefixes = dataset.get("data_prefix") or {}
            if str(dataset.get("ann_file", "")).endswith(".json") and "img" in prefixes:
                _check_coco(dataset, settings)
            elif "seg_map_path" in prefixes and not dataset.get("ann_file"):
                _check_label_maps(dataset, settings)


def _plain_datasets(dataset: NamedDataset) -> Iterator[NamedDataset]:
    """The data sets inside wrappers that repeat, mix or join."""
    inner = [dataset["dataset"]] if "dataset" in dataset else dataset.get("datasets", [])
    if not inner:
        yield dataset
    for one in inner:
        yield from _plain_datasets(one)


def _path(dataset: NamedDataset, relative: str) -> Path:
    return Path(dataset.get("data_root") or "", relative)


def _classes(dataset: NamedDataset) -> list[str] | None:
    return (dataset.get("metainfo") or {}).get("classes")


# ---------------------------------------------------------------------------------------------------------------------
# COCO
# ---------------------------------------------------------------------------------------------------------------------


def _check_coco(dataset: NamedDataset, settings: Config) -> None:
    file, folder = _path(dataset, dataset["ann_file"]), _path(dataset, dataset["data_prefix"]["img"])
    coco = _read_coco(file)
    images = {image["id"]: image for image in coco["images"]}
    if not images:
        raise UserError(f"{file} lists no images")
    _check_categories(file, coco, _classes(dataset))
    for entry in coco["annotations"]:
        _check_entry(file, entry, images)
    missing = [image["file_name"] for image in images.values() if not (folder / image["file_name"]).is_file()]
    if missing:
        raise UserError(
            f"{file} lists {missing[0]}, which is not in {folder}"
            + (f"; {len(missing)} of {len(images)} images are missing" if len(missing) > 1 else "")
        )
    for image in _sample(list(images.values()), _OPENED_IMAGES):
        path = folder / image["file_name"]
        size = _check_image(path, dataset, settings).size
        if size != (image["width"], image["height"]):
            raise UserError(
                f"{path} is {size[0]}x{size[1]}, but {file} says {image['width']}x{image['height']}: these "
                "annotations are of other images"
            )


def _read_coco(file: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        coco = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"annotations {file} not found; {_where_data_is(file)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"annotations {file} cannot be read: {error}") from error
    parts = {"images": ("id", "file_name", "width", "height"), "annotations": ("image_id", "category_id", "bbox")}
    for part, keys in {**parts, "categories": ("id", "name")}.items():
        entries = coco.get(part) if isinstance(coco, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{file} is not in COCO's format: it has no list '{part}'")
        lacking = next((key for entry in entries for key in keys if key not in entry), None)
        if lacking is not None:
            raise UserError(f"{file} is not in COCO's format: an entry of '{part}' has no '{lacking}'")
    return coco


def _check_categories(file: Path, coco: dict[str, Any], classes: list[str] | None) -> None:
    named = [category["name"] for category in coco["categories"]]
    unknown = [name for name in classes or [] if name not in named]
    if unknown:
        raise UserError(f"{file} has no category '{unknown[0]}' of metainfo.classes; it has {_some(named)}")


def _check_entry(file: Path, entry: dict[str, Any], images: dict[Any, dict[str, Any]]) -> None:
    image = images.get(entry["image_id"])
    if image is None:
        raise UserError(f"{file}: annotation {entry.get('id')} is of image {entry['image_id']}, which is not listed")
    left, top, width, height = entry["bbox"]
    # Published annotations leave the image by a fraction of a pixel, and some boxes have no area.
    if min(left, top) < -1 or left + width > image["width"] + 1 or top + height > image["height"] + 1:
        raise UserError(
            f"{file}: box {entry['bbox']} of annotation {entry.get('id')} leaves its image {image['file_name']}, "
            f"which is {image['width']}x{image['height']}; expected [left, top, width, height] in pixels"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Label maps
# ---------------------------------------------------------------------------------------------------------------------


def _check_label_maps(dataset: NamedDataset, settings: Config) -> None:
    images, maps = (_path(dataset, dataset["data_prefix"][key]) for key in ("img_path", "seg_map_path"))
    image_suffix, map_suffix = dataset.get("img_suffix", ".jpg"), dataset.get("seg_map_suffix", ".png")
    for folder in (images, maps):
        if not folder.is_dir():
            raise UserError(f"folder {folder} not found; {_where_data_is(folder)}")
    names = sorted(str(path.relative_to(images)) for path in images.rglob(f"*{image_suffix}"))
    if not names:
        raise UserError(f"no *{image_suffix} in {images}")
    pairs = [(images / name, maps / (name.removesuffix(image_suffix) + map_suffix)) for name in names]
    missing = [pair for pair in pairs if not pair[1].is_file()]
    if missing:
        raise UserError(
            f"{missing[0][0]} has no label map {missing[0][1]}"
            + (f"; {len(missing)} of {len(pairs)} are missing" if len(missing) > 1 else "")
        )
    for image, label_map in _sample(pairs, _OPENED_IMAGES):
        size, labels = _check_image(image, dataset, settings).size, _open(label_map)
        if labels.size != size:
            raise UserError(
                f"label map {label_map} is {labels.size[0]}x{labels.size[1]}, but its image is {size[0]}x{size[1]}"
            )
        if _CHANNELS.get(labels.mode) != 1:
            raise UserError(f"label map {label_map} has the mode {labels.mode}; expected one channel, the class")
    if (classes := _classes(dataset)) is not None:
        for _, label_map in _sample(pairs, _OPENED_LABEL_MAPS):
            _check_labels(label_map, len(classes), _reduces_zero(dataset))


def _reduces_zero(dataset: NamedDataset) -> bool:
    return bool(dataset.get("reduce_zero_label")) or any(
        transform.get("reduce_zero_label") for transform in dataset["pipeline"]
    )


def _check_labels(label_map: Path, classes: int, reduces_zero: bool) -> None:
    labels = np.asarray(_open(label_map))
    highest = int(labels[labels != 255].max(initial=0))
    most = classes if reduces_zero else classes - 1
    if highest > most:
        raise UserError(
            f"label map {label_map} holds {highest}, but {classes} classes "
            f"{'after the unlabelled 0 ' if reduces_zero else ''}go up to {most} (255 is ignored)"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            if path.suffix == ".png" and image.mode in ("1", "L", "P"):
                image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        empty = path.is_file() and not path.stat().st_size
        reason = "it is empty" if empty else " ".join(str(error).split())
        raise UserError(f"image {path} cannot be read: {reason}") from error


def _check_image(path: Path, dataset: NamedDataset, settings: Config) -> Image.Image:
    """An image that opens and has as many channels as the model is told to expect."""
    image = _open(path)
    loading = [one for one in dataset["pipeline"] if str(one.get("type")).endswith("LoadImageFromFile")]
    reading = loading[0].get("color_type", "color") if loading else "color"
    found = {"color": 3, "grayscale": 1}.get(reading, _CHANNELS.get(image.mode, 3))
    expected = len((settings.model.get("data_preprocessor") or {}).get("mean") or [0, 0, 0])
    if found != expected:
        raise UserError(
            f"image {path} has {found} channel(s) as color_type='{reading}' reads it, but the model's mean has "
            f"{expected}; color_type='color' turns grey images into three channels"
        )
    return image


def _sample(items: list[Any], most: int) -> Iterable[Any]:
    """At most that many, evenly spread."""
    step = max(1, -(-len(items) // most))
    return items[::step]


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _where_data_is(path: Path) -> str:
    """A hint at the part of a path that is missing."""
    present = next((parent for parent in path.parents if parent.exists()), Path("."))
    return f"of this path, only {present} exists: set data_root, or the environment variable it is read from"
