"""Whether Ray's head still answers, and how not to wait for it once it does not.

Calls that ask the head block when it is gone, and after a minute Ray ends the process that made them: the program that
called Penstock, whatever it had open. So such calls are made by `ask`, which makes none while the head does not answer,
gives one up that was under way when the head was lost, and Ray is left before that minute is over. They have to be
short: of a call under way Ray does not let go. What goes from process to process (calls of actors) needs no head.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import ray

from penstock.storage.errors import TryAgain

logger = logging.getLogger(__name__)
T = TypeVar("T")

_LOST_S = 15.0  # a head that was restarted in place, with its state in Redis, is back by then
_GAP_S = 2.0
_POLL_S = 0.02
_UNWIND_S = 5.0  # for whoever uses Ray to notice: then Ray is left under its feet, 40 s before it would end the process
_LEAVE_S = 30.0  # to leave Ray takes about 20 s without a head


class HeadLost(TryAgain, RuntimeError):
    """Ray's head does not answer any more. The run goes on from its newest checkpoint on a cluster that has one."""


class _Head:
    """The head of the session that is open; asked by a thread."""

    def __init__(self) -> None:
        self.place = str(ray.get_runtime_context().gcs_address)
        self.lost, self.over = threading.Event(), threading.Event()

    def require(self) -> None:
        if self.lost.is_set():
            raise HeadLost(
                f"Ray's head at {self.place} has not answered for {_LOST_S:.0f} s; run the same command again, with "
                "the address of a cluster that has one: the run goes on from its newest checkpoint"
            )

    def answers(self) -> bool:
        host, _, port = self.place.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_GAP_S).close()
        except OSError:
            return False
        return True

    def watch(self) -> None:
        heard = time.monotonic()
        while not self.over.wait(_GAP_S):
            if self.answers():
                heard = time.monotonic()
            if time.monotonic() - heard > _LOST_S:
                self.lost.set()
                self.over.wait(_UNWIND_S)
                ray.shutdown()
                return


_head: _Head | None = None  # of the one session that a process can have


def require_head() -> None:
    """HeadLost where the head of the session that is open does not answer any more."""
    if _head is not None:
        _head.require()


def ask(call: Callable[[], T]) -> T:
    """Call what may ask the head, and is short, once it answers; HeadLost where it is lost, also on the way."""
    head, found, failed = _head, list[T](), list[BaseException]()
    if head is None:
        return call()
    head.require()
    while not head.answers():
        time.sleep(_POLL_S)
        head.require()

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:  # raised again below
            failed.append(error)

    thread = threading.Thread(target=work, name="penstock-ask-ray", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        if thread.is_alive():
            head.require()
    if failed:
        head.require()  # what calls fail with while Ray is left says nothing
        raise failed[0]
    return found[0]


@contextmanager
def head_watched() -> Iterator[threading.Event]:
    """Watch the head of the session that was opened; gives what is set when it is lost, and leaves Ray then.

    Leaving takes a bounded time, whatever Ray does.
    """
    global _head
    if _head is not None:  # a session within a session
        yield _head.lost
        return
    head = _head = _Head()
    thread = threading.Thread(target=head.watch, name="penstock-head", daemon=True)
    thread.start()
    try:
        yield head.lost
    finally:
        _head = None
        head.over.set()
        thread.join(_LEAVE_S)
        if thread.is_alive():
            logger.warning("Ray does not let go of its head at %s, which is lost", head.place)
