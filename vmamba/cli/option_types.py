"""Types of options: what a number on the command line may be."""

from argparse import ArgumentTypeError


class _OutOfRange(ArgumentTypeError, ValueError):
    """A ``ValueError`` for the types of lists, whose message argparse shows as it is."""


def positive_integer(text: str) -> int:
    """A whole number of at least 1."""
    return _whole_number(text, 1)


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _whole_number(text, 0)


def share(text: str) -> float:
    """A part of something, as a number more than 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"'{text}' is not a number more than 0 and at most 1")
    return value


def _whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise _OutOfRange(f"'{text}' is not a whole number of at least {least}")
    return value
