"""Testing and predicting with trained detectors and segmentors, and what the commands say to mistaken input."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet", reason="needs the mm extra")
pytest.importorskip("mmseg", reason="needs the mm extra")

from mmengine.config import Config

from tests.mm.dense_runs import CONFIGS, make_data, metrics, quick, scenes_in, train
from tests.running import ROOT, one_line, vmamba
from vmamba.errors import UserError
from vmamba.mm.data_checks import check_data
from vmamba.mm.demonstration import prepare_classifier, prepare_scenes
from vmamba.mm.settings import load_settings

LOADERS = ("train_dataloader", "val_dataloader")


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("data") / "scenes")
    with scenes_in(folder):
        yield folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for config in CONFIGS:
        result = train(config, folder / config, options=("train_cfg.val_interval=2",))
        assert result.status == 0, result.err
    return {config: folder / config / "epoch_1.pth" for config in CONFIGS}


@pytest.fixture
def own_data(data, tmp_path):
    """A copy of the scenes that may be spoilt."""
    folder = tmp_path / "own"
    shutil.copytree(data, folder)
    with scenes_in(folder):
        yield folder


# ---------------------------------------------------------------------------------------------------------------------
# Testing
# ---------------------------------------------------------------------------------------------------------------------


def measure(config, checkpoint, work_dir, *arguments, options=()):
    return vmamba("test-dense", config, checkpoint, "--work-dir", work_dir, *arguments, *quick(*options))


def test_ap_of_a_detector(checkpoints, tmp_path):
    unsure = ("model.test_cfg.rcnn.score_thr=0.0",)  # after four iterations, no box is sure
    arguments = ("digits_mask_rcnn", checkpoints["digits_mask_rcnn"], tmp_path, "--show-dir", tmp_path / "shown")
    result = measure(*arguments, options=unsure)
    assert result.status == 0, result.err
    found = metrics(tmp_path)
    assert {"coco/bbox_mAP_50", "coco/segm_mAP_50"} <= found.keys()
    assert all(-1 <= value <= 1 for name, value in found.items() if name.startswith("coco/"))
    assert len(list(tmp_path.rglob("shown/**/*.png"))) == 4


def test_iou_of_a_segmentor_with_and_without_augmentation(checkpoints, tmp_path):
    for name, arguments in (("plain", ()), ("augmented", ("--tta",))):
        result = measure("digits_upernet", checkpoints["digits_upernet"], tmp_path / name, *arguments)
        assert result.status == 0, result.err
    plain, augmented = metrics(tmp_path / "plain"), metrics(tmp_path / "augmented")
    assert 0 < plain["mIoU"] < 100
    assert 0 < augmented["mIoU"] < 100
    assert plain["aAcc"] != augmented["aAcc"]


def test_augmentation_needs_a_recipe(checkpoints, tmp_path):
    message = one_line(measure("digits_mask_rcnn", checkpoints["digits_mask_rcnn"], tmp_path, "--tta"))
    assert "has no tta_model and no tta_pipeline, which --tta needs" in message


# ---------------------------------------------------------------------------------------------------------------------
# Predicting
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_predictions_are_printed_and_drawn(config, checkpoints, data, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    scene = Image.open(data / "images" / "validation" / "val_000000.jpg")
    scene.save(photos / "color.jpg")
    scene.convert("L").resize((90, 50)).save(photos / "grey.png")  # one channel, and another shape
    arguments = ("predict-dense", config, checkpoints[config], photos, "--output", tmp_path / "drawn", "--score", 0)
    result = vmamba(*arguments)
    assert result.status == 0, result.err
    said = "background" if config == "digits_upernet" else r"\d+ object\(s\)"
    assert len(re.findall(rf"(color|grey)\.\w+:  .*{said}", result.out)) == 2
    drawn = {path.name: Image.open(path) for path in (tmp_path / "drawn").iterdir()}
    assert {name: image.size for name, image in drawn.items()} == {
        "0000_color.png": (64, 64),
        "0001_grey.png": (90, 50),
    }
    assert (np.asarray(drawn["0000_color.png"], int) != np.asarray(scene, int)).any()
    assert "exists and is left as it is; name another folder with --output" in one_line(vmamba(*arguments))


def test_images_that_cannot_be_read(checkpoints, tmp_path):
    config, checkpoint = "digits_upernet", checkpoints["digits_upernet"]
    (tmp_path / "empty.jpg").write_bytes(b"")
    predict = ("predict-dense", config, checkpoint)
    output = ("--output", tmp_path / "drawn")
    assert "empty.jpg is no image that can be read" in one_line(vmamba(*predict, tmp_path / "empty.jpg", *output))
    assert "nowhere.jpg not found" in one_line(vmamba(*predict, tmp_path / "nowhere.jpg", *output))
    assert "--score is 2.0, expected 0 to 1" in one_line(vmamba(*predict, tmp_path, "--score", 2))
    assert not (tmp_path / "drawn").exists()


def test_the_tool(checkpoints, data, tmp_path):
    """From a checkout, as a program of its own."""
    image = data / "images" / "validation" / "val_000001.jpg"
    command = [sys.executable, ROOT / "tools" / "predict_dense.py", "digits_mask_rcnn", checkpoints["digits_mask_rcnn"]]
    done = subprocess.run([*command, image, "--output", tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0000_val_000001.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Mistaken configurations and checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def test_unknown_configuration(tmp_path):
    message = one_line(vmamba("train-dense", "digits_mask_rcn"))
    assert "no configuration 'digits_mask_rcn'" in message
    assert "did you mean digits_mask_rcnn" in message
    assert "configuration gone.py not found" in one_line(vmamba("train-dense", "gone.py"))
    (tmp_path / "broken.py").write_text("model = dict(")
    assert "cannot read" in one_line(vmamba("train-dense", tmp_path / "broken.py"))
    (tmp_path / "empty.py").write_text("a = 1")
    assert "has no model or default_scope" in one_line(vmamba("train-dense", tmp_path / "empty.py"))


def test_unknown_model(tmp_path):
    message = one_line(train("digits_upernet", tmp_path, options=("model.backbone.model_name=vmamba_nano_23",)))
    assert "unknown model 'vmamba_nano_23'" in message
    assert "did you mean vmamba_nano_32" in message


def test_unknown_type(tmp_path):
    message = one_line(train("digits_upernet", tmp_path, options=("model.decode_head.type=UperHead",)))
    assert "UperHead is not in the" in message


def test_checkpoint_of_another_model(checkpoints, data, tmp_path):
    other = checkpoints["digits_upernet"]
    assert "is of another model" in one_line(measure("digits_mask_rcnn", other, tmp_path))
    image = data / "images" / "validation" / "val_000000.jpg"
    message = one_line(vmamba("predict-dense", "digits_mask_rcnn", other, image, "--output", tmp_path / "drawn"))
    assert "is of another model" in message


def test_checkpoint_with_another_head(checkpoints, tmp_path):
    """MMEngine would go on with a head of random weights."""
    content = torch.load(checkpoints["digits_upernet"], weights_only=False)
    weights = content["state_dict"]
    del weights["decode_head.conv_seg.weight"]
    torch.save({"state_dict": weights}, tmp_path / "without.pth")
    message = one_line(measure("digits_upernet", tmp_path / "without.pth", tmp_path))
    assert "missing (decode_head.conv_seg.weight)" in message
    weights["decode_head.conv_seg.weight"] = torch.zeros(3, 64, 1, 1)
    torch.save({"state_dict": weights}, tmp_path / "small.pth")
    assert "decode_head.conv_seg.weight" in one_line(measure("digits_upernet", tmp_path / "small.pth", tmp_path))


def test_checkpoint_with_code(tmp_path):
    torch.save({"state_dict": {}, "hook": subprocess.Popen}, tmp_path / "code.pth")
    for arguments in (
        ("test-dense", "digits_upernet", tmp_path / "code.pth", *quick()),
        ("train-dense", "digits_upernet", "--resume", tmp_path / "code.pth", *quick()),
    ):
        assert "pickled code is never executed" in one_line(vmamba(*arguments, f"work_dir={tmp_path}"))


# ---------------------------------------------------------------------------------------------------------------------
# Data that does not fit together
# ---------------------------------------------------------------------------------------------------------------------


def spoil_coco(folder, change):
    path = folder / "annotations" / "instances_train.json"
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))


def complaint(config, *options):
    settings = load_settings(config, dict(option.split("=", 1) for option in options))
    with pytest.raises(UserError) as caught:
        check_data(settings, *LOADERS)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("config", CONFIGS)
def test_good_data_passes(config):
    check_data(load_settings(config), *LOADERS, "test_dataloader")


def rename_category(coco):
    coco["categories"][3]["name"] = "three"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda coco: coco["images"][2].update(file_name="photo.jpg"), "lists photo.jpg, which is not in"),
        (lambda coco: coco["images"][2].update(width=640, height=480), "is 64x64, but .* says 640x480"),
        (lambda coco: coco["annotations"][5].update(image_id=99), "annotation 6 is of image 99, which is not listed"),
        (
            lambda coco: coco["annotations"][5].update(bbox=[50, 60, 30, 30]),
            r"box \[50, 60, 30, 30\] .* leaves its image",
        ),
        (rename_category, "has no category '3' of metainfo.classes; it has 0, 1, 2, three"),
        (lambda coco: coco.pop("images"), "has no list 'images'"),
        (lambda coco: coco["annotations"][0].pop("bbox"), "an entry of 'annotations' has no 'bbox'"),
        (lambda coco: coco["images"].clear(), "lists no images"),
    ],
)
def test_annotations_that_do_not_match_the_images(own_data, change, expected):
    spoil_coco(own_data, change)
    assert re.search(expected, complaint("digits_mask_rcnn"))


def test_files_that_are_missing_or_no_annotations(own_data):
    file = own_data / "annotations" / "instances_train.json"
    file.write_text("{")
    assert "cannot be read" in complaint("digits_mask_rcnn")
    file.unlink()
    assert f"only {own_data / 'annotations'} exists" in complaint("digits_mask_rcnn")
    shutil.rmtree(own_data / "annotations" / "training")
    assert "annotations/training not found" in complaint("digits_upernet")


def save_map(folder, pixels):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(folder / "annotations" / "training" / "train_000003.png")


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.ones((32, 64)), "train_000003.png is 64x32, but its image is 64x64"),
        (np.ones((64, 64, 3)), "has the mode RGB; expected one channel"),
        (np.full((64, 64), 12), "holds 12, but 11 classes after the unlabelled 0 go up to 11"),
    ],
)
def test_label_maps_that_do_not_match_the_images(own_data, pixels, expected):
    save_map(own_data, pixels)
    assert expected in complaint("digits_upernet")


def test_label_maps_that_are_missing(own_data):
    for index in (4, 7):
        (own_data / "annotations" / "training" / f"train_{index:06d}.png").unlink()
    message = complaint("digits_upernet")
    assert "train_000004.jpg has no label map" in message
    assert "2 of 16 are missing" in message
    shutil.rmtree(own_data / "images" / "training")
    (own_data / "images" / "training").mkdir()
    assert "no *.jpg in" in complaint("digits_upernet")


@pytest.mark.parametrize("config", CONFIGS)
def test_empty_image(config, own_data, tmp_path):
    (own_data / "images" / "training" / "train_000002.jpg").write_bytes(b"")
    message = one_line(train(config, tmp_path / "run"))
    assert "train_000002.jpg cannot be read: it is empty" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", CONFIGS)
def test_image_of_one_channel(config, own_data):
    """Grey files are read as colour, unless a configuration says otherwise."""
    file = own_data / "images" / "training" / "train_000002.jpg"
    Image.open(file).convert("L").save(file)
    check_data(load_settings(config), *LOADERS)
    message = complaint(config, "train_dataloader.dataset.pipeline.0.color_type=unchanged")
    assert "train_000002.jpg has 1 channel(s) as color_type='unchanged' reads it" in message


def test_damage_that_only_loading_finds(own_data, tmp_path):
    """It happens in a process of the loader, and still is one line."""
    for file in (own_data / "images" / "training").iterdir():
        content = file.read_bytes()
        file.write_bytes(content[: content.index(b"\xff\xda")])  # the header of a picture of 64x64, and no picture
    assert "is damaged, or no image at all" in one_line(train("digits_upernet", tmp_path / "run"))


def test_wrapped_data_is_looked_at(own_data):
    (own_data / "images" / "training" / "train_000002.jpg").unlink()
    inner = load_settings("digits_mask_rcnn").train_dataloader.dataset
    wrapped = dict(type="RepeatDataset", times=2, dataset=dict(type="ConcatDataset", datasets=[inner]))
    settings = Config(dict(model=dict(), train_dataloader=dict(dataset=wrapped)))
    with pytest.raises(UserError, match=r"lists train_000002.jpg, which is not in"):
        check_data(settings, "train_dataloader")


def test_data_is_made_where_it_is_missing(tmp_path, capfd):
    options = {"digit_scenes.train": 2, "digit_scenes.val": 1, "digit_scenes.size": 64}
    with scenes_in(tmp_path / "new"):
        prepare_scenes(load_settings("digits_upernet", options))
        assert f"made {tmp_path / 'new'}: scenes of handwritten digits" in capfd.readouterr().out
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("*")}
        prepare_scenes(load_settings("digits_upernet"))  # with another recipe: what is there is used
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("*")}
    assert len(list((tmp_path / "new" / "images").rglob("*.jpg"))) == 3


def test_classifier_is_trained_where_it_is_missing(tmp_path, capfd):
    file = tmp_path / "runs" / "classifier" / "best.pth"
    settings = load_settings("digits_upernet", {"digits_classifier": str(file)})
    prepare_classifier(settings, "--epochs", "1", "--warmup-epochs", "0")
    assert f"no {file} yet: training a classifier of digits" in capfd.readouterr().out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["classifier"]
    before = file.stat().st_mtime_ns
    prepare_classifier(settings)  # it is there
    assert file.stat().st_mtime_ns == before
    result = train("digits_upernet", tmp_path / "run", options=(f"model.backbone.pretrained={file}",))
    assert result.status == 0, result.err
    assert "loaded 88/88 tensors of" in "".join(log.read_text() for log in (tmp_path / "run").glob("*/*.log"))


def test_classifier_that_cannot_be_trained(tmp_path, capfd):
    settings = load_settings("digits_upernet", {"digits_classifier": str(tmp_path / "classifier" / "best.pth")})
    with pytest.raises(UserError, match=r"could not be trained \(exit status 2\)"):
        prepare_classifier(settings, "--epochs", "none")
    assert not list(tmp_path.iterdir())
