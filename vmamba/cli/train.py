"""`vmamba train`."""

import contextlib
import dataclasses
import errno
import logging
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmamba.cli.option_types import positive_integer
from vmamba.errors import UserError
from vmamba.training.config import DIGITS, TrainConfig, bundled, default_recipe, flag, load, parse
from vmamba.training.interrupts import heeding_interrupts

if TYPE_CHECKING:
    from vmamba.training.distributed import Process

_logger = logging.getLogger(__name__)

LOG_NAME = "train.log"

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the run, and one for each field of the configuration."""
    parser.usage = "vmamba train [--config RECIPE | --resume RUN] [--data DATA] [--model NAME] [OPTIONS]"
    parser.epilog = "bundled recipes: " + ", ".join(name for name in bundled() if not name.startswith("_"))
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help="a bundled recipe or a YAML file; default: the digits recipe for the digits, else that of the model",
    )
    parser.add_argument(
        "--resume", metavar="RUN", help="folder of a run to go on with; other options change its config"
    )
    parser.add_argument("--output", default="runs", metavar="DIR", help="folder for runs (default: runs)")
    parser.add_argument("--name", help="name of the run's folder (default: MODEL-DATA, with a number if taken)")
    parser.add_argument(
        "--stop-after", type=positive_integer, metavar="N", help="stop after N epochs, to be resumed later"
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        _add_field(groups[name], field)


@heeding_interrupts()
def run(args: Namespace) -> None:
    """Train, and say what there is now."""
    overrides = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(TrainConfig)
        if getattr(args, field.name) is not None
    }
    if args.resume is None:
        recipe = args.config or default_recipe(overrides.get("model"), overrides.get("data"))
        _train(args, load(recipe, overrides), None, None)
        return
    if args.config or args.name:
        raise UserError("--resume goes on with the config and folder of the run; leave --config and --name out")
    folder, content = _read_run(Path(args.resume))
    config = parse(content["config"], f"config of {folder}", overrides)
    if config.model != content["arch"]:
        raise UserError(f"{folder} is a run of '{content['arch']}' and cannot be resumed as '{config.model}'")
    if config.opt != content["config"]["opt"]:
        raise UserError(
            f"{folder} is a run with the optimiser '{content['config']['opt']}', whose state is of no use to "
            f"'{config.opt}'; leave --opt out, or start a new run with --initial-checkpoint"
        )
    _train(args, config, folder, content)


def _train(args: Namespace, config: TrainConfig, folder: Path | None, content: dict[str, Any] | None) -> None:
    # Not at the top: `vmamba train --help` must not wait for torch.
    import torch

    from vmamba.cli.output import on_terminal
    from vmamba.training.distributed import join

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with join(config.device) as process, on_terminal(process.is_first):
        _train_in(process, args, config, folder, content)


def _train_in(
    process: "Process", args: Namespace, config: TrainConfig, folder: Path | None, content: dict[str, Any] | None
) -> None:
    """A function of its own, so that nothing of the training is left when the process leaves its group."""
    import torch

    from vmamba.cli.output import in_file
    from vmamba.files import remove_leftovers
    from vmamba.training.trainer import LAST_NAME, Trainer

    trainer = Trainer(config, process, content, show_bar=sys.stderr.isatty())
    # Only now, so that a mistake in the options leaves no empty folder behind.
    if folder is None:
        folder = Path(process.from_first(str(_new_folder(args, config)) if process.is_first else None))
    with contextlib.ExitStack() as log:
        if process.is_first:
            log.enter_context(in_file(folder / LOG_NAME))
            for leftover in remove_leftovers(folder):
                _logger.warning(f"removed {leftover.name}, left by a save that was cut off")
        try:
            best = trainer.fit(folder, args.stop_after)
        except torch.OutOfMemoryError as error:
            raise UserError(
                "out of GPU memory; try --grad-checkpointing, a larger --accumulate or a smaller --batch-size"
            ) from error
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise UserError(f"cannot write to {folder}: {error.strerror}; go on with --resume {folder}") from error
        except KeyboardInterrupt:
            if process.is_first and (folder / LAST_NAME).exists():
                _logger.info(f"stopped; go on after the last whole epoch with: vmamba train --resume {folder}")
            raise
        if process.is_first:
            _report(folder, config, best)


def _add_field(group: Any, field: dataclasses.Field) -> None:
    # "%" would start a format of argparse.
    help_text = field.metadata["help"].replace("%", "%%")
    if field.type is bool or field.type == "bool":
        group.add_argument(flag(field.name), action=BooleanOptionalAction, default=None, help=help_text)
    else:
        group.add_argument(flag(field.name), metavar="VALUE", help=help_text)


def _read_run(path: Path) -> tuple[Path, dict[str, Any]]:
    """Folder of a run and the content of its last checkpoint."""
    from vmamba.training import checkpoint
    from vmamba.training.trainer import LAST_NAME

    file = path / LAST_NAME if path.is_dir() else path
    content = checkpoint.read(file)
    if not checkpoint.is_own(content, file) or content[checkpoint.FORMAT_KEY] != checkpoint.TRAINING_FORMAT:
        raise UserError(f"{file} holds weights only; a run is resumed from its {LAST_NAME}")
    return file.parent, content


def _new_folder(args: Namespace, config: TrainConfig) -> Path:
    parent = Path(args.output)
    stem = args.name or f"{config.model}-{Path(config.data).name or 'data'}"
    folder, number = parent / stem, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if args.name:
                raise UserError(
                    f"run {folder} exists already; give another --name, or go on with it: --resume {folder}"
                ) from None
            number += 1
            folder = parent / f"{stem}-{number}"
        except OSError as error:
            raise UserError(f"cannot create {folder}: {error.strerror}") from error


def _report(folder: Path, config: TrainConfig, best: Any) -> None:
    from vmamba.training.trainer import BEST_NAME

    weights = " with the averaged weights" if best.weights == "ema" else ""
    _logger.info(f"best top-1 {best.top1:.2f} % in epoch {best.epoch}{weights}")
    _logger.info(f"saved  {folder}: {', '.join(sorted(entry.name for entry in folder.iterdir()))}")
    images = DIGITS if config.data == DIGITS else "IMAGE_OR_FOLDER"
    _logger.info(f"next   vmamba predict {images} --checkpoint {folder / BEST_NAME}")
