"""Runs the `vmamba` command, in this process or in one of its own, on small data."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vmamba.cli.main import main

ROOT = Path(__file__).parents[1]
COLORS = {"blue": (30, 40, 220), "green": (20, 200, 60), "red": (230, 40, 30)}

# A model that takes a fraction of a second for an epoch of a few dozen small images.
QUICK = (
    *("--model", "test_vmamba", "--img-size", "32", "--batch-size", "8", "--workers", "0"),
    *("--lr", "1e-3", "--lr-batch-size", "null", "--amp", "none", "--device", "cpu", "--no-tensorboard"),
)


@dataclass
class Result:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str


def vmamba(*arguments: object) -> Result:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return Result(status, out.getvalue(), err.getvalue())


def train(data: Path, output: Path, name: str, *arguments: object, epochs: int = 2) -> Result:
    """Train the quick model on a folder of images."""
    run = ("--data", data, "--output", output, "--name", name, "--epochs", epochs, "--warmup-epochs", 1)
    return vmamba("train", *QUICK, *run, *arguments)


def start(*command: object, **variables: str) -> subprocess.Popen:
    """Start a program in a process of its own: the arguments after ``python``, and variables of its environment.

    It has as many threads as this one, on which the last digits of results depend.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    environment.pop("RANK", None)
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo asks the network for this machine's name
    environment.update(variables)
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(processes: int, *command: object, timeout: float = 300, **variables: str) -> tuple[int, str, str]:
    """Run a program in several processes, as ``in_group.py`` does; its exit status, and what it printed.

    Processes that wait for each other for ever say where they stand.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    process = start(*launcher, ROOT / "tests" / "in_group.py", *command, **variables)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (*map(int, children), process.pid):
            os.kill(pid, signal.SIGABRT)
        _, err = process.communicate()
        raise AssertionError(f"{processes} processes had not ended after {timeout} s:\n{err}") from None
    return process.returncode, out, err


def make_folder(root: Path, per_class: int = 8, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """An ImageNet-style folder: noisy images, one colour a class."""
    random = np.random.default_rng(0)
    for split in splits:
        for name, color in COLORS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(per_class if split == "train" else 5):
                pixels = np.array(color) + random.normal(0, 40, (40, 48, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return root


def one_line(result: Result) -> str:
    """The error message, having checked that it is one line and no traceback."""
    lines = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    assert result.status == 2, result
    assert len(lines) == 1, result.err
    assert lines[0].startswith("vmamba: error"), result.err
    return lines[0]
