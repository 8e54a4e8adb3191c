"""A resumed run is the run that was not interrupted."""

import contextlib
import csv
import os
import re
import signal
import time

import pytest
import torch
import yaml

from tests.running import QUICK, make_folder, one_line, start, train, vmamba
from vmamba.training import checkpoint, engine
from vmamba.training.trainer import Trainer

# Everything random at once: augmentation, also of copies, mixing, stochastic depth. And all that looks at the average.
RANDOM = (
    *("--auto-augment", "rand-m5-inc1", "--reprob", "0.3", "--mixup", "0.5", "--cutmix", "0.5"),
    *("--drop-path-rate", "0.2", "--ema-decay", "0.9", "--repeated-aug", "2", "--mesa", "0.5"),
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


@pytest.fixture
def stopped(data, tmp_path):
    """A run of two epochs, stopped after the first."""
    assert train(data, tmp_path, "run", "--stop-after", 1).status == 0
    return tmp_path / "run"


def test_files_are_replaced_and_not_written_to(stopped):
    """A second name of the old file still has the old content."""
    names = ("config.yaml", "summary.csv", "curves.png")
    before = {name: (stopped / name).read_bytes() for name in names}
    for name in names:
        os.link(stopped / name, stopped / f"old_{name}")
    assert vmamba("train", "--resume", stopped, "--seed", 1).status == 0
    for name in names:
        assert (stopped / f"old_{name}").read_bytes() == before[name]
        assert (stopped / name).read_bytes() != before[name]


@pytest.mark.parametrize(
    "damage",
    [
        b"1,0.1,9.9",
        b"1,0.1,9.9,many,0,0,9.9,0,0,1,1",
        b"1,0.1,9.9,,0,0,9.9,0,0,1,1",
        b"0,1,2,3,4,5,6,7,8,9,10,11",
        b"\xff",
    ],
)
def test_damaged_summary(stopped, damage):
    config = (stopped / "config.yaml").read_bytes()
    with open(stopped / "summary.csv", "ab") as file:
        file.write(damage)
    damaged = (stopped / "summary.csv").read_bytes()
    message = one_line(vmamba("train", "--resume", stopped, "--seed", 1))
    assert "summary.csv is damaged" in message
    assert "mend it, or move it away" in message
    assert (stopped / "summary.csv").read_bytes() == damaged
    assert (stopped / "config.yaml").read_bytes() == config


@pytest.mark.parametrize("name", ["train.log", "config.yaml", "summary.csv", "curves.png", "tensorboard"])
def test_something_in_the_way_of_a_file(stopped, name):
    (stopped / name).unlink(missing_ok=True)
    if name == "tensorboard":
        (stopped / name).touch()
    else:
        (stopped / name).mkdir()
    message = one_line(vmamba("train", "--resume", stopped, "--tensorboard"))
    assert re.search(rf"cannot (write|write to|read) \S+{name}", message)


def test_resume_as_another_model(whole):
    message = one_line(vmamba("train", "--resume", whole, "--model", "test_convnext", "--epochs", 9))
    assert "is a run of 'test_vmamba' and cannot be resumed as 'test_convnext'" in message


def test_resume_of_a_changed_model(whole):
    kwargs = "{depths: [1, 1, 1, 2]}"
    message = one_line(vmamba("train", "--resume", whole, "--model-kwargs", kwargs, "--epochs", 9))
    assert "last.pth does not fit VMamba" in message
    assert "missing (stages." in message


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--opt", "sgd"), "is a run with the optimiser 'adamw', whose state is of no use to 'sgd'; leave --opt out"),
        (("--layer-decay", 0.5), "the state of the optimiser does not fit"),
    ],
)
def test_resume_with_another_optimiser(whole, option, message):
    assert message in one_line(vmamba("train", "--resume", whole, *option, "--epochs", 9))


def test_options_change_the_optimiser_of_a_resumed_run(data, tmp_path):
    """What the configuration says comes from the options, the state from the run."""
    options = ("--weight-decay", 0.7, "--opt-betas", "0.5,0.6", "--opt-eps", 1e-5, "--layer-decay", 0.8)
    assert train(data, tmp_path, "new", *options, epochs=3).status == 0
    assert train(data, tmp_path, "run", "--layer-decay", 0.5, "--stop-after", 1, epochs=3).status == 0
    result = vmamba("train", "--resume", tmp_path / "run", *options)
    assert result.status == 0, result.err
    resumed, new = (checkpoint.read(tmp_path / name / "last.pth")["optimizer"] for name in ("run", "new"))
    assert resumed["param_groups"] == new["param_groups"]
    assert {group["weight_decay"] for group in resumed["param_groups"]} == {0.0, 0.7}
    assert {state["step"].item() for state in resumed["state"].values()} == {9}


def test_another_batch_size_leaves_the_schedule_where_it_was(data, whole, tmp_path):
    assert train(data, tmp_path, "run", *RANDOM, "--stop-after", 2, epochs=4).status == 0
    result = vmamba("train", "--resume", tmp_path / "run", "--batch-size", 4)
    assert result.status == 0, result.err
    rates, expected = ([float(row["lr"]) for row in curve(run)] for run in (tmp_path / "run", whole))
    assert rates == pytest.approx(expected)


def test_resume_from_the_wrong_file(whole, tmp_path):
    assert "holds weights only" in one_line(vmamba("train", "--resume", whole / "best.pth"))
    assert "not found" in one_line(vmamba("train", "--resume", tmp_path))
    assert "leave --config and --name out" in one_line(vmamba("train", "--resume", whole, "--config", "digits"))
    data = (whole / "last.pth").read_bytes()
    (tmp_path / "last.pth").write_bytes(data[: len(data) // 3])
    assert "is damaged" in one_line(vmamba("train", "--resume", tmp_path))


def test_interrupt_in_a_save_loses_nothing(data, whole, tmp_path, monkeypatch):
    save = checkpoint.save

    def interrupted(content, path):
        if content["epoch"] == 2:
            raise KeyboardInterrupt
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        assert train(data, tmp_path, "run", *RANDOM, epochs=4).status == 130
    assert curve(tmp_path / "run") == curve(whole)[:2]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert vmamba("train", "--resume", tmp_path / "run").status == 0
    assert_same_run(tmp_path / "run", whole)


def test_interrupted_run_says_how_to_go_on(data, tmp_path):
    run = ("--data", data, "--output", tmp_path, "--name", "run", "--epochs", 400, "--warmup-epochs", 1)
    process = start("-m", "vmamba.cli.main", "train", *QUICK, *run)
    while not (tmp_path / "run" / "last.pth").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert f"vmamba train --resume {tmp_path / 'run'}" in out
    assert err.strip().splitlines()[-1] == "vmamba: interrupted"
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("owner", "function", "calls", "epochs"),
    [
        (engine, "_update", 4, 1),  # the first of three of the second epoch
        (engine, "accuracy", 7, 1),  # the third of four batches that its validations have
        (Trainer, "_save", 2, 2),
        (Trainer, "_save", 3, 3),  # nothing is left to do
    ],
    ids=["update", "validation", "save", "end"],
)
def test_an_interrupt_that_gets_lost_ends_the_run_all_the_same(
    data, tmp_path, monkeypatch, owner, function, calls, epochs
):
    """As where it arrives in a destructor, out of which no exception comes."""
    called, real = [], getattr(owner, function)

    def interrupted(*arguments, **options):
        called.append(function)
        if len(called) == calls:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, function, interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not there in a process started in the background
    result = train(data, tmp_path, "run", "--ema-decay", 0.0, epochs=3)
    assert result.status == 130, result.err
    assert len(called) == calls
    assert len(curve(tmp_path / "run")) == epochs
    assert f"vmamba train --resume {tmp_path / 'run'}" in result.out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
