"""The error a user can act on."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input, or a fact of the machine, that its reader can mend.

    The message says in one line what was wrong, what was expected and what to do; the command line prints it without
    a traceback.
    """


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """Names like ``word``, phrased to be appended to an error message.

    Args:
        word: What was given.
        known: The names that exist.
        count: How many suggestions to make at most.

    Returns:
        ``"; did you mean a, b?"``, or an empty string when nothing is near.
    """
    matches = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(matches)}?" if matches else ""
