"""Interrupts that do not get lost: real ones, sent to this process."""

import contextlib
import signal
import threading

import pytest

from vmamba.training.interrupts import heeding_interrupts, raise_lost_interrupt


@pytest.fixture(autouse=True)
def pythons_handler():
    """Python's own, which is not there in a process that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt():
    signal.raise_signal(signal.SIGINT)


def lose_an_interrupt():
    with contextlib.suppress(KeyboardInterrupt):
        interrupt()


@heeding_interrupts()
def run(*steps):
    for step in steps:
        step()


def test_an_interrupt_is_raised_where_it_arrives():
    later = []
    with pytest.raises(KeyboardInterrupt):
        run(interrupt, lambda: later.append("step"))
    assert not later


def test_a_lost_one_is_raised_where_that_is_asked_for():
    before, later = [], []
    with pytest.raises(KeyboardInterrupt):
        run(
            raise_lost_interrupt,
            lambda: before.append("step"),
            lose_an_interrupt,
            raise_lost_interrupt,
            lambda: later.append("step"),
        )
    assert before and not later


def test_a_lost_one_is_raised_at_the_end():
    with pytest.raises(KeyboardInterrupt):
        run(lose_an_interrupt)


def test_each_of_two_raises_it():
    """The inner one may have something to say before it ends."""

    def inner():
        with pytest.raises(KeyboardInterrupt):
            run(lose_an_interrupt)

    with pytest.raises(KeyboardInterrupt):
        run(inner)


def test_other_errors_are_not_replaced():
    with pytest.raises(ZeroDivisionError):
        run(lose_an_interrupt, lambda: 1 / 0)


def test_afterwards_all_is_as_before():
    with pytest.raises(KeyboardInterrupt):
        run(lose_an_interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    raise_lost_interrupt()
    run(raise_lost_interrupt)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None], ids=["ignored", "handled"])
def test_who_has_a_way_of_his_own_keeps_it(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        run(interrupt, raise_lost_interrupt)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_only_the_main_thread_handles_interrupts():
    handlers = []
    thread = threading.Thread(target=run, args=[lambda: handlers.append(signal.getsignal(signal.SIGINT))])
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
