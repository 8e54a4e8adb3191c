import itertools
import random

import numpy as np
import pytest
import torch
from timm.data import Mixup

from vmamba.errors import UserError
from vmamba.training.sampling import BatchPlan, EpochBatchSampler, SeededDataset
from vmamba.training.seeding import Stream, isolated, seed_cpu


def updates(length, world, accumulate, batch_size=12, epoch=3, copies=1):
    """For each update, the samples in all its parts."""
    parts = []
    for rank in range(world):
        sampler = EpochBatchSampler(length, BatchPlan(batch_size, accumulate, world, rank), 5, copies)
        sampler.epoch = epoch
        own = list(sampler)
        assert len(own) == len(sampler)
        parts.append([own[i : i + accumulate] for i in range(0, len(own), accumulate)])
    return [
        list(itertools.chain(*(itertools.chain(*steps) for steps in update))) for update in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (3, 2), (2, 6), (12, 1)])
def test_an_update_has_the_same_samples_however_it_is_spread(world, accumulate):
    alone = updates(50, 1, 1)
    spread = updates(50, world, accumulate)
    assert [sorted(batch) for batch in spread] == [sorted(batch) for batch in alone]


def test_copies_of_a_sample_are_in_one_update_and_others_in_the_next_epoch():
    batches = updates(50, 1, 1, copies=3)
    assert len(batches) == 50 // 12
    for batch in batches:
        indices = [index for _, index, _ in batch]
        assert sorted(set(indices)) == sorted(indices)[::3]
        assert sorted(copy for _, _, copy in batch) == sorted([0, 1, 2] * 4)
    spread = updates(50, 3, 2, copies=3)
    assert [sorted(batch) for batch in spread] == [sorted(batch) for batch in batches]
    seen = {index for batch in batches for _, index, _ in batch}
    assert seen != {index for batch in updates(50, 1, 1, epoch=4, copies=3) for _, index, _ in batch}


def test_epochs_are_shuffled_differently_and_repeatably():
    assert updates(50, 1, 1, epoch=1) == updates(50, 1, 1, epoch=1)
    first, second = ([index for _, index, _ in batch] for batch in (updates(50, 1, 1, epoch=e)[0] for e in (1, 2)))
    assert first != second


def test_mixup_pairs_survive_the_spreading():
    """Mixing the parts by themselves, with the same draw, is mixing the whole batch."""
    images, targets = torch.randn(12, 3, 8, 8), torch.arange(12) % 5
    whole = mixed(images.clone(), targets)
    for rank in range(3):
        part = BatchPlan(12, world=3, rank=rank).part(list(range(12)), 0)
        images_part, targets_part = mixed(images[part].clone(), targets[part])
        torch.testing.assert_close(images_part, whole[0][part])
        torch.testing.assert_close(targets_part, whole[1][part])


def mixed(images, targets):
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5)
    with isolated():
        seed_cpu(0, Stream.MIXUP, 1, 1)
        return mixup(images, targets)


def test_batch_that_cannot_be_divided():
    with pytest.raises(UserError, match="use a multiple of 6"):
        BatchPlan(16, accumulate=3, world=2)


class Noise:
    """A sample that is nothing but random numbers, from each generator in use."""

    def __getitem__(self, index):
        return random.random(), np.random.rand(), torch.rand(()).item()

    def __len__(self):
        return 9


def test_a_sample_depends_on_its_position_alone():
    dataset = SeededDataset(Noise(), seed=1)
    positions = [(1, 0, 0), (1, 1, 0), (2, 0, 0), (1, 0, 1), (1, 0, 2)]
    together = dataset.__getitems__(positions)
    assert together == [dataset[position] for position in positions]
    assert len(set(together)) == len(positions)


def test_loading_leaves_the_generators_of_training_alone():
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    expected = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    SeededDataset(Noise(), seed=1)[(1, 0, 0)]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == expected
