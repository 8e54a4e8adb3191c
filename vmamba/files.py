"""Files that are whole at every moment."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vmamba.errors import UserError

_TEMPORARY = ".tmp-"


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives a name beside ``path`` to write to; what was written takes the name ``path`` once it is safe on disk.

    After a full disk, or a kill at any point, the previous file is still there. The block should do nothing but write:
    its errors are taken for those of the disk.

    Args:
        path: The file; in a folder that exists.

    Raises:
        UserError: It could not be written.
    """
    target = path.resolve()  # a link stays a link
    temporary = target.with_name(f".{target.name}{_TEMPORARY}{os.getpid()}{target.suffix}")
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except (OSError, RuntimeError) as error:
        # torch wraps the system's error into a RuntimeError of its own that does not say what happened.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else " ".join(str(cause).split())
        kept = "; the previous one is intact" if path.exists() else ""
        raise UserError(f"cannot write {path}: {reason}{kept}") from error
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; see :func:`replaced`."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_text(path: Path, text: str) -> None:
    """As :func:`replace_text`; makes the folders it lies in where they are missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    replace_text(path, text)


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete the temporary files of writes that were killed; returns what was deleted."""
    leftovers = sorted(folder.glob(f".*{_TEMPORARY}*"))
    for leftover in leftovers:
        leftover.unlink()
    return leftovers


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut."""
    if os.name == "posix":
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
