"""Try again after a failure that a new group of ranks may mend, as often and as late as the policy says."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from math import inf
from typing import TypeVar

from penstock.engine.chunked.backend import NoRoomYet, RankFailed
from penstock.engine.supervision.events import (
    Answered,
    Called,
    Decision,
    Ended,
    Failed,
    Finish,
    GiveUp,
    Restart,
    StopRequested,
    Tick,
)
from penstock.engine.supervision.policy import State, step
from penstock.engine.supervision.watch import kind_of
from penstock.engine.trainer import Stopped

logger = logging.getLogger(__name__)
T = TypeVar("T")


def run_with_restarts(
    attempt: Callable[[int], T],
    retries: int,
    on_restart: Callable[[int, BaseException], None] | None = None,
    *,
    stop_requested: threading.Event | None = None,
) -> T:
    """Call `attempt(0)`, and after a RankFailed `attempt(1)` and so on, `retries` times at most.

    An attempt opens its own ranks, and has ended them all when it raises. That there is no room is tried again only
    after something was lost. `on_restart(number, error)` is called before
    the pause ahead of an attempt. Any other error is raised as it is, at once, and so is the last RankFailed. Raises
    Stopped where `stop_requested` is set when an attempt has failed, or while the next one is waited for.
    """
    stop, state, failures = stop_requested or threading.Event(), State(num_ranks=1, retries=retries), []
    number = 0
    while True:
        state, _ = step(state, [Called(at_s=time.monotonic(), timeout_s=inf)])  # backends watch for silence themselves
        try:
            result = attempt(number)
            step(state, [Answered(at_s=time.monotonic(), rank=0)])
            return result
        except Stopped:
            raise
        except Exception as error:
            if number == 0 and isinstance(error, NoRoomYet):
                raise  # nothing was lost that could come back: it has been waited for
            now_s = time.monotonic()
            state, _ = step(state, [Failed(at_s=now_s, rank=0, kind=kind_of(error))])
            stopped = [StopRequested(at_s=now_s)] if stop.is_set() else []
            state, (decision,) = step(state, [*stopped, Ended(at_s=now_s)])
            failures.append(error)
            if isinstance(decision, GiveUp):
                _note_earlier(failures)
                raise
            if isinstance(decision, Restart) and on_restart is not None:
                on_restart(decision.attempt, error)
        if isinstance(decision, Restart):
            number = decision.attempt
            state, decision = _pause(state, decision, stop)
        if isinstance(decision, Finish):
            raise Stopped(
                f"stopped after a failure ({failures[-1]}); run the same command again to continue from the last "
                "checkpoint"
            ) from failures[-1]


def _pause(state: State, restart: Restart, stop: threading.Event) -> tuple[State, Decision]:
    """Wait until the next attempt is due, or a stop is asked for."""
    if restart.pause_s:
        logger.info("attempt %d follows in %.0f s", restart.attempt, restart.pause_s)
    if stop.wait(restart.pause_s):
        state, (decision,) = step(state, [StopRequested(at_s=time.monotonic())])
        return state, decision
    state, (decision,) = step(state, [Tick(at_s=time.monotonic())])
    return state, decision


def _note_earlier(failures: list[Exception]) -> None:
    """Tell with the last failure what earlier attempts failed with."""
    with contextlib.suppress(AttributeError):  # Python 3.10 has no notes
        for number, error in enumerate(failures[:-1]):
            if isinstance(error, RankFailed):
                failures[-1].add_note(f"attempt {number} of this run failed with: {str(error).splitlines()[0]}")
