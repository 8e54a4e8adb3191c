"""Text files that are whole at every moment."""

import os
from pathlib import Path

from vmamba.errors import UserError


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, and the folders it lies in where they are missing.

    Raises:
        UserError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
