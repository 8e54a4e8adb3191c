"""A resumed run is the run that was not interrupted."""

import csv
import signal
import time

import pytest
import torch
import yaml

from tests.running import QUICK, make_folder, one_line, start, train, vmamba

# Everything random at once: augmentation, mixing, stochastic depth.
RANDOM = (
    *("--auto-augment", "rand-m5-inc1", "--reprob", "0.3", "--mixup", "0.5", "--cutmix", "0.5"),
    *("--drop-path-rate", "0.2", "--ema-decay", "0.9"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of four epochs."""
    output = tmp_path_factory.mktemp("whole")
    assert train(data, output, "run", *RANDOM, epochs=4).status == 0
    return output / "run"


def curve(run):
    """summary.csv without what depends on the clock."""
    with open(run / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_second")} for row in rows]


def assert_same_run(run, expected):
    assert curve(run) == curve(expected)
    for name in ("last.pth", "best.pth"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (run, expected))
        assert ours.keys() == theirs.keys()
        for key in ("state_dict", "state_dict_ema"):
            for parameter, value in theirs.get(key, {}).items():
                assert torch.equal(ours[key][parameter], value), (name, key, parameter)
        assert ours.get("best") == theirs.get("best")


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_is_the_uninterrupted_run(data, whole, tmp_path, workers):
    assert train(data, tmp_path, "run", *RANDOM, "--stop-after", 2, epochs=4).status == 0
    assert len(curve(tmp_path / "run")) == 2
    result = vmamba("train", "--resume", tmp_path / "run", "--workers", workers, "--no-tensorboard")
    assert result.status == 0, result.err
    assert "resume after epoch 2" in result.out
    assert_same_run(tmp_path / "run", whole)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["workers"] == workers


def test_killed_run_goes_on_from_its_last_epoch(data, whole, tmp_path):
    folder = tmp_path / "run"
    run = ("--data", data, "--output", tmp_path, "--name", "run", "--epochs", 4, "--warmup-epochs", 1)
    process = start("-m", "vmamba.cli.main", "train", *QUICK, *RANDOM, *run)
    while not (folder / "last.pth").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(0.15)  # into the next epoch
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # What a kill in the middle of a save, and one between the checkpoints and the summary, would leave.
    (folder / ".last.pth.tmp-1").write_bytes(b"half")
    with open(folder / "summary.csv", "a") as file:
        file.write("4,0.1,9.9,9.9,0,0,9.9,0,0,1,1\n")
    result = vmamba("train", "--resume", folder)
    assert result.status == 0, result.err
    assert "removed .last.pth.tmp-1" in result.err
    assert_same_run(folder, whole)


def test_options_change_the_config_of_a_resumed_run(whole, tmp_path, data):
    assert train(data, tmp_path, "run", epochs=2).status == 0
    assert "all 2 epochs are done" in one_line(vmamba("train", "--resume", tmp_path / "run"))
    assert vmamba("train", "--resume", tmp_path / "run", "--epochs", 3).status == 0
    assert len(curve(tmp_path / "run")) == 3


def test_resume_as_another_model(whole):
    message = one_line(vmamba("train", "--resume", whole, "--model", "test_convnext", "--epochs", 9))
    assert "is a run of 'test_vmamba' and cannot be resumed as 'test_convnext'" in message


def test_resume_of_a_changed_model(whole):
    kwargs = "{depths: [1, 1, 1, 2]}"
    message = one_line(vmamba("train", "--resume", whole, "--model-kwargs", kwargs, "--epochs", 9))
    assert "last.pth does not fit VMamba" in message
    assert "missing (stages." in message


def test_resume_with_another_optimiser(whole):
    message = one_line(vmamba("train", "--resume", whole, "--opt", "sgd", "--epochs", 9, "--layer-decay", 0.5))
    assert "optimiser" in message


def test_resume_from_the_wrong_file(whole, tmp_path):
    assert "holds weights only" in one_line(vmamba("train", "--resume", whole / "best.pth"))
    assert "not found" in one_line(vmamba("train", "--resume", tmp_path))
    assert "leave --config and --name out" in one_line(vmamba("train", "--resume", whole, "--config", "digits"))
    data = (whole / "last.pth").read_bytes()
    (tmp_path / "last.pth").write_bytes(data[: len(data) // 3])
    assert "is damaged" in one_line(vmamba("train", "--resume", tmp_path))


def test_interrupted_run_says_how_to_go_on(data, tmp_path):
    run = ("--data", data, "--output", tmp_path, "--name", "run", "--epochs", 400, "--warmup-epochs", 1)
    process = start("-m", "vmamba.cli.main", "train", *QUICK, *run)
    while not (tmp_path / "run" / "last.pth").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert f"vmamba train --resume {tmp_path / 'run'}" in out
    assert err.strip().splitlines()[-1] == "vmamba: interrupted"
    assert "Traceback" not in err
