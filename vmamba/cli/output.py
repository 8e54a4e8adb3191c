"""Where the messages of a command go."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from vmamba.errors import UserError


@contextlib.contextmanager
def on_terminal(is_first: bool = True) -> Iterator[None]:
    """Send the package's messages to the terminal.

    Args:
        is_first: False in the further processes of a group, which only give warnings.
    """
    warnings = logging.StreamHandler(sys.stderr)
    warnings.setFormatter(logging.Formatter("warning: %(message)s"))
    warnings.setLevel(logging.WARNING)
    handlers = [warnings]
    if is_first:
        information = logging.StreamHandler(sys.stdout)
        information.addFilter(lambda record: record.levelno < logging.WARNING)
        handlers.append(information)
    package = logging.getLogger("vmamba")
    level = package.level
    package.setLevel(logging.INFO)
    try:
        with _attached(*handlers):
            yield
    finally:
        package.setLevel(level)


@contextlib.contextmanager
def in_file(path: Path) -> Iterator[None]:
    """Also append all messages, with the time, to a file.

    Raises:
        UserError: It cannot be written.
    """
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    with _attached(handler):
        yield


@contextlib.contextmanager
def _attached(*handlers: logging.Handler) -> Iterator[None]:
    # timm warns as well, of images that cannot be read for example; other libraries look after their own messages.
    loggers = [logging.getLogger(name) for name in ("vmamba", "timm")]
    for logger in loggers:
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            for logger in loggers:
                logger.removeHandler(handler)
            handler.close()
