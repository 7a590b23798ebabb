"""Hand values from one thread to another, in order, bounded, without ever hanging.

A `Pipe` has one producer and one consumer. Either may leave at any time, and the other learns it at once: `fail` makes
the consumer's `get` raise the producer's error, even where values are still queued; `close` makes every call raise
`PipeClosed`. A wait also looks after the other side's thread, should it die without a word.
"""

from collections import deque
from collections.abc import Callable
from threading import Condition, Thread, current_thread
from typing import Generic, TypeVar

_T = TypeVar("_T")
_LOOK_S = 0.5  # how often a wait looks whether the other side is alive


class PipeClosed(Exception):
    """The other side has left; nothing more comes or is wanted."""


class Pipe(Generic[_T]):
    """A bounded queue of `capacity` values; owns its lock."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: deque[_T] = deque()
        self._changed = Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._producer: Thread | None = None

    def watch(self, producer: Thread) -> None:
        """Let `get` raise if this thread ends without `fail` or `close`."""
        self._producer = producer

    def put(self, value: _T) -> None:
        """Queue a value; waits while the queue is full. PipeClosed where nobody wants it."""
        with self._changed:
            while len(self._values) >= self._capacity and not self._closed:
                self._changed.wait(_LOOK_S)
            if self._closed:
                raise PipeClosed
            self._values.append(value)
            self._changed.notify_all()

    def get(self) -> _T:
        """Take the next value; waits while there is none. Raises the producer's error, or PipeClosed."""
        with self._changed:
            while not self._values and not self._closed and self._error is None:
                self._changed.wait(_LOOK_S)
                self._check_producer()
            if self._error is not None:
                raise self._error
            if self._closed:
                raise PipeClosed
            value = self._values.popleft()
            self._changed.notify_all()
            return value

    def _check_producer(self) -> None:
        alive = self._producer is None or self._producer.is_alive()
        if not alive and not self._values and not self._closed and self._error is None:
            raise RuntimeError(f"thread {self._producer and self._producer.name} ended without a word; report this bug")

    def fail(self, error: BaseException) -> None:
        """Make every later `get` raise `error`; the first error stays."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        """Wake both sides with PipeClosed and drop what is queued."""
        with self._changed:
            self._closed = True
            self._values.clear()
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed


def start_worker(name: str, work: Callable[[], None], out: Pipe[_T]) -> Thread:
    """Run `work`, which puts into `out`, on a daemon thread; its error goes to the consumer of `out`."""

    def run() -> None:
        try:
            work()
        except PipeClosed:
            out.close()
        except BaseException as error:  # the thread's boundary: the consumer raises it
            out.fail(error)

    thread = Thread(target=run, name=name, daemon=True)
    out.watch(thread)
    thread.start()
    return thread


def join_worker(thread: Thread) -> None:
    """Wait for a worker whose pipes are closed; a garbage collection on that very thread does not wait for itself."""
    if thread is not current_thread():
        thread.join()
