"""Randomness that depends on where training stands, so that a resumed training computes what one in a go would have."""

from typing import Any

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from vmamba.training.seeding import Stream, seed_everything


@HOOKS.register_module()
class SeedByIteration(Hook):
    """Seeds each iteration, and the loading of its data in this process, from the run's seed, its number and the rank.

    Loader workers are seeded by MMEngine whenever they start. So training in epochs resumes exactly with workers that
    end with the epoch (``persistent_workers=False``), and any training does without workers.
    """

    def before_train_epoch(self, runner: Any) -> None:
        self._seed(runner, Stream.SAMPLE, runner.iter)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._seed(runner, Stream.MODEL, runner.iter)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._seed(runner, Stream.SAMPLE, runner.iter + 1)

    def _seed(self, runner: Any, stream: Stream, iteration: int) -> None:
        seed_everything(runner.seed, stream, iteration, get_rank())
