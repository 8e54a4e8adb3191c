import csv
import errno
import re
import shutil
from argparse import Namespace
from itertools import chain

import pytest
import timm
import torch
from PIL import Image

from tests.running import make_folder, one_line, train, vmamba
from vmamba.cli.validate import _source
from vmamba.training import checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def best(data, tmp_path_factory):
    """best.pth of a run that tells the colours apart."""
    output = tmp_path_factory.mktemp("runs")
    result = train(data, output, "run", "--no-ema", epochs=6)
    assert result.status == 0, result.err
    return output / "run" / "best.pth"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Weights for 1000 classes, in a file that says nothing but the weights."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"model": timm.create_model("test_convnext").state_dict()}, path)
    return path


def predict(*arguments, output):
    return vmamba("predict", *arguments, "--output", output, "--device", "cpu")


# predict


def test_predict_an_image(data, best, tmp_path):
    picture, table = tmp_path / "p.png", tmp_path / "p.csv"
    image = data / "val" / "red" / "0.png"
    result = predict(image, "--checkpoint", best, "--csv", table, output=picture)
    assert result.status == 0, result.err
    line = result.out.splitlines()[0]
    assert re.match(rf"{re.escape(str(image))}:  red \d+\.\d %   (blue|green) \d+\.\d %   ", line)
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 100
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["class"] == "red"
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=1e-4)


def test_predict_a_folder(data, best, tmp_path):
    result = predict(data / "val", "--checkpoint", best, "--batch-size", 4, "--topk", 1, output=tmp_path / "p.png")
    assert result.status == 0, result.err
    lines = [line for line in result.out.splitlines() if ".png:" in line]
    assert len(lines) == 15
    assert sum(re.search(r"/(\w+)/\d\.png:  (\w+)", line)[1] == re.search(r":  (\w+)", line)[1] for line in lines) >= 14


def test_what_is_no_image_is_skipped_in_a_folder(data, best, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(data / "val" / "red", folder)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden").write_text("not even mentioned")
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    result = predict(folder, "--checkpoint", best, output=tmp_path / "p.png")
    assert result.status == 0, result.err
    assert len([line for line in result.out.splitlines() if ".png:" in line]) == 5
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: skipped")]
    assert len(warnings) == 2
    assert f"skipped {folder / 'notes.txt'}: not an image" in result.err


def test_what_is_no_image_is_an_error_alone(best, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    message = one_line(predict(tmp_path / "notes.txt", "--checkpoint", best, output=tmp_path / "p.png"))
    assert "notes.txt is no image that can be read: not an image" in message
    assert "not found" in one_line(predict(tmp_path / "no.png", "--checkpoint", best, output=tmp_path / "p.png"))
    (tmp_path / "empty").mkdir()
    assert "no images in" in one_line(predict(tmp_path / "empty", "--checkpoint", best, output=tmp_path / "p.png"))


def test_predict_with_imagenet_names(data, published, tmp_path):
    image = data / "val" / "red" / "0.png"
    options = ("--model", "test_convnext", "--checkpoint", published, "--topk", 2)
    result = predict(image, *options, output=tmp_path / "p.png")
    assert result.status == 0, result.err
    names = timm.data.ImageNetInfo().label_descriptions()
    first = re.search(r":  (.+?) \d+\.\d %", result.out)[1]
    assert any(name.split(",")[0] == first for name in names)


def test_predict_digits(tmp_path):
    options = ("--epochs", 1, "--warmup-epochs", 0, "--no-tensorboard", "--model", "test_vmamba", "--lr", "1e-3")
    assert vmamba("train", *options, "--output", tmp_path, "--name", "run").status == 0
    result = predict("digits", "--checkpoint", tmp_path / "run" / "best.pth", output=tmp_path / "p.png")
    assert result.status == 0, result.err
    assert len(re.findall(r"digit_\d+\.png \(a \d\):", result.out)) == 24


@pytest.mark.parametrize(
    ("output", "table", "message"),
    [
        ("none/p.png", "p.csv", "there is no folder"),
        ("p.png", "none/p.csv", "there is no folder"),
        ("p.xyz", "p.csv", "no picture ends in '.xyz'"),
        ("p.png", "folder", "something of that name that is no file"),
        ("p.png", "p.png", "--output and --csv both name"),
    ],
)
def test_what_cannot_be_written_is_known_before_the_answers(data, best, tmp_path, output, table, message):
    (tmp_path / "folder").mkdir()
    image = data / "val" / "red" / "0.png"
    result = predict(image, "--checkpoint", best, "--csv", tmp_path / table, output=tmp_path / output)
    assert message in one_line(result)
    assert result.out == ""


@pytest.mark.parametrize("taken", ["p.png", "p.csv"])
def test_a_file_is_replaced_only_on_demand_and_at_the_end(data, best, tmp_path, taken):
    (tmp_path / taken).write_text("mine")
    image = data / "val" / "red" / "0.png"
    arguments = ("--csv", tmp_path / "p.csv", "--checkpoint")
    message = one_line(predict(image, *arguments, best, output=tmp_path / "p.png"))
    assert f"{taken} is there already; --overwrite replaces it" in message
    failed = predict(image, *arguments, tmp_path / "none.pth", "--overwrite", output=tmp_path / "p.png")
    assert "none.pth not found" in one_line(failed)
    assert (tmp_path / taken).read_text() == "mine"
    result = predict(image, *arguments, best, "--overwrite", output=tmp_path / "p.png")
    assert result.status == 0, result.err
    assert (tmp_path / "p.csv").read_text().startswith("image,rank,class,probability")
    with Image.open(tmp_path / "p.png") as drawn:
        assert min(drawn.size) > 100


def test_the_default_picture_is_not_replaced_either(data, best, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("predict", data / "val" / "red" / "0.png", "--checkpoint", best)
    for _ in range(3):
        assert vmamba(*arguments).status == 0
    names = {"predictions.png", "predictions-2.png", "predictions-3.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert vmamba(*arguments, "--overwrite").status == 0
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("option", ["--output", "--csv"])
def test_what_is_read_is_never_written(data, best, tmp_path, option):
    photo, weights = tmp_path / "photo.png", tmp_path / "weights.png"
    shutil.copy(data / "val" / "red" / "0.png", photo)
    shutil.copy(best, weights)
    for file in (photo, weights):
        before = file.read_bytes()
        outputs = {"--output": tmp_path / "p.png", option: file}
        arguments = (photo, "--checkpoint", weights, "--overwrite", *chain(*outputs.items()))
        assert f"{file} is read, and cannot be written as well" in one_line(vmamba("predict", *arguments))
        assert file.read_bytes() == before


# validate


def test_validate_needs_nothing_but_the_checkpoint(best, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = vmamba("validate", "--checkpoint", best, "--workers", 0, "--device", "cpu")
    assert result.status == 0, result.err
    top1 = float(re.search(r"top-1 ([\d.]+) %", result.out)[1])
    assert top1 == pytest.approx(checkpoint.read(best)["top1"], abs=1e-3)
    assert "15 images" in result.out


def test_validate_on_another_split(best):
    result = vmamba("validate", "--checkpoint", best, "--split", "train", "--workers", 0)
    assert result.status == 0, result.err
    assert "24 images" in result.out


def test_options_of_the_data_change_those_of_the_run(best):
    origin = {"data": "hfds/photos", "data_dir": "old", "download": True, "split": "test"}
    options = Namespace(data=None, data_dir="new", class_map="map.txt", split=None)
    source, split = _source(options, origin)
    assert (source.data, source.data_dir, source.class_map, source.download) == ("hfds/photos", "new", "map.txt", True)
    assert split == "test"
    message = one_line(vmamba("validate", "--checkpoint", best, "--data-dir", "new"))
    assert "--data-dir is for timm readers such as hfds/NAME" in message


@pytest.mark.parametrize("command", ["predict", "validate"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--img-size", "0", "'0' is not a whole number of at least 1"),
        ("--img-size", "-3", "'-3' is not a whole number of at least 1"),
        ("--batch-size", "0", "'0' is not a whole number of at least 1"),
        ("--num-classes", "5", "--num-classes is 5, but test_vmamba has 3 trained outputs; leave it out"),
        ("--crop-pct", "1.5", "'1.5' is not a number more than 0 and at most 1"),
        ("--interpolation", "foo", "invalid choice: 'foo'"),
    ],
)
def test_mistakes_in_options(best, data, monkeypatch, tmp_path, command, option, value, message):
    monkeypatch.chdir(tmp_path)
    images = (data / "val",) if command == "predict" else ()
    assert message in one_line(vmamba(command, *images, "--checkpoint", best, option, value))


def test_validate_on_a_folder_with_a_class_map(data, best, tmp_path):
    """A folder with some of the classes, kept in the order of training by a class map."""
    shutil.copytree(data / "val" / "red", tmp_path / "photos" / "red")
    arguments = ("validate", "--checkpoint", best, "--data", tmp_path / "photos", "--workers", 0)
    assert "has 1 classes, but test_vmamba has 3 outputs" in one_line(vmamba(*arguments))
    (tmp_path / "classes.txt").write_text("blue\ngreen\nred\n")
    result = vmamba(*arguments, "--class-map", tmp_path / "classes.txt")
    assert result.status == 0, result.err
    assert "top-1 100.000 %" in result.out


def test_validate_on_other_classes(data, best, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "val" / "red").rename(tmp_path / "data" / "val" / "yellow")
    message = one_line(vmamba("validate", "--checkpoint", best, "--data", tmp_path / "data", "--workers", 0))
    assert "the classes differ from those the model was trained on: 'yellow' where it has 'red'" in message


def test_validate_amp_and_size(data, best):
    result = vmamba("validate", "--checkpoint", best, "--amp", "bf16", "--img-size", 64, "--workers", 0)
    assert result.status == 0, result.err
    assert "test_vmamba at 64x64" in result.out


def test_validate_at_many_sizes(best, tmp_path):
    stem = tmp_path / "new" / "sizes"
    arguments = ("validate", "--checkpoint", best, "--workers", 0, "--device", "cpu")
    result = vmamba(*arguments, "--sizes", "48,32", "--output", stem)
    assert result.status == 0, result.err
    with open(stem.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["size"] for row in rows] == ["32", "48"]
    assert float(rows[0]["top1"]) == pytest.approx(checkpoint.read(best)["top1"], abs=1e-3)
    assert rows[1]["images"] == "15"
    with Image.open(stem.with_suffix(".png")) as drawn:
        assert min(drawn.size) > 100
    taken = one_line(vmamba(*arguments, "--sizes", "32", "--output", stem))
    assert f"{stem.with_suffix('.csv')} is there already; --overwrite replaces it" in taken
    assert vmamba(*arguments, "--sizes", "32", "--output", stem, "--overwrite").status == 0
    assert len(stem.with_suffix(".csv").read_text().splitlines()) == 2
    assert "is not a list of positive whole numbers" in one_line(vmamba(*arguments, "--sizes", "32,"))
    assert "give one of them" in one_line(vmamba(*arguments, "--sizes", "32", "--img-size", 32))


def test_models_of_a_fixed_size_are_fitted(data, tmp_path):
    """timm's transformers refuse images of other sizes than they were built for."""
    path = tmp_path / "weights.pth"
    torch.save({"model": timm.create_model("test_vit", num_classes=3).state_dict()}, path)
    arguments = ("--model", "test_vit", "--checkpoint", path, "--num-classes", 3, "--data", data, "--workers", 0)
    result = vmamba("validate", *arguments, "--sizes", "160,96", "--output", tmp_path / "sizes")
    assert result.status == 0, result.err
    assert "test_vit at 96x96" in result.out


def test_mistakes_in_naming_the_model(best, published, data, tmp_path):
    assert "which model?" in one_line(vmamba("validate"))
    assert "which weights for" in one_line(vmamba("validate", "--model", "test_vmamba"))
    assert "does not say which model" in one_line(vmamba("validate", "--checkpoint", published))
    assert "unknown model" in one_line(vmamba("validate", "--model", "test_vmambo", "--checkpoint", published))
    assert "not of 'resnet18'" in one_line(vmamba("validate", "--model", "resnet18", "--checkpoint", best))
    both = ("--model", "test_convnext", "--pretrained", "--checkpoint", published)
    assert "both name weights" in one_line(vmamba("validate", *both))
    assert "which images?" in one_line(vmamba("validate", "--model", "test_convnext", "--checkpoint", published))
    assert "has 3 classes, but test_convnext has 1000 outputs" in one_line(
        vmamba("validate", "--model", "test_convnext", "--checkpoint", published, "--data", data)
    )
    assert "no published weights" in one_line(vmamba("validate", "--model", "test_vmamba", "--pretrained"))


@pytest.mark.parametrize("model", ["test_convnext2", "test_vmamba"])
def test_wrong_published_weights(published, model):
    message = one_line(vmamba("validate", "--model", model, "--checkpoint", published, "--data", "digits"))
    assert str(published) in message
    assert "missing" in message or "shape(s) differ" in message


def test_damaged_checkpoints(best, tmp_path):
    whole = best.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:-1000])
    assert "is damaged" in one_line(vmamba("validate", "--checkpoint", tmp_path / "cut.pth"))
    assert "not found" in one_line(vmamba("validate", "--checkpoint", tmp_path / "none.pth"))
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / "a.safetensors").write_bytes(b"nothing")
        assert name in one_line(
            vmamba("validate", "--model", "test_convnext", "--checkpoint", tmp_path / name, "--data", "digits")
        )


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_checkpoint_that_may_not_be_read(tmp_path, monkeypatch, name):
    (tmp_path / name).touch()
    monkeypatch.setattr("builtins.open", refuse(tmp_path / name))
    message = one_line(vmamba("validate", "--model", "test_convnext", "--checkpoint", tmp_path / name))
    assert f"cannot read checkpoint {tmp_path / name}: Permission denied" in message


def refuse(path):
    """An ``open`` that may not read one file, which root may."""

    def opened(file, *args, **kwargs):
        if str(file) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return builtin(file, *args, **kwargs)

    builtin = open
    return opened
