import csv
import json
import re
import resource
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from tests.running import make_folder, one_line, start, train, vmamba
from vmamba.training import checkpoint
from vmamba.training.config import load
from vmamba.training.model_factory import ModelRequest, create_from
from vmamba.training.trainer import _build_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run of three epochs, and what it printed."""
    output = tmp_path_factory.mktemp("runs")
    result = train(data, output, "run", "--tensorboard", epochs=3)
    assert result.status == 0, result.err
    return output / "run", result.out


def test_folder_of_a_run(run):
    folder, out = run
    names = {entry.name for entry in folder.iterdir()}
    assert names == {
        *("config.yaml", "summary.csv", "curves.png", "last.pth", "best.pth", "train.log", "tensorboard"),
    }
    with Image.open(folder / "curves.png") as curves:
        assert min(curves.size) > 300
    with open(folder / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["train_loss"]) < float(rows[0]["train_loss"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["batch_size"] == 8
    assert "best top-1" in out
    assert f"next   vmamba predict IMAGE_OR_FOLDER --checkpoint {folder / 'best.pth'}" in out
    assert "epoch 3/3" in (folder / "train.log").read_text()
    assert any((folder / "tensorboard").iterdir())


def test_files_hold_plain_values(run):
    for name in ("last.pth", "best.pth"):
        torch.load(run[0] / name, weights_only=True)


def test_timm_loads_the_best(run):
    content = checkpoint.read(run[0] / "best.pth")
    model = timm.create_model(content["arch"], checkpoint_path=str(run[0] / "best.pth"), **content["model_args"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, content["state_dict"][name])


def test_best_is_the_best_epoch(run):
    with open(run[0] / "summary.csv", newline="") as file:
        tops = [max(float(row["eval_top1"]), float(row["ema_top1"])) for row in csv.DictReader(file)]
    content = checkpoint.read(run[0] / "best.pth")
    assert content["top1"] == max(tops)
    assert content["epoch"] == tops.index(max(tops)) + 1
    assert content["class_names"] == ["blue", "green", "red"]
    json.dumps({key: value for key, value in content.items() if key != "state_dict"})


def test_config_of_a_run_trains_again(run, tmp_path):
    result = vmamba("train", "--config", run[0] / "config.yaml", "--output", tmp_path, "--epochs", 2)
    assert result.status == 0, result.err
    folder = next(tmp_path.iterdir())
    assert folder.name.startswith("test_vmamba-")


def test_names_of_runs_are_not_reused(data, run, tmp_path):
    message = one_line(train(data, run[0].parent, "run"))
    assert "exists already" in message
    assert "--resume" in message


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp(data, tmp_path, amp):
    result = train(data, tmp_path, "run", "--amp", amp)
    assert result.status == 0, result.err
    content = checkpoint.read(tmp_path / "run" / "last.pth")
    assert all(value.dtype == torch.float32 for value in content["state_dict"].values())
    assert ("scale" in content["scaler"]) == (amp == "fp16")


@pytest.mark.slow
def test_compile(data, tmp_path):
    result = train(data, tmp_path, "run", "--compile")
    assert result.status == 0, result.err
    names = checkpoint.read(tmp_path / "run" / "last.pth")["state_dict"]
    assert not any(name.startswith("_orig_mod") for name in names)


def test_fine_tuning_from_a_run_with_other_classes(run, tmp_path):
    data = make_folder(tmp_path / "data")
    (data / "train" / "red").rename(data / "train" / "blue2")
    (data / "val" / "red").rename(data / "val" / "blue2")
    for split in ("train", "val"):
        (data / split / "grey").mkdir()
        Image.fromarray(np.full((40, 40), 128, np.uint8)).save(data / split / "grey" / "0.png")
    result = train(data, tmp_path, "run", "--initial-checkpoint", run[0] / "best.pth", "--lr", 0.1, "--epochs", 2)
    assert result.status == 0, result.err
    assert "4 classes" in result.out


def test_fine_tuning_keeps_to_the_settings(run, data, tmp_path):
    """Those of the command line, not those of the run that the weights come from."""
    settings = ("--drop-path-rate", 0.3, "--drop-rate", 0.2)
    first = ("--initial-checkpoint", run[0] / "best.pth", *settings)
    assert train(data, tmp_path, "run", *first).status == 0
    config = load(str(tmp_path / "run" / "config.yaml"))
    model = _build_model(config, 3, fresh=True)
    assert model.head.drop.p == 0.2
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.3)
    assert_same_weights(_build_model(config, 3, fresh=True), checkpoint.read(run[0] / "best.pth")["state_dict"])


def assert_same_weights(model, weights):
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_fine_tuning_of_another_shape_is_refused_before_it_starts(data, tmp_path):
    assert train(data, tmp_path, "wide", "--model-kwargs", "{ssm_ratio: 2.0}").status == 0
    message = one_line(train(data, tmp_path, "run", "--initial-checkpoint", tmp_path / "wide" / "best.pth"))
    assert "best.pth (weights of 'test_vmamba') does not fit" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("classes", [3, 7])
def test_fine_tuning_from_a_foreign_file(data, tmp_path, classes):
    model = timm.create_model("test_vmamba", num_classes=classes)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "foreign.pth")
    result = train(data, tmp_path, "run", "--initial-checkpoint", tmp_path / "foreign.pth")
    assert result.status == 0, result.err
    config = load(str(tmp_path / "run" / "config.yaml"))
    started = _build_model(config, 3, fresh=True)
    assert started.num_classes == 3
    kept = {key: value for key, value in model.state_dict().items() if classes == 3 or not key.startswith("head.")}
    assert all(torch.equal(started.state_dict()[key], value) for key, value in kept.items())


def test_weights_of_a_larger_stride_start_vim_of_a_smaller_one(tmp_path):
    """Vim's own way to its best figures: only the position embedding changes, which its filter resizes."""
    small = {"embed_dim": 32, "depth": 2, "img_size": 32}
    model = timm.create_model("vim_tiny_patch16_224", num_classes=3, **small)
    torch.save(
        {"format": checkpoint.WEIGHTS_FORMAT, "arch": "vim_tiny_patch16_224", "state_dict": model.state_dict()},
        tmp_path / "best.pth",
    )
    request = ModelRequest("vim_tiny_patch16_stride8_224", kwargs=small)
    started = create_from(request, tmp_path / "best.pth")
    assert started.pos_embed.shape != model.pos_embed.shape
    rest = {key: value for key, value in model.state_dict().items() if key != "pos_embed"}
    assert all(torch.equal(started.state_dict()[key], value) for key, value in rest.items())


def test_a_run_is_used_from_any_folder(tmp_path, monkeypatch):
    home = tmp_path / "home"
    make_folder(home / "photos")
    (home / "classes.txt").write_text("red\ngreen\nblue\n")
    monkeypatch.chdir(home)
    assert train("photos", "runs", "run", "--class-map", "classes.txt", "--stop-after", 1).status == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder = home / "runs" / "run"
    assert vmamba("train", "--resume", folder).status == 0
    assert vmamba("train", "--config", folder / "config.yaml", "--output", "again").status == 0
    result = vmamba("validate", "--checkpoint", folder / "best.pth", "--workers", 0)
    assert result.status == 0, result.err
    assert checkpoint.read(folder / "best.pth")["class_names"] == ["red", "green", "blue"]


@pytest.mark.parametrize("form", [3, torch.zeros(2), "pt"])
def test_a_foreign_file_may_have_a_format_of_its_own(data, tmp_path, form):
    weights = timm.create_model("test_vmamba", num_classes=3).state_dict()
    torch.save({"format": form, "state_dict": weights}, tmp_path / "foreign.pth")
    assert_same_weights(create_from(ModelRequest("test_vmamba"), tmp_path / "foreign.pth"), weights)


def test_a_file_of_a_later_version(tmp_path):
    torch.save({"format": "vmamba-training-2"}, tmp_path / "last.pth")
    message = one_line(vmamba("train", "--resume", tmp_path))
    assert "has the format 'vmamba-training-2', which this version of vmamba cannot read; update vmamba" in message


def test_any_timm_model(data, tmp_path):
    assert train(data, tmp_path, "a", "--model", "test_convnext").status == 0
    # one that is built for a fixed size of image
    assert train(data, tmp_path, "b", "--model", "test_vit").status == 0


def test_unreadable_training_image_is_skipped(data, tmp_path):
    data = make_folder(tmp_path / "data")
    (data / "train" / "red" / "0.png").write_text("no image")
    result = train(data, tmp_path, "run")
    assert result.status == 0, result.err
    assert "Skipped sample" in result.err


# Mistakes


def test_unknown_model(data, tmp_path):
    message = one_line(train(data, tmp_path, "run", "--model", "vmamba_tini"))
    assert "unknown model 'vmamba_tini'; did you mean vmamba_tiny" in message
    assert not list(tmp_path.iterdir())


def test_unknown_tag(data, tmp_path):
    message = one_line(train(data, tmp_path, "run", "--model", "vmamba_tiny_s1l8.in2k"))
    assert "no weights are known as 'vmamba_tiny_s1l8.in2k'; did you mean vmamba_tiny_s1l8.in1k" in message


def test_unknown_model_argument(data, tmp_path):
    message = one_line(train(data, tmp_path, "run", "--model-kwargs", "{deepness: 3}"))
    assert "model 'test_vmamba' cannot be built" in message
    assert "deepness" in message


def test_no_published_weights(data, tmp_path):
    message = one_line(train(data, tmp_path, "run", "--pretrained"))
    assert "no published weights" in message
    assert "--checkpoint" not in message


def test_wrong_initial_checkpoint(data, tmp_path, run):
    wrong = tmp_path / "wrong.pth"
    torch.save({"state_dict": timm.create_model("test_convnext").state_dict()}, wrong)
    message = one_line(train(data, tmp_path, "run", "--initial-checkpoint", wrong))
    assert "wrong.pth" in message
    assert "missing" in message
    message = one_line(
        train(data, tmp_path, "run", "--model", "test_convnext", "--initial-checkpoint", run[0] / "best.pth")
    )
    assert "best.pth (weights of 'test_vmamba') does not fit" in message


def test_missing_and_empty_data(tmp_path):
    assert "data 'nowhere' not found" in one_line(train("nowhere", tmp_path, "run"))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "val").mkdir()
    assert "Found 0 images" in one_line(train(tmp_path / "empty", tmp_path, "run"))


def test_no_validation_split(tmp_path):
    data = make_folder(tmp_path / "data", splits=("train",))
    for folder in (data / "train").iterdir():
        folder.rename(data / folder.name)
    (data / "train").rmdir()
    assert "would use the same images" in one_line(train(data, tmp_path, "run"))


def test_images_without_class_folders(tmp_path):
    data = make_folder(tmp_path / "data")
    (data / "train" / "red" / "0.png").rename(data / "train" / "0.png")
    assert "images lie directly in" in one_line(train(data, tmp_path, "run"))


def test_splits_with_different_classes(tmp_path):
    data = make_folder(tmp_path / "data")
    (data / "val" / "red").rename(data / "val" / "yellow")
    message = one_line(train(data, tmp_path, "run"))
    assert "different classes" in message
    assert "red, yellow" in message


def test_class_count_that_does_not_fit(data, tmp_path):
    assert "num_classes is 5, but" in one_line(train(data, tmp_path, "run", "--num-classes", 5))


def test_too_little_data(data, tmp_path):
    message = one_line(train(data, tmp_path, "run", "--batch-size", 64))
    assert "batch_size 64 is larger than the training split (24 images)" in message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--img-size", 0, "--img-size is 0, expected at least 1"),
        ("--drop-path-rate", 2, "--drop-path-rate is 2.0, expected 0 or more and less than 1"),
        ("--interpolation", "foo", "--interpolation is 'foo', expected nearest or"),
        ("--auto-augment", "foo", "auto_augment 'foo' is no policy of timm's; they look like rand-m9"),
        ("--auto-augment", "rand-z1", "auto_augment 'rand-z1' is no policy of timm's"),
        ("--opt-betas", "0.5", "opt 'adamw' has more betas than opt_betas: 0.5"),
        ("--lr", "abc", "error: --lr: 'abc' is not a number"),
        ("--threads", 0, "error: --threads is 0, expected at least 1"),
        ("--stop-after", 0, "--stop-after: '0' is not a whole number of at least 1"),
        ("--stop-after", "-1", "--stop-after: '-1' is not a whole number of at least 1"),
    ],
)
def test_mistakes_in_options_leave_no_folder(data, tmp_path, option, value, message):
    assert message in one_line(train(data, tmp_path, "run", option, value))
    assert not list(tmp_path.iterdir())


def test_mistyped_value(data, tmp_path):
    assert "epochs: 'ten' is not a whole number" in one_line(train(data, tmp_path, "run", "--epochs", "ten"))
    assert "opt 'adumw'" in one_line(train(data, tmp_path, "run", "--opt", "adumw"))
    assert "Unknown scheduler 'cosin'" in one_line(train(data, tmp_path, "run", "--sched", "cosin"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(data, tmp_path):
    assert "sees no CUDA GPU" in one_line(train(data, tmp_path, "run", "--device", "cuda"))


def test_loss_that_is_not_finite(data, tmp_path):
    assert train(data, tmp_path, "run", "--stop-after", 1, "--no-ema", "--opt", "sgd", epochs=3).status == 0
    before = (tmp_path / "run" / "last.pth").read_bytes()
    message = one_line(vmamba("train", "--resume", tmp_path / "run", "--lr", "1e30", "--clip-grad", "null"))
    assert re.search(r"the loss became nan in epoch 2, update [12] \((first in the output of '|weight ')", message)
    assert (tmp_path / "run" / "last.pth").read_bytes() == before


def test_disk_full_in_a_run(data, tmp_path):
    """A limit on the size of files fails a save half-way, as a full disk does."""
    assert train(data, tmp_path, "run", "--stop-after", 1, epochs=3).status == 0
    before = (tmp_path / "run" / "last.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        result = vmamba("train", "--resume", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large; the previous one is intact" in one_line(result)
    assert (tmp_path / "run" / "last.pth").read_bytes() == before
    assert vmamba("train", "--resume", tmp_path / "run").status == 0


def test_tensorboard_missing_is_said_once(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = train(data, tmp_path, "run", "--tensorboard")
    assert result.status == 0
    assert result.err.count("TensorBoard is not installed") == 1


@pytest.mark.slow
def test_first_command(tmp_path):
    """`vmamba train` with no arguments learns the digits, in minutes on one core."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    process = start("-m", "vmamba.cli.main", "train", "--output", tmp_path)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert checkpoint.read(tmp_path / "vmamba_nano_32-digits" / "best.pth")["top1"] >= 97.5
    # Time of the processor: what else runs on the machine does not count.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 300
