"""Record what a process did when, for a timeline: only within the steps that are asked for, and never without bound.

As there is one logger, there is one recorder: `TRACE`. It is off, and costs a look at a flag, until `watch` is called.
"""

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_LIMIT = 200_000  # spans of a process: 40 MB of timeline.json

# lane, thread, name, start and stop in seconds of time.perf_counter(), arguments
Span = tuple[str, int, str, float, float, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanLog:
    """The spans of one process, as it sends them. `origin_s` is the time of day at which its perf_counter was 0;
    `dropped` spans did not fit."""

    host: str
    pid: int
    origin_s: float
    spans: tuple[Span, ...]
    dropped: int


class Spans:
    """The spans of a process; any thread may add. While `active` is False, nothing is kept."""

    def __init__(self) -> None:
        self.active = False
        self.watch(None)

    def watch(self, steps: tuple[int, int] | None, *, limit: int = _LIMIT) -> None:
        """Forget all, and record steps first <= step < stop from now on; None records nothing."""
        self._first, self._stop = steps or (0, 0)
        self._limit, self._spans, self._dropped = limit, list[Span](), 0
        self.active = False

    def at(self, step: int) -> None:
        """Say which step comes next."""
        self.active = self._first <= step < self._stop

    def add(self, lane: str, name: str, start: float, stop: float, /, **args: Any) -> None:
        """Take a span, in seconds of time.perf_counter(). Spans of a lane and thread may nest, not overlap in part."""
        if not self.active:
            return
        if len(self._spans) >= self._limit:
            self._dropped += 1
            return
        self._spans.append((lane, threading.get_ident(), name, start, stop, args))

    @contextmanager
    def during(self, lane: str, name: str, /, **args: Any) -> Iterator[None]:
        """Take the time of a block, also where it raises."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(lane, name, began, time.perf_counter(), **args)

    def export(self) -> SpanLog:
        """What was recorded so far."""
        return SpanLog(
            host=platform.node(),
            pid=os.getpid(),
            origin_s=time.time() - time.perf_counter(),
            spans=tuple(self._spans),
            dropped=self._dropped,
        )


TRACE = Spans()
