"""A training run, from the configuration to the files it leaves."""

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from vmamba.errors import UserError
from vmamba.files import replace_text
from vmamba.training import checkpoint, data
from vmamba.training.config import TrainConfig, dump, to_dict, with_absolute_paths
from vmamba.training.curves import CURVES_NAME, draw_curves
from vmamba.training.distributed import Process
from vmamba.training.engine import AMP_DTYPES, Learner, Mesa, evaluate, train_epoch
from vmamba.training.interrupts import heeding_interrupts
from vmamba.training.model_factory import ModelRequest, create, create_from, preprocessing
from vmamba.training.records import EpochRecord, Records
from vmamba.training.sampling import BatchPlan
from vmamba.training.seeding import Stream, seed_everything

_logger = logging.getLogger(__name__)

LAST_NAME = "last.pth"
BEST_NAME = "best.pth"
CONFIG_NAME = "config.yaml"

# What the configuration says of the groups of an optimiser. The schedule sets their rates; what else they hold may be
# state, such as the steps of Lookahead.
_DECIDED = ("weight_decay", "betas", "eps", "lr_scale", "initial_lr")


@dataclass
class Best:
    """The best epoch so far."""

    epoch: int = 0
    top1: float = -1.0
    weights: str = "raw"


class Trainer:
    """Holds everything of a run. Make it, then call :meth:`fit`.

    Args:
        config: The configuration.
        process: This process.
        resume: Content of ``last.pth`` to go on from, or None to start.
        show_bar: Whether to show a progress bar.

    Raises:
        UserError: Model, data, configuration and checkpoint do not fit together.
    """

    def __init__(
        self,
        config: TrainConfig,
        process: Process,
        resume: dict[str, Any] | None = None,
        show_bar: bool = False,
    ) -> None:
        self.config = config = with_absolute_paths(config)  # what is saved of it may be used from any folder
        self.process = process
        self.show_bar = show_bar and process.is_first
        self.first_epoch = 1
        self.best = Best()

        plan = BatchPlan(config.batch_size, config.accumulate, process.world, process.rank)
        self.source = data.DataSource.of(config)
        train_set, val_set = data.open_training(self.source, config, plan)
        self.image_counts = len(train_set), len(val_set)
        self.class_names = data.class_names(train_set)
        num_classes = _resolve_num_classes(config, self.class_names)

        seed_everything(config.seed, Stream.WEIGHTS)
        model = _build_model(config, num_classes, fresh=resume is None)
        self.preprocessing = preprocessing(
            model,
            img_size=config.img_size,
            mean=config.mean,
            std=config.std,
            interpolation=config.interpolation,
            crop_pct=config.crop_pct,
        )
        self.model_args = ModelRequest(config.model, num_classes, config.img_size, config.model_kwargs).arguments()

        pin_memory = process.device.type == "cuda"
        self.train_loader = data.TrainLoader(
            train_set,
            data.train_transform(config, self.preprocessing),
            plan,
            config.seed,
            config.workers,
            pin_memory,
            config.repeated_aug,
        )
        self.val_loader: DataLoader = data.eval_loader(
            val_set,
            data.eval_transform(self.preprocessing),
            plan.part_size,
            config.workers,
            process.rank,
            process.world,
            pin_memory,
        )
        self.learner = _build_learner(config, model.to(process.device), process, self.train_loader.updates, num_classes)
        if resume is not None:
            self._restore(resume)

    def fit(self, folder: Path, stop_after: int | None = None) -> Best:
        """Train to the last epoch, saving after each.

        Args:
            folder: Folder of the run; exists.
            stop_after: End after this many epochs of this call, to be resumed later.

        Returns:
            The best epoch.
        """
        last_epoch = self.config.epochs
        if stop_after is not None:
            last_epoch = min(last_epoch, self.first_epoch + stop_after - 1)
        records = None
        if self.process.is_first:
            self._describe()
            records = Records(folder, self.first_epoch, self.config.tensorboard)
            replace_text(folder / CONFIG_NAME, dump(self.config))
        try:
            with heeding_interrupts():
                for epoch in range(self.first_epoch, last_epoch + 1):
                    self._run_and_save(epoch, folder, records)
        except KeyboardInterrupt:
            self._close(records, folder)
            raise
        self._close(records, folder)
        return self.best

    def _run_and_save(self, epoch: int, folder: Path, records: Records | None) -> None:
        record = self._run_epoch(epoch)
        # The summary first: after a kill in between, the epoch is run again and so is its line.
        if records is not None:
            records.add(record)
        self._save(record, folder)
        if records is not None:
            _logger.info(self._line(record))

    def _close(self, records: Records | None, folder: Path) -> None:
        if records is None:
            return
        records.close()
        if records.epochs:
            draw_curves(records.epochs, f"{self.config.model} on {self.config.data}", folder / CURVES_NAME)

    def _run_epoch(self, epoch: int) -> EpochRecord:
        start = time.perf_counter()
        learner, process, amp = self.learner, self.process, self.learner.amp
        learner.start_epoch(epoch, self.train_loader.updates)
        lr = learner.lr
        result = train_epoch(learner, self.train_loader, epoch, process, self.show_bar)
        raw = evaluate(learner.model, self.val_loader, process, amp, self.show_bar)
        ema = None
        if learner.ema is not None:
            ema = evaluate(learner.ema.module, self.val_loader, process, amp, self.show_bar)
        return EpochRecord(
            epoch=epoch,
            lr=lr,
            train_loss=result.loss,
            eval_loss=raw.loss,
            eval_top1=raw.top1,
            eval_top5=raw.top5,
            ema_loss=ema.loss if ema else None,
            ema_top1=ema.top1 if ema else None,
            ema_top5=ema.top5 if ema else None,
            images_per_second=round(result.images_per_second, 1),
            seconds=round(time.perf_counter() - start, 2),
        )

    def _save(self, record: EpochRecord, folder: Path) -> None:
        """Write the checkpoints, best first: after a kill in between, the epoch is run again and finds both."""
        is_best = record.best_top1 > self.best.top1
        if is_best:
            self.best = Best(record.epoch, record.best_top1, "ema" if record.best_is_ema else "raw")
        if self.process.is_first:
            if is_best:
                checkpoint.save(self._best_content(record), folder / BEST_NAME)
            checkpoint.save(self._last_content(record.epoch), folder / LAST_NAME)
        # No process goes on before the epoch is on disk, so none is ahead of the checkpoint it may be resumed from.
        self.process.wait()

    def _usage(self) -> dict[str, Any]:
        """What is needed to use the weights, beside the weights."""
        return {
            "arch": self.config.model,
            "model_args": self.model_args,
            "preprocessing": self.preprocessing,
            "class_names": self.class_names,
            "dataset": {**asdict(self.source), "split": self.config.val_split},
        }

    def _best_content(self, record: EpochRecord) -> dict[str, Any]:
        model = self.learner.model
        if self.best.weights == "ema" and self.learner.ema is not None:
            model = self.learner.ema.module
        return {
            checkpoint.FORMAT_KEY: checkpoint.WEIGHTS_FORMAT,
            **self._usage(),
            "epoch": record.epoch,
            "weights": self.best.weights,
            "top1": self.best.top1,
            "state_dict": model.state_dict(),
        }

    def _last_content(self, epoch: int) -> dict[str, Any]:
        learner = self.learner
        content = {
            checkpoint.FORMAT_KEY: checkpoint.TRAINING_FORMAT,
            **self._usage(),
            "epoch": epoch,
            "config": to_dict(self.config),
            "best": asdict(self.best),
            "state_dict": learner.model.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "scaler": learner.scaler.state_dict(),
        }
        if learner.ema is not None:
            content["state_dict_ema"] = learner.ema.module.state_dict()
        return content

    def _restore(self, content: dict[str, Any]) -> None:
        origin = LAST_NAME
        learner = self.learner
        checkpoint.load_weights(learner.model, content["state_dict"], origin)
        if learner.ema is not None:
            # A run that turns EMA on half-way starts the average from the weights it has.
            checkpoint.load_weights(learner.ema.module, content.get("state_dict_ema", content["state_dict"]), origin)
        _restore_optimizer(learner.optimizer, content, origin)
        if content["scaler"]:  # empty when the run was not in fp16 so far
            learner.scaler.load_state_dict(content["scaler"])
        self.best = Best(**content["best"])
        self.first_epoch = content["epoch"] + 1
        if self.first_epoch > self.config.epochs:
            raise UserError(f"{origin}: all {self.config.epochs} epochs are done; --epochs N prolongs the run")

    def _describe(self) -> None:
        config, process = self.config, self.process
        classes = len(self.class_names) if self.class_names else config.num_classes
        parameters = sum(parameter.numel() for parameter in self.learner.model.parameters())
        size = "x".join(str(side) for side in self.preprocessing["input_size"][1:])
        _logger.info(f"model  {config.model}, {parameters / 1e6:.2f} M parameters, input {size}")
        _logger.info(
            f"data   {config.data}: {self.image_counts[0]} training and "
            f"{self.image_counts[1]} validation images, {classes} classes"
        )
        threads = torch.get_num_threads()
        device = (
            f"{threads} CPU thread{'s' * (threads > 1)}" if process.device.type == "cpu" else _gpu_name(process.device)
        )
        processes = f"{process.world} processes, each with " if process.world > 1 else ""
        _logger.info(f"on     {processes}{device}, amp {config.amp}")
        if self.first_epoch > 1:
            _logger.info(f"resume after epoch {self.first_epoch - 1}, best top-1 so far {self.best.top1:.2f} %")

    def _line(self, record: EpochRecord) -> str:
        ema = f" (EMA {record.ema_top1:.2f})" if record.ema_top1 is not None else ""
        width = len(str(self.config.epochs))
        mark = " *" if self.best.epoch == record.epoch else ""
        return (
            f"epoch {record.epoch:{width}}/{self.config.epochs}  loss {record.train_loss:.4f}  "
            f"top-1 {record.eval_top1:.2f}{ema}  lr {record.lr:.1e}  {record.images_per_second:.0f} img/s  "
            f"{record.seconds:.1f} s{mark}"
        )


def _resolve_num_classes(config: TrainConfig, class_names: list[str] | None) -> int:
    if class_names is None:
        if config.num_classes is None:
            raise UserError(f"'{config.data}' does not tell its number of classes; give --num-classes")
        return config.num_classes
    if config.num_classes not in (None, len(class_names)):
        raise UserError(f"num_classes is {config.num_classes}, but '{config.data}' has {len(class_names)} classes")
    return len(class_names)


def _build_model(config: TrainConfig, num_classes: int, fresh: bool) -> nn.Module:
    """Build the model; with the weights to start from only if the run is fresh, a resumed one has its own."""
    kwargs = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate, **config.model_kwargs}
    if fresh and config.initial_checkpoint is not None:
        request = ModelRequest(config.model, None, config.img_size, kwargs)
        model: Any = create_from(request, Path(config.initial_checkpoint))
        if model.num_classes != num_classes:
            model.reset_classifier(num_classes)
    else:
        request = ModelRequest(config.model, num_classes, config.img_size, kwargs)
        model = create(request, pretrained=config.pretrained and fresh)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise UserError(f"'{config.model}' does not support --grad-checkpointing") from error
    return model


def _build_learner(
    config: TrainConfig, model: nn.Module, process: Process, updates_per_epoch: int, num_classes: int
) -> Learner:
    mixup, loss = _build_mixup_and_loss(config, num_classes)
    if mixup is not None and config.batch_size // (process.world * config.accumulate) % 2:
        raise UserError("mixup and cutmix need an even number of images in each forward pass; change batch_size")
    optimizer, scheduler = _build_optimizer(config, model, updates_per_epoch)
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=config.ema_warmup) if config.ema else None
    runner: Any = torch.compile(model) if config.compile else model
    if process.world > 1:
        runner = DistributedDataParallel(runner, device_ids=[process.device] if process.device.type == "cuda" else None)
    return Learner(
        model=model,
        runner=runner,
        loss=loss,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(process.device.type, enabled=config.amp == "fp16"),
        seed=config.seed,
        amp=AMP_DTYPES[config.amp],
        clip_grad=config.clip_grad,
        mixup=mixup,
        ema=ema,
        mesa=Mesa(config.mesa, int(config.mesa_start * config.epochs)) if config.mesa else None,
    )


def _build_mixup_and_loss(config: TrainConfig, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    if config.mixup > 0 or config.cutmix > 0:
        mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            mode=config.mixup_mode,
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )
        return mixup, SoftTargetCrossEntropy()
    if config.smoothing > 0:
        return None, LabelSmoothingCrossEntropy(config.smoothing)
    return None, nn.CrossEntropyLoss()


def _build_optimizer(
    config: TrainConfig, model: nn.Module, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any]:
    factor = config.batch_size / config.lr_batch_size if config.lr_batch_size else 1.0
    extras: dict[str, Any] = {"betas": config.opt_betas, "eps": config.opt_eps, "layer_decay": config.layer_decay}
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr * factor,
            weight_decay=config.weight_decay,
            **{key: value for key, value in extras.items() if value is not None},
        )
    except IndexError as error:
        raise UserError(
            f"opt '{config.opt}' has more betas than opt_betas: {', '.join(map(str, extras['betas']))}"
        ) from error
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"opt '{config.opt}': {' '.join(str(error).split())}") from error
    if config.sched in ("none", "plateau"):
        raise UserError(f"sched '{config.sched}' cannot move after every update; use cosine, constant, poly, step, ...")
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs - config.warmup_epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_prefix=True,
            warmup_lr=config.warmup_lr * factor,
            min_lr=config.min_lr * factor,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"sched '{config.sched}': {error}") from error
    return optimizer, scheduler


def _restore_optimizer(optimizer: torch.optim.Optimizer, content: dict[str, Any], origin: str) -> None:
    """Load the state of the optimiser; what the configuration decides stays as it is now, not as it was."""
    decided = [{key: group[key] for key in _DECIDED if key in group} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(content["optimizer"])
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{origin}: the state of the optimiser does not fit: {error}; weight_decay and layer_decay group the "
            "weights, and cannot be switched on or off half-way"
        ) from error
    for group, values in zip(optimizer.param_groups, decided, strict=True):
        group.update(values)


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
