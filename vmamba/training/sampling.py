"""Which process sees which sample: independent of the number of processes.

The order of an epoch is cut into global batches; a global batch is dealt out to its parts, one part for each process
and accumulation step. So the same samples make up an update however they are spread.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from vmamba.errors import UserError
from vmamba.training.seeding import Stream, isolated, seed_cpu


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is spread.

    Args:
        batch_size: Images in one update.
        accumulate: Forward passes of one update in each process.
        world: Number of processes.
        rank: Number of this process.
    """

    batch_size: int
    accumulate: int = 1
    world: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.batch_size % self.parts:
            raise UserError(
                f"batch_size {self.batch_size} (global) cannot be divided over {self.world} process(es) x "
                f"{self.accumulate} accumulation step(s); use a multiple of {self.parts}"
            )

    @property
    def parts(self) -> int:
        return self.world * self.accumulate

    @property
    def part_size(self) -> int:
        """Images in one forward pass of one process."""
        return self.batch_size // self.parts

    def part(self, batch: list[int], step: int) -> list[int]:
        """The samples of a global batch that this process takes in an accumulation step.

        timm's mixup pairs the first image of a batch with the last, the second with the last but one. Taking each part
        from both ends keeps those pairs together, so the pairs are those of the undivided batch.
        """
        number = step * self.world + self.rank
        half, odd = divmod(self.part_size, 2)
        if odd:
            return batch[number * self.part_size : (number + 1) * self.part_size]
        end = len(batch) - number * half
        return batch[number * half : (number + 1) * half] + batch[end - half : end]


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields the parts of this process as lists of (epoch, index), shuffled anew in every epoch.

    The last, incomplete batch of an epoch is left out.

    Args:
        length: Number of samples.
        plan: How global batches are spread.
        seed: Seed of the run.
    """

    def __init__(self, length: int, plan: BatchPlan, seed: int) -> None:
        self.length = length
        self.plan = plan
        self.seed = seed
        self.epoch = 0

    @property
    def updates(self) -> int:
        return self.length // self.plan.batch_size

    def __len__(self) -> int:
        return self.updates * self.plan.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        with isolated():
            seed_cpu(self.seed, Stream.ORDER, self.epoch)
            order = torch.randperm(self.length).tolist()
        for update in range(self.updates):
            batch = order[update * self.plan.batch_size : (update + 1) * self.plan.batch_size]
            for step in range(self.plan.accumulate):
                yield [(self.epoch, index) for index in self.plan.part(batch, step)]


class SeededDataset(Dataset):
    """Augments each sample with its own random numbers, seeded from the epoch and the index.

    It is indexed with the (epoch, index) pairs of :class:`EpochBatchSampler`: loader processes that outlive an epoch
    could not learn of the new epoch in another way.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: tuple[int, int]) -> Any:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[tuple[int, int]]) -> list[Any]:
        """What the loader calls for a batch. The training process's own generators are left alone."""
        samples = []
        with isolated():
            for epoch, index in positions:
                seed_cpu(self.seed, Stream.SAMPLE, epoch, index)
                samples.append(self.dataset[index])
        return samples
