"""Threads that move bytes between files and buffers, and the buffers.

Jobs are queued in order. A job starts when all earlier writes to its file have ended, so every read sees every write
that was queued before it; the transfers of a job, and jobs on different files, run side by side. Reads overtake writes
to other files, as somebody waits for them. An error of any transfer, or a thread that ends, is raised by every later
call; nothing waits for what will not come.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from penstock.storage.directio import DirectFile, aligned_buffer
from penstock.storage.history.values import POISON
from penstock.storage.pipe import join_worker

MIN_BUFFERS = 2  # a moving average holds two at a time
_MAX_BUFFERS = 64
_THREADS = 4
_LOOK_S = 0.5  # how often a wait looks whether the threads are alive

_T = TypeVar("_T")
Piece = tuple[int, NDArray[np.uint8]]  # offset in the file, and the memory that goes there or comes from there


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """Transfers of one file that were queued together."""

    file: DirectFile
    is_write: bool
    left: deque[Piece]
    then: Callable[[], None] | None = None
    running: int = 0
    done: bool = False


@dataclass(slots=True, kw_only=True)
class Counters:
    """What moved, and how long the caller waited for it."""

    read_bytes: int = 0
    written_bytes: int = 0
    stall_s: float = 0.0


class IoThreads:
    """A few threads and their queue; a context manager. Jobs come from one thread, the user's.

    `delay_s` makes every transfer late: a test that passes with it does not depend on a fast disk.
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        self.counters = Counters()
        self._delay_s = delay_s
        self._changed = Condition()
        self._jobs: list[Job] = []  # not done, in order
        self._error: BaseException | None = None
        self._closed = False
        self._threads: list[Thread] = []  # started with the first job: tables in memory need none

    def __enter__(self) -> "IoThreads":
        return self

    def __exit__(self, *_: Any) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            join_worker(thread)

    def submit(
        self, file: DirectFile, pieces: Iterable[Piece], *, is_write: bool, then: Callable[[], None] | None = None
    ) -> Job:
        """Queue transfers; an I/O thread calls `then` when all are done. Until then, leave their memory alone."""
        job = Job(file=file, is_write=is_write, left=deque(pieces), then=then)
        num_bytes = sum(len(memory) for _, memory in job.left)
        if is_write:
            self.counters.written_bytes += num_bytes
        else:
            self.counters.read_bytes += num_bytes
        with self._changed:
            self.check()
            if job.left:
                self._start_threads()
            self._jobs.append(job)
            if job.left:
                self._changed.notify_all()
                return job
        self._finish(job)
        return job

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready`, which is asked under the lock whenever something changed; counted as a stall."""
        with self._changed:
            self.check()
            start = time.perf_counter()
            while not ready():
                self._changed.wait(_LOOK_S)
                self.check()
            self.counters.stall_s += time.perf_counter() - start

    def change(self, action: Callable[[], _T]) -> _T:
        """Do something under the lock that a wait may hang on."""
        with self._changed:
            result = action()
            self._changed.notify_all()
            return result

    def wait(self, job: Job) -> None:
        """Wait for a job."""
        self.wait_until(lambda: job.done)

    def flush(self) -> None:
        """Wait for all jobs."""
        self.wait_until(lambda: not self._jobs)

    def _start_threads(self) -> None:
        while len(self._threads) < _THREADS:
            thread = Thread(target=self._run, name=f"penstock-history-{len(self._threads)}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def check(self) -> None:
        """Raise what went wrong on a thread, if something did."""
        if self._error is not None:
            raise self._error
        if self._closed:
            raise RuntimeError("the histories are used after they were closed; use them within open_history")
        dead = [thread.name for thread in self._threads if not thread.is_alive()]
        if dead:
            raise RuntimeError(f"I/O thread {dead[0]} ended without a word; report this bug")

    def _take(self) -> tuple[Job, Piece] | None:
        """The next transfer that may run: of the first read, else of the first write."""
        written: set[DirectFile] = set()
        first_write: Job | None = None
        for job in self._jobs:
            if job.left and job.file not in written:
                if not job.is_write:
                    return self._start(job)
                first_write = first_write or job
            if job.is_write:
                written.add(job.file)
        return self._start(first_write) if first_write else None

    def _start(self, job: Job) -> tuple[Job, Piece]:
        job.running += 1
        return job, job.left.popleft()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while (taken := None if self._closed or self._error else self._take()) is None:
                        if self._closed or self._error:
                            return
                        self._changed.wait()
                self._transfer(*taken)
        except BaseException as error:  # the thread's boundary: the user's next call raises it
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _transfer(self, job: Job, piece: Piece) -> None:
        if self._delay_s:
            time.sleep(self._delay_s)
        offset, memory = piece
        (job.file.write_from if job.is_write else job.file.read_into)(memory, offset, len(memory))
        with self._changed:
            job.running -= 1
            if job.running or job.left:
                return
        self._finish(job)

    def _finish(self, job: Job) -> None:
        if job.then is not None:
            job.then()  # before the job is gone: who waits for it, or for all jobs, may rely on this too
        with self._changed:
            self._jobs.remove(job)
            job.done = True
            self._changed.notify_all()


@dataclass(slots=True)
class Buffers:
    """Aligned buffers of one size, made when they are first wanted and then reused, within `limit_bytes`.

    Prefetches leave `MIN_BUFFERS` to the calls that must go on. `take` is for one thread, `give` for any.
    """

    io: IoThreads
    poison: bool = False
    size: int = 0
    limit_bytes: int = 0
    num_bytes: int = 0
    prefetched: int = 0
    _free: list[NDArray[np.uint8]] = field(default_factory=list)
    _next: NDArray[np.uint8] | None = None

    def fit(self, size: int, limit_bytes: int) -> None:
        """Let buffers have at least `size`; free ones that are smaller go."""

        def resize() -> None:
            if size > self.size:
                self.num_bytes -= sum(map(len, self._free))
                self._free.clear()
                self.size = size
            self.limit_bytes = limit_bytes

        self.io.change(resize)

    def take(self) -> NDArray[np.uint8]:
        """A buffer of unknown content; waits for one."""
        self.io.wait_until(self._reserve)
        return self._reserved()

    def take_for_prefetch(self) -> NDArray[np.uint8] | None:
        """A buffer, or None where none is to be had now."""

        def reserve() -> bool:
            capacity = min(_MAX_BUFFERS, self.limit_bytes // max(1, self.size))
            if self.prefetched >= capacity - MIN_BUFFERS or not self._reserve():
                return False
            self.prefetched += 1
            return True

        return self._reserved() if self.io.change(reserve) else None

    def give(self, buffer: NDArray[np.uint8], *, prefetched: bool = False) -> None:
        """Return a buffer that nothing reads or writes any more."""
        if self.poison:
            buffer[:] = POISON

        def put() -> None:
            self.prefetched -= prefetched
            if len(buffer) >= self.size:
                self._free.append(buffer)
            else:
                self.num_bytes -= len(buffer)

        self.io.change(put)

    def _reserve(self) -> bool:
        """Under the lock: whether there is a free buffer, or room for one more, which is then counted as made."""
        if self._free:
            self._next = self._free.pop()
            return True
        if self.num_bytes + self.size > min(self.limit_bytes, _MAX_BUFFERS * self.size):
            return False
        self.num_bytes += self.size
        return True

    def _reserved(self) -> NDArray[np.uint8]:
        buffer, self._next = self._next, None
        if buffer is None:
            buffer = aligned_buffer(self.size)[: self.size]
            if self.poison:
                buffer[:] = POISON
        return buffer
