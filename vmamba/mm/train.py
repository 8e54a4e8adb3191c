"""`vmamba train-dense`: training of detectors and segmentors."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from mmengine.runner import Runner, find_latest_checkpoint

from vmamba.errors import UserError
from vmamba.mm.data_checks import check_data
from vmamba.mm.demonstration import prepare_classifier, prepare_scenes
from vmamba.mm.mistakes import in_one_line
from vmamba.mm.processes import joined
from vmamba.mm.settings import add_config_arguments, load_settings
from vmamba.mm.trained import check_resumable

_LATEST = "latest"


def add_arguments(parser: ArgumentParser) -> None:
    """The configuration, where to write, and how to start."""
    add_config_arguments(parser)
    parser.add_argument("--work-dir", metavar="FOLDER", help="where logs and checkpoints go (default: runs/CONFIG)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=_LATEST,
        metavar="FILE",
        help="go on from a checkpoint; without FILE, from the latest in the work folder, or anew if there is none",
    )
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision")


def run(args: Namespace) -> None:
    """Train, and validate as the configuration says."""
    settings = load_settings(args.config, args.cfg_options)
    if args.work_dir:
        settings.work_dir = args.work_dir
    if args.amp:
        settings.optim_wrapper.type = "AmpOptimWrapper"
        settings.optim_wrapper.setdefault("loss_scale", "dynamic")
    checkpoint = _checkpoint_to_resume(args.resume, settings.work_dir)
    if checkpoint is not None:
        check_resumable(checkpoint)
        settings.load_from, settings.resume = checkpoint, True
    elif args.resume is None:
        _keep_earlier_run(settings.work_dir)
    prepare_scenes(settings)
    check_data(settings, "train_dataloader", "val_dataloader")
    if checkpoint is None:
        prepare_classifier(settings)
    with in_one_line(), joined(settings):
        Runner.from_cfg(settings).train()


def _checkpoint_to_resume(asked: str | None, work_dir: str) -> str | None:
    if asked != _LATEST:
        return asked
    return find_latest_checkpoint(work_dir) if Path(work_dir, "last_checkpoint").exists() else None


def _keep_earlier_run(work_dir: str) -> None:
    """Refuse to write over the checkpoints of another run."""
    if Path(work_dir, "last_checkpoint").exists():
        raise UserError(
            f"{work_dir} holds the checkpoints of an earlier run; go on from them with --resume, or name another "
            "folder with --work-dir"
        )
