"""Files that a command writes: whether they may be is known before the work starts."""

import itertools
import tempfile
from collections.abc import Iterable
from pathlib import Path

from vmamba.errors import UserError


def default_output(name: str, overwrite: bool) -> Path:
    """The file to write where none was named; with a number if its name is taken and not to be written over."""
    path = Path(name)
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], numbered) if overwrite or not free.exists())


def check_outputs(paths: Iterable[Path], overwrite: bool) -> None:
    """Raises UserError for a file that is there already, unless it is to be replaced, or that cannot be written.

    Folders that are missing are none of its business; the one in which they would be made is.
    """
    for path in paths:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: there is something of that name that is no file")
        if path.exists() and not overwrite:
            raise UserError(f"{path} is there already; --overwrite replaces it, or give another name")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        try:
            # What permissions say is not what a file system does.
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error


def check_folders(paths: Iterable[Path]) -> None:
    """Raises UserError for a file whose folder is missing; for commands that make none."""
    for path in paths:
        if not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}")


def check_picture(path: Path) -> None:
    """Raises UserError unless the ending of a name is that of a picture."""
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"cannot write '{path}': no picture ends in '{path.suffix}'; use .png or .svg")
