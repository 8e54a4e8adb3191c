import json
import os
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from tests.running import one_line, start, vmamba
from vmamba.data.digits import CLASS_NAMES, DigitsReader
from vmamba.data.scenes import FOLDERS, SEGMENTATION_CLASSES, SceneRecipe, _scans, draw_scene, make_scenes
from vmamba.errors import UserError

RECIPE = SceneRecipe(train=24, val=6, size=96, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes") / "made"
    assert make_scenes(path, RECIPE)
    return path


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def annotations(folder, split):
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def label_map(folder, split, image):
    return np.asarray(Image.open(folder / "annotations" / FOLDERS[split] / image["file_name"].replace("jpg", "png")))


@pytest.mark.parametrize("split", FOLDERS)
def test_layout(folder, split):
    coco = annotations(folder, split)
    assert len(coco["images"]) == getattr(RECIPE, split)
    assert [category["name"] for category in coco["categories"]] == list(CLASS_NAMES)
    for image in coco["images"]:
        picture = Image.open(folder / "images" / FOLDERS[split] / image["file_name"])
        assert (picture.size, picture.mode) == ((image["width"], image["height"]), "RGB")
        labels = label_map(folder, split, image)
        assert labels.shape == (96, 96)
        assert labels.max() <= len(SEGMENTATION_CLASSES)
    names = {path.stem for path in (folder / "images" / FOLDERS[split]).iterdir()}
    assert names == {path.stem for path in (folder / "annotations" / FOLDERS[split]).iterdir()}


@pytest.mark.parametrize("split", FOLDERS)
def test_coco_reads_the_label_map(folder, split):
    """What COCO's own reader makes of the outlines and run lengths is what the label maps say."""
    reader = pytest.importorskip("pycocotools.coco", reason="comes with the mm extra")
    coco = reader.COCO(str(folder / "annotations" / f"instances_{split}.json"))
    kinds = defaultdict(int)
    for image in coco.imgs.values():
        labels = label_map(folder, split, image)
        drawn = np.ones_like(labels)
        for entry in coco.imgToAnns[image["id"]]:
            mask = coco.annToMask(entry).astype(bool)
            drawn[mask] = 0 if entry["iscrowd"] else entry["category_id"] + 1
            kinds["crowd" if entry["iscrowd"] else type(entry["segmentation"]).__name__] += 1
            left, top, width, height = entry["bbox"]
            box = np.zeros_like(mask)
            box[top : top + height, left : left + width] = True
            assert (mask & ~box).sum() <= 0.02 * mask.sum()
            assert mask[:, left].any() or mask[:, left + 1].any()  # outlines cut corners: tips may lose a pixel
            assert entry["area"] == pytest.approx(mask.sum(), rel=0.1, abs=4)
        assert (drawn != labels).mean() < 0.005
    assert kinds["list"]
    assert kinds["dict"]
    assert split == "val" or kinds["crowd"]


def test_every_digit_and_size_occurs(folder):
    entries = annotations(folder, "train")["annotations"]
    alone = [entry for entry in entries if not entry["iscrowd"]]
    assert {entry["category_id"] for entry in alone} == set(range(1, 11))
    heights = [entry["bbox"][3] for entry in alone]
    assert min(heights) < 0.3 * 96 < 0.45 * 96 < max(heights)


def test_little_is_hidden():
    """Digits are drawn over one another, but all that are annotated stay to be seen."""
    scans = _scans("val")
    visible = []
    for index in range(30):
        scene = draw_scene(scans, 128, np.random.default_rng(index))
        masks = [one.mask for one in scene.objects]
        assert sum(mask.astype(int) for mask in masks).max() == 1
        visible += [mask.sum() for mask in masks]
    assert min(visible) > 60


def test_splits_show_different_scans():
    """Both splits could hold the same picture only if the same scan were in both."""
    readers = [DigitsReader(split) for split in ("train", "validation")]
    assert [len(_scans(split)) for split in FOLDERS] == [len(reader) for reader in readers]
    assert not set(readers[0].indices) & set(readers[1].indices)
    for split, reader in zip(FOLDERS, readers, strict=True):
        assert [digit for _, digit in _scans(split)] == [digit for _, digit in reader]


def test_same_seed_same_scenes(folder, tmp_path):
    assert make_scenes(tmp_path / "again", RECIPE)
    assert content(tmp_path / "again") == content(folder)
    assert make_scenes(tmp_path / "fewer", SceneRecipe(train=2, val=1, size=96, seed=3))
    images = content(tmp_path / "fewer" / "images")
    assert len(images) == 3
    assert images.items() <= content(folder / "images").items()
    assert make_scenes(tmp_path / "others", SceneRecipe(train=2, val=1, size=96, seed=4))
    assert not set(images.values()) & set(content(tmp_path / "others" / "images").values())


def test_made_once(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not make_scenes(folder, RECIPE)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_nothing_is_overwritten(folder, tmp_path):
    before = content(folder)
    with pytest.raises(UserError, match=r"holds scenes of another kind.*'train': 24"):
        make_scenes(folder, SceneRecipe(train=2, val=1))
    assert content(folder) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else and is left as it is"):
        make_scenes(tmp_path, RECIPE)
    with pytest.raises(UserError, match="holds something else"):
        make_scenes(tmp_path / "notes.txt", RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    assert make_scenes(tmp_path, SceneRecipe(train=1, val=1))
    assert (tmp_path / "scenes.json").exists()


def test_stopped_half_way_leaves_nothing(tmp_path, monkeypatch):
    calls = iter(range(100))

    def full_disk(*args, **kwargs):
        if next(calls) == 3:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        make_scenes(tmp_path / "scenes", RECIPE)
    assert not list(tmp_path.iterdir())


def test_two_processes_at_once(tmp_path):
    command = ("-m", "vmamba.cli.main", "scenes", tmp_path / "scenes", "--train", "3", "--val", "2", "--size", "64")
    processes = [start(*command) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    assert len(list((tmp_path / "scenes" / "images").rglob("*.jpg"))) == 5


def test_the_command(tmp_path):
    result = vmamba("scenes", tmp_path / "scenes", "--train", 2, "--val", 1, "--size", 64)
    assert result.status == 0, result.err
    assert result.out.startswith(f"wrote {tmp_path / 'scenes'}: 2 scenes for training and 1 for validation")
    assert "was there already" in vmamba("scenes", tmp_path / "scenes", "--train", 2, "--val", 1, "--size", 64).out
    assert "holds scenes of another kind" in one_line_of(vmamba("scenes", tmp_path / "scenes"))
    assert "val is 0, expected at least 1" in one_line_of(vmamba("scenes", tmp_path / "more", "--val", 0))
    (tmp_path / "file").write_text("")
    assert "Not a directory" in one_line_of(vmamba("scenes", tmp_path / "file" / "scenes"))


def one_line_of(result):
    """The error, without the progress bars before it."""
    result.err = "".join(line for line in result.err.splitlines(keepends=True) if "scene/s]" not in line)
    return one_line(result)
