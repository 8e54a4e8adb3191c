"""Which process sees which sample: independent of the number of processes.

The order of an epoch is cut into global batches; a global batch is dealt out to its parts, one part for each process
and accumulation step. So the same samples make up an update however they are spread.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset, Sampler

from vmamba.errors import UserError
from vmamba.training.seeding import Stream, isolated, seed_cpu

T = TypeVar("T")


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

    def part(self, batch: list[T], step: int) -> list[T]:
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


Position = tuple[int, int, int]
"""Where a sample stands in a run: epoch, index in the data set, number of its copy in the epoch."""


class EpochBatchSampler(Sampler[list[Position]]):
    """Yields the parts of this process as lists of positions, shuffled anew in every epoch.

    The last, incomplete batch of an epoch is left out.

    Args:
        length: Number of samples.
        plan: How global batches are spread.
        seed: Seed of the run.
        copies: How often a sample comes in an epoch, next to itself (repeated augmentation, arXiv 1901.09335). An epoch
            is as long as ever, so it has a share of the samples.
    """

    def __init__(self, length: int, plan: BatchPlan, seed: int, copies: int = 1) -> None:
        self.length = length
        self.plan = plan
        self.seed = seed
        self.copies = copies
        self.epoch = 0

    @property
    def updates(self) -> int:
        return self.length // self.plan.batch_size

    def __len__(self) -> int:
        return self.updates * self.plan.accumulate

    def __iter__(self) -> Iterator[list[Position]]:
        with isolated():
            seed_cpu(self.seed, Stream.ORDER, self.epoch)
            drawn = torch.randperm(self.length).tolist()
        order = [(self.epoch, drawn[i // self.copies], i % self.copies) for i in range(self.length)]
        for update in range(self.updates):
            batch = order[update * self.plan.batch_size : (update + 1) * self.plan.batch_size]
            for step in range(self.plan.accumulate):
                yield self.plan.part(batch, step)


class SeededDataset(Dataset):
    """Augments each sample with its own random numbers, seeded from its position.

    It is indexed with the positions of :class:`EpochBatchSampler`: loader processes that outlive an epoch could not
    learn of the new epoch in another way.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: Position) -> Any:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[Position]) -> list[Any]:
        """What the loader calls for a batch. The training process's own generators are left alone."""
        samples = []
        with isolated():
            for epoch, index, copy in positions:
                seed_cpu(self.seed, Stream.SAMPLE, epoch, index, *([copy] if copy else []))
                samples.append(self.dataset[index])
        return samples
