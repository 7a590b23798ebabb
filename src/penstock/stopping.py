"""Signals that ask a run to stop: it ends a step where it can be continued, with a checkpoint where it trains."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from penstock.engine.trainstate import Stopped

logger = logging.getLogger(__name__)


@contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Let SIGTERM and SIGINT ask for a checkpoint; a second SIGINT interrupts at once."""

    def ask(number: int, _: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def soft_interrupt(stop: threading.Event) -> Iterator[None]:
    """Let the first SIGINT (Ctrl-C, a notebook's stop button) set `stop`, and raise KeyboardInterrupt for the Stopped
    that comes of it; a second one interrupts at once.

    Nothing is changed outside of the main thread, and where the program handles SIGINT in its own way.
    """
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        stop.set()
        logger.warning("interrupted: stopping where this can be continued; interrupt again to stop at once")

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    except Stopped as error:
        if not asked:
            raise
        raise KeyboardInterrupt(str(error)) from error
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if asked:
            stop.clear()  # it may be the caller's, who did not set it
