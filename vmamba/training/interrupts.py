"""Interrupts (Ctrl-C) that end a run wherever they arrive.

Python raises KeyboardInterrupt in whatever the main thread is doing at that moment. Where that is a destructor, or a
callback of a library that lets no exception through, it is printed at most, and forgotten: the run would go on to its
end. So here it is kept in mind, and raised again at the next place where it cannot get lost.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_interrupted = False
"""Whether an interrupt has arrived within :func:`heeding_interrupts`."""


@contextlib.contextmanager
def heeding_interrupts() -> Iterator[None]:
    """Within it no interrupt gets lost: it is raised as ever, and again by :func:`raise_lost_interrupt` and at the end.

    One may be within another. Where interrupts are not Python's to raise, it does nothing: in threads beside the
    main one, and in programs that ignore interrupts or handle them in a way of their own.
    """
    global _interrupted
    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, _note_and_raise)
    try:
        yield
        raise_lost_interrupt()
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _interrupted = False


def raise_lost_interrupt() -> None:
    """Raise the interrupt that has arrived, if any: whoever still comes here did not see it."""
    if _interrupted:
        raise KeyboardInterrupt


def _note_and_raise(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _interrupted = True
    signal.default_int_handler(number, frame)
