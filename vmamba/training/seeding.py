"""Randomness that depends on where training stands, never on how it got there.

Every epoch, and every sample within it, is seeded from (seed, stream, epoch, sample). So a resumed run draws what an
uninterrupted run would have drawn, with any number of loader workers and training processes, and no generator state has
to be stored.
"""

import contextlib
import enum
import random
from collections.abc import Iterator

import numpy as np
import torch


class Stream(enum.IntEnum):
    """What the numbers are drawn for; streams of one run do not overlap."""

    WEIGHTS = 0  # (): initial weights, the same in every process
    ORDER = 1  # (epoch,): order of the samples, the same in every process
    SAMPLE = 2  # (epoch, index), and from the second on the copy's number: augmentation of one sample
    MIXUP = 3  # (epoch, update): mixing of one global batch, the same in every process
    MODEL = 4  # (epoch, rank): dropout and stochastic depth


def seed_everything(seed: int, stream: Stream, *position: int) -> None:
    """Seed Python, NumPy and torch, its GPUs included."""
    torch.manual_seed(_seed_cpu(seed, stream, *position))


def seed_cpu(seed: int, stream: Stream, *position: int) -> None:
    """Seed Python, NumPy and torch on the CPU; generators of GPUs stay as they are."""
    torch.default_generator.manual_seed(_seed_cpu(seed, stream, *position))


def _seed_cpu(seed: int, stream: Stream, *position: int) -> int:
    """Seed Python and NumPy; returns the seed for torch."""
    words = np.random.SeedSequence((seed, int(stream), *position)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    return int(words[2])


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Give the CPU generators back as they were, whatever the body draws or seeds."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
