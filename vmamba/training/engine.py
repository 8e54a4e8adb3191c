"""One epoch of training, one pass of validation."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import ModelEmaV3, accuracy, dispatch_clip_grad
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from vmamba.errors import UserError
from vmamba.training.data import TrainLoader, readable
from vmamba.training.distributed import Process
from vmamba.training.interrupts import raise_lost_interrupt
from vmamba.training.seeding import Stream, isolated, seed_cpu, seed_everything

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# Reading a loss waits for the GPU; so there, losses are looked at only every so many forward passes.
_CHECK_EVERY_ON_GPU = 25


@dataclass(frozen=True)
class Metrics:
    """Result of a validation: mean loss, and accuracies in percent."""

    loss: float
    top1: float
    top5: float
    images: int


@dataclass(frozen=True)
class EpochResult:
    """Result of a training epoch."""

    loss: float
    images_per_second: float


@dataclass(frozen=True)
class Mesa:
    """A second loss: cross-entropy with what the averaged weights make of the same images (arXiv 2205.14083).

    Args:
        weight: Its weight.
        after: The epoch after which it begins.
    """

    weight: float
    after: int


@dataclass
class Learner:
    """What an update needs, beside its images.

    Args:
        model: The model itself; its state dict is what gets saved.
        runner: What is called: the model, compiled and wrapped for DDP as the run demands.
        loss: Training loss, from float32 logits and the targets that ``mixup``, or else the data set, gives.
        optimizer: The optimiser.
        scheduler: timm's schedule of the learning rate, moved after every update.
        scaler: Loss scaling for fp16; passes everything through when disabled.
        seed: Seed of the run.
        amp: Autocast type, or None.
        clip_grad: Largest global norm of the gradient, or None.
        mixup: timm's mixup / cutmix, or None.
        ema: Average of the weights, or None.
        mesa: What is added to the loss by that average, or None.
        updates: Place in the schedule: updates made so far, had all epochs been like this one.
    """

    model: nn.Module
    runner: nn.Module
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    seed: int
    amp: torch.dtype | None = None
    clip_grad: float | None = None
    mixup: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    ema: ModelEmaV3 | None = None
    mesa: Mesa | None = None
    updates: int = 0

    @property
    def lr(self) -> float:
        """Learning rate of the next update, without the scaling of a layer group."""
        group = self.optimizer.param_groups[-1]
        return group["lr"] / group.get("lr_scale", 1.0)

    def start_epoch(self, epoch: int, updates_per_epoch: int) -> None:
        """Put the schedule where the epoch begins, whatever number of updates the epochs before it had."""
        self.updates = (epoch - 1) * updates_per_epoch
        self.scheduler.step_update(self.updates)


def train_epoch(learner: Learner, loader: TrainLoader, epoch: int, process: Process, show_bar: bool) -> EpochResult:
    """Run one epoch.

    Raises:
        UserError: The loss is not finite; says where that began.
    """
    learner.model.train()
    seed_everything(learner.seed, Stream.MODEL, epoch, process.rank)
    watch = _LossWatch(learner, epoch, process.device)
    start = time.perf_counter()
    with tqdm(total=loader.updates, desc=f"epoch {epoch}", leave=False, disable=not show_bar, unit="update") as bar:
        for update, parts in enumerate(loader.epoch(epoch)):
            for step, (images, targets) in enumerate(parts):
                _check_targets(targets, learner.model)
                images = images.to(process.device, non_blocking=True)
                targets = targets.to(process.device, non_blocking=True)
                if learner.mixup is not None:
                    images, targets = _mix(learner, images, targets, epoch, update)
                with _gradients_shared(learner.runner, now=step == len(parts) - 1):
                    loss = _loss(learner, images, targets, epoch)
                    watch.add(loss, update, images)
                    learner.scaler.scale(loss / len(parts)).backward()
            _update(learner)
            bar.update()
            bar.set_postfix(loss=f"{watch.last:.4f}", lr=f"{learner.lr:.1e}", refresh=False)
            raise_lost_interrupt()
    watch.check()
    seconds = time.perf_counter() - start
    sums = process.sum(torch.tensor([watch.total, watch.count], dtype=torch.float64, device=process.device))
    return EpochResult((sums[0] / sums[1]).item(), loader.updates * loader.plan.batch_size / seconds)


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: DataLoader, process: Process, amp: torch.dtype | None = None, show_bar: bool = False
) -> Metrics:
    """Validate; each process brings its own images, the result is of all of them."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=process.device)
    for images, targets in tqdm(
        readable(loader), "validation", len(loader), leave=False, disable=not show_bar, unit="batch"
    ):
        _check_targets(targets, model)
        images = images.to(process.device, non_blocking=True)
        targets = targets.to(process.device, non_blocking=True)
        with torch.autocast(process.device.type, amp, enabled=amp is not None):
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), targets)
        # timm gives percent of the batch; only whole numbers add up exactly in any order and number of processes.
        correct1, correct5 = ((share * len(targets) / 100).round() for share in accuracy(logits, targets, topk=(1, 5)))
        sums += torch.stack([loss * len(targets), correct1, correct5, torch.full_like(loss, len(targets))]).double()
        raise_lost_interrupt()
    loss_sum, right1, right5, count = process.sum(sums).tolist()
    if count == 0:
        raise UserError("the validation split is empty")
    return Metrics(loss_sum / count, 100 * right1 / count, 100 * right5 / count, int(count))


def _loss(learner: Learner, images: torch.Tensor, targets: torch.Tensor, epoch: int) -> torch.Tensor:
    with torch.autocast(images.device.type, learner.amp, enabled=learner.amp is not None):
        logits = learner.runner(images)
    loss = learner.loss(logits.float(), targets)
    if learner.mesa is None or epoch <= learner.mesa.after:
        return loss
    return loss + learner.mesa.weight * nn.functional.cross_entropy(logits.float(), _averaged_opinion(learner, images))


@torch.no_grad()
def _averaged_opinion(learner: Learner, images: torch.Tensor) -> torch.Tensor:
    """Probabilities of the classes by the averaged weights."""
    assert learner.ema is not None
    with torch.autocast(images.device.type, learner.amp, enabled=learner.amp is not None):
        return learner.ema.module(images).float().softmax(dim=1)


def _mix(
    learner: Learner, images: torch.Tensor, targets: torch.Tensor, epoch: int, update: int
) -> tuple[torch.Tensor, torch.Tensor]:
    assert learner.mixup is not None
    with isolated():
        # All parts of a global batch, in whatever process they are, make the same draw.
        seed_cpu(learner.seed, Stream.MIXUP, epoch, update)
        return learner.mixup(images, targets)


def _update(learner: Learner) -> None:
    if learner.clip_grad is not None:
        learner.scaler.unscale_(learner.optimizer)
        dispatch_clip_grad(learner.model.parameters(), learner.clip_grad)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    learner.updates += 1
    if learner.ema is not None:
        learner.ema.update(learner.model, step=learner.updates if learner.ema.use_warmup else None)
    learner.scheduler.step_update(learner.updates)


def _gradients_shared(runner: nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """Let DDP share gradients only in the last forward pass of an update."""
    if isinstance(runner, DistributedDataParallel) and not now:
        return runner.no_sync()
    return contextlib.nullcontext()


def _check_targets(targets: torch.Tensor, model: nn.Module) -> None:
    """A label out of range would crash a GPU without a word on why."""
    classes = getattr(model, "num_classes", None)
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or (classes is not None and high >= classes):
        raise UserError(f"the data has the label {low if low < 0 else high}, but the model has {classes} classes")


class _LossWatch:
    """Adds up losses, and stops the run at the first that is not finite.

    On the CPU that is before the loss spoils the weights, so the layer that brought it forth can be named.
    """

    def __init__(self, learner: Learner, epoch: int, device: torch.device) -> None:
        self.total = 0.0
        self.count = 0
        self.last = math.nan
        self._learner = learner
        self._epoch = epoch
        self._check_every = 1 if device.type == "cpu" else _CHECK_EVERY_ON_GPU
        self._pending: list[tuple[int, torch.Tensor]] = []

    def add(self, loss: torch.Tensor, update: int, images: torch.Tensor) -> None:
        self._pending.append((update, loss.detach()))
        if len(self._pending) >= self._check_every:
            self.check(images)

    def check(self, images: torch.Tensor | None = None) -> None:
        """Look at the losses that have come in since the last look."""
        if not self._pending:
            return
        updates = [update for update, _ in self._pending]
        losses = torch.stack([loss for _, loss in self._pending]).tolist()
        self._pending.clear()
        for update, loss in zip(updates, losses, strict=True):
            if not math.isfinite(loss):
                culprit = _first_not_finite(self._learner, images)
                raise UserError(
                    f"the loss became {loss} in epoch {self._epoch}, update {update}{culprit}; training stopped, the "
                    "checkpoints of earlier epochs are intact (try a lower --lr, --clip-grad, or --amp bf16 or none)"
                )
            self.total += loss
            self.count += 1
        self.last = losses[-1]


@torch.no_grad()
def _first_not_finite(learner: Learner, images: torch.Tensor | None) -> str:
    """Where the numbers went wrong: an input, a weight, or the output of a layer."""
    for name, parameter in learner.model.named_parameters():
        if not parameter.isfinite().all():
            return f" (weight '{name}' is not finite)"
    if images is None:
        return ""
    if not images.isfinite().all():
        return " (an image is not finite)"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, torch.Tensor) and not output.isfinite().all():
                found.append(f" (first in the output of '{name}', {type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in learner.model.named_modules() if name]
    try:
        with torch.autocast(images.device.type, learner.amp, enabled=learner.amp is not None):
            learner.model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else " (in the loss itself)"
