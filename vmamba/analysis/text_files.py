"""Text files that are whole at every moment, in folders that are made for them."""

from pathlib import Path

from vmamba import files
from vmamba.errors import UserError


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, and the folders it lies in where they are missing.

    Raises:
        UserError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    files.replace_text(path, text)
