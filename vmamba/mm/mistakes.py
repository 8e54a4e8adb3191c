"""Errors of MMEngine and of loader processes that are the input's, said in one line."""

import contextlib
from collections.abc import Iterator

from vmamba.errors import UserError


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Turns what is known to be a mistake in the input into a :class:`UserError`; the rest stays as it is.

    Raises:
        UserError: for an unknown type in a configuration, an image that cannot be read, and any UserError that a loader
            process met, which arrives with that process's traceback in its message.
    """
    try:
        yield
    except UserError as error:
        raise UserError(_last_line(error)) from error
    except AssertionError as error:
        message = _last_line(error)
        if "failed to load image: " not in message:
            raise
        raise UserError(f"image {message.partition('image: ')[2]} is damaged, or no image at all") from error
    except KeyError as error:
        message = str(error.args[0]) if error.args else ""
        if "is not in the" not in message or "registry" not in message:
            raise
        raise UserError(f"configuration: type {message.partition('. ')[0]}; is it spelt and imported well?") from error


def _last_line(error: Exception) -> str:
    """The message alone, without the traceback of another process and the name of the exception before it."""
    line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    name, separator, message = line.partition(": ")
    return message if separator and name.endswith(type(error).__name__) else line
