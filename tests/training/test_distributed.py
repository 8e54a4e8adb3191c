"""Training in two processes is training in one."""

import csv

import pytest
import torch

from tests.running import QUICK, make_folder, one_line, torchrun, vmamba

# Stochastic depth and dropout are off: they are drawn by each process for its own images. Augmentation and mixing are
# on: they are drawn for each image, and for each global batch.
OPTIONS = (
    *QUICK,
    *(
        "--drop-path-rate",
        "0",
        "--auto-augment",
        "rand-m5-inc1",
        "--reprob",
        "0.3",
        "--mixup",
        "0.5",
        "--cutmix",
        "0.5",
    ),
    *("--epochs", "2", "--warmup-epochs", "1", "--ema-decay", "0.9", "--opt", "sgd", "--lr", "0.1"),
    *("--repeated-aug", "2", "--mesa", "0.5"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    result = vmamba("train", *OPTIONS, "--data", data, "--output", output, "--name", "run")
    assert result.status == 0, result.err
    return output / "run"


def read(run):
    with open(run / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return torch.load(run / "last.pth", weights_only=True), rows


def assert_close(run, expected):
    (ours, our_rows), (theirs, their_rows) = read(run), read(expected)
    for key in ("state_dict", "state_dict_ema"):
        for name, value in theirs[key].items():
            torch.testing.assert_close(ours[key][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for our_row, their_row in zip(our_rows, their_rows, strict=True):
        for column in ("train_loss", "eval_loss", "ema_loss"):
            assert float(our_row[column]) == pytest.approx(float(their_row[column]), rel=1e-4)
        for column in ("lr", "eval_top1", "eval_top5", "ema_top1"):
            assert our_row[column] == their_row[column]


def train(processes, *arguments):
    return torchrun(processes, "-m", "vmamba.cli.main", "train", *arguments)


def test_two_processes(data, alone, tmp_path):
    """15 validation images over two processes: an odd number, and still each counts once."""
    status, out, err = train(2, *OPTIONS, "--data", data, "--output", tmp_path, "--name", "run")
    assert status == 0, err
    assert "2 processes" in out
    assert out.count("epoch 1/2") == 1  # only one of them reports
    assert_close(tmp_path / "run", alone)


def test_two_processes_with_accumulation(data, alone, tmp_path):
    status, _, err = train(2, *OPTIONS, "--accumulate", 2, "--data", data, "--output", tmp_path, "--name", "run")
    assert status == 0, err
    assert_close(tmp_path / "run", alone)


def test_accumulation(data, alone, tmp_path):
    result = vmamba("train", *OPTIONS, "--accumulate", 4, "--data", data, "--output", tmp_path, "--name", "run")
    assert result.status == 0, result.err
    assert_close(tmp_path / "run", alone)


def test_gradient_checkpointing(data, alone, tmp_path):
    result = vmamba("train", *OPTIONS, "--grad-checkpointing", "--data", data, "--output", tmp_path, "--name", "run")
    assert result.status == 0, result.err
    assert_close(tmp_path / "run", alone)


def test_batch_that_cannot_be_divided(data, tmp_path):
    result = vmamba("train", *OPTIONS, "--accumulate", 3, "--data", data, "--output", tmp_path)
    assert "batch_size 8 (global) cannot be divided" in one_line(result)
    assert not list(tmp_path.iterdir())


def test_mixing_needs_even_batches(data, tmp_path):
    result = vmamba("train", *OPTIONS, "--accumulate", 8, "--data", data, "--output", tmp_path)
    assert "even number of images" in one_line(result)
