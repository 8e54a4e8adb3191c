"""MMEngine's configurations as the commands of this package read them."""

import os
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction

from vmamba.errors import UserError, nearest

KINDS = ("detection", "segmentation")


def add_config_arguments(parser: ArgumentParser) -> None:
    """The options that say what is trained, tested or used."""
    parser.add_argument("config", metavar="CONFIG", help="configuration: a file, or the name of one in configs/")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="change entries of the configuration, such as train_dataloader.batch_size=4",
    )


def load_settings(name: str, options: dict[str, Any] | None = None) -> Config:
    """Read a configuration.

    Args:
        name: A file, or the name of one in ``configs/detection`` or ``configs/segmentation``.
        options: Entries to change, by dotted key.

    Raises:
        UserError: There is no such file, or it cannot be read.
    """
    path = _find(name)
    try:
        settings = Config.fromfile(path)
        settings.merge_from_dict(options or {})
    except UserError:
        raise
    except Exception as error:  # a configuration is a program, and can fail in any way
        reason = " ".join(str(error).split()) or "no reason given"
        raise UserError(f"cannot read {path}: {type(error).__name__}: {reason}") from error
    if "model" not in settings or "default_scope" not in settings:
        raise UserError(
            f"{path} is no configuration of MMDetection or MMSegmentation: it has no model or default_scope"
        )
    settings.setdefault("work_dir", os.path.join("runs", path.stem))
    if not torch.cuda.is_available():
        settings.merge_from_dict({"env_cfg.dist_cfg.backend": "gloo"})
    return settings


def _find(name: str) -> Path:
    """The file of a configuration."""
    if Path(name).suffix == ".py" or os.sep in name:
        if not Path(name).is_file():
            raise UserError(f"configuration {name} not found")
        return Path(name)
    package = Path(__file__).parents[1]
    # In a checkout, and in an editable install, the configurations stand at the top of the tree.
    top = package / "configs" if (package / "configs" / "detection").is_dir() else package.parent / "configs"
    known = {path.stem: path for kind in KINDS for path in sorted((top / kind).glob("*.py"))}
    if name not in known:
        raise UserError(
            f"no configuration '{name}': expected a file, or a name from {top}/{{{','.join(KINDS)}}}"
            f"{nearest(name, known)}"
        )
    return known[name]
