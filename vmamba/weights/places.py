"""Where weights lie on this machine."""

import os
from collections.abc import Iterable
from pathlib import Path

from vmamba.errors import UserError
from vmamba.weights.manifest import Checkpoint

FOLDER_VARIABLE = "VMAMBA_CHECKPOINTS"
MIRROR_VARIABLE = "VMAMBA_WEIGHTS_MIRROR"

CONVERTED_SUFFIX = ".safetensors"

_SOURCES = Path(__file__).resolve().parents[2]  # of a checkout; of an installed package it is nothing of ours


def cache() -> Path:
    """Where downloads go unless a folder is named: beside those of timm and torchvision."""
    # Not at the top: most commands about weights do without torch.
    import torch.hub

    return Path(torch.hub.get_dir()) / "checkpoints" / "vmamba"


def named_folder() -> Path | None:
    """The folder that the user names in the environment."""
    name = os.environ.get(FOLDER_VARIABLE)
    return Path(name).expanduser() if name else None


def destination() -> Path:
    """Where new files go."""
    return named_folder() or cache()


def folders() -> list[Path]:
    """Where files are looked for, in this order: the named folder, or `checkpoints` of a checkout; then the cache."""
    named = named_folder()
    checkouts = [Path.cwd(), _SOURCES]
    first = [named] if named else [root / "checkpoints" for root in checkouts if (root / "pyproject.toml").is_file()]
    return list(dict.fromkeys([*first, cache()]))


def local(checkpoint: Checkpoint, extra: Path | None = None) -> Path | None:
    """The file of a checkpoint on this machine, a converted one before the published one; None if there is none.

    Args:
        checkpoint: What is looked for.
        extra: A folder to look into first.
    """
    return next(iter(all_local(checkpoint, extra)), None)


def all_local(checkpoint: Checkpoint, extra: Path | None = None) -> list[Path]:
    """All files of a checkpoint on this machine, in the order in which :func:`local` prefers them."""
    candidates = [*_candidates(checkpoint, [extra, *folders()] if extra else folders()), _in_hub_cache(checkpoint)]
    return [path for path in candidates if path and path.is_file()]


def found_before(checkpoint: Checkpoint, path: Path) -> list[Path]:
    """The files that would hide one at ``path`` from those who look for the checkpoint."""
    searched = [folder.resolve() for folder in folders()]
    folder = path.parent.resolve()
    candidates = _candidates(checkpoint, searched if folder in searched else [folder])
    return [other for other in candidates[: candidates.index(folder / path.name)] if other.is_file()]


def _candidates(checkpoint: Checkpoint, searched: Iterable[Path]) -> list[Path]:
    names = (checkpoint.name + CONVERTED_SUFFIX, checkpoint.file_name)
    return [folder / name for folder in searched for name in names]


def _in_hub_cache(checkpoint: Checkpoint) -> Path | None:
    if checkpoint.hub is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    assert checkpoint.file
    path = try_to_load_from_cache(checkpoint.hub, checkpoint.file)
    return Path(path) if isinstance(path, str) else None


def mirror() -> str | None:
    """Address of a folder like `checkpoints`, which is asked before the place where a file was published.

    Raises:
        UserError: if what the environment says is no web address.
    """
    address = os.environ.get(MIRROR_VARIABLE, "").rstrip("/")
    if address and not address.startswith(("http://", "https://")):
        raise UserError(
            f"{MIRROR_VARIABLE}={address} is no http:// or https:// address; a folder is named in {FOLDER_VARIABLE}"
        )
    return address or None
