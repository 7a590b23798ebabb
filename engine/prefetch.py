"""What both feeds share: a thread that assembles mini-batches ahead, and the iterator that hands them out.

The consumer holds one `BatchBuffer` while the thread fills another; taking the next batch gives the last one back. The
iterator owns the thread through a finalizer that knows nothing of the iterator, so a feed that is dropped in the middle
of a loop stops its threads.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch

from penstock.engine.buffers import BatchBuffer
from penstock.engine.minibatch import MiniBatch
from penstock.storage.pipe import Pipe, join_worker, start_worker
from penstock.storage.spans import TRACE


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedStats:
    """What a feed did since it was opened. Rows are counted by the tier that they came from.

    `stall_s` is how long the consumer waited for the feed, `device_s` how long both waited for the device to be done
    with a buffer: then the device is busy, and no faster feed would help.
    """

    items: int
    bytes_read: int
    device_rows: int
    host_rows: int
    pack_rows: int
    stall_s: float
    read_s: float
    assemble_s: float
    device_s: float = 0.0

    @property
    def hit_rates(self) -> dict[str, float]:
        """Share of the rows that came from each tier."""
        total = max(1, self.device_rows + self.host_rows + self.pack_rows)
        return {"device": self.device_rows / total, "host": self.host_rows / total, "pack": self.pack_rows / total}


@dataclass(slots=True, kw_only=True)
class Counters:
    """Running numbers of a source; written by its thread only."""

    bytes_read: int = 0
    device_rows: int = 0
    host_rows: int = 0
    pack_rows: int = 0
    read_s: float = 0.0
    assemble_s: float = 0.0


class Source(Protocol):
    """What makes the batches of consecutive steps, in order, called from one thread."""

    counters: Counters

    def assemble(self, step: int, buffer: BatchBuffer) -> MiniBatch:
        """Fill the buffer with a step's batch."""

    def ready_event(self) -> Any:
        """A CUDA event after which the last batch may be read, or None."""

    def close(self) -> None:
        """Stop what it runs in the background; a blocked `assemble` ends with PipeClosed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A batch in its buffer. `waited` is from when to when the device was waited for, before it was filled."""

    batch: MiniBatch
    buffer: BatchBuffer
    event: Any
    waited: tuple[float, float]

    def device_s(self, began: float, ended: float) -> float:
        """Seconds of a wait for this batch in which the device was waited for."""
        return max(0.0, min(self.waited[1], ended) - max(self.waited[0], began))


OpenSource = Callable[[range], Source]


def device_seconds(batches: object) -> float:
    """What of the waits for batches was for the device so far; 0 where they come from no feed."""
    return float(getattr(batches, "device_s", 0.0))


class Pipeline:
    """A source on a thread of its own, between two bounded pipes."""

    def __init__(self, source: Source, steps: range, buffers: list[BatchBuffer]) -> None:
        self.source, self._steps = source, steps
        self._free: Pipe[BatchBuffer] = Pipe(len(buffers))
        self._ready: Pipe[Ready] = Pipe(len(buffers))
        for buffer in buffers:
            self._free.put(buffer)
        self._thread = start_worker("penstock-assemble", self._run, self._ready)

    def _run(self) -> None:
        for step in self._steps:
            buffer = self._free.get()
            began = time.perf_counter()
            buffer.wait_until_consumed()
            waited = (began, time.perf_counter())
            with TRACE.during("assemble", f"item {step}"):
                batch = self.source.assemble(step, buffer)
            self._ready.put(Ready(batch=batch, buffer=buffer, event=self.source.ready_event(), waited=waited))

    def take(self) -> Ready:
        """Wait for the next batch; raises what any stage raised."""
        return self._ready.get()

    def give_back(self, buffer: BatchBuffer) -> None:
        """Let a buffer be filled again."""
        buffer.mark_consumed()
        self._free.put(buffer)

    def close(self) -> None:
        """Stop all threads and wait for them."""
        self._free.close()
        self._ready.close()
        self.source.close()
        join_worker(self._thread)
        event = self.source.ready_event()
        if event is not None:
            event.synchronize()  # copies under way read memory that is freed or filled again now


class Feed:
    """An iterator of mini-batches from `start_step` to `stop_step`, and a context manager; used by one thread.

    Threads start with the first batch. A batch is valid until the next `next()`, and says so where it is used later;
    `clone()` what must live longer.
    """

    def __init__(
        self,
        open_source: OpenSource,
        make_buffer: Callable[[], BatchBuffer],
        start_step: int,
        stop_step: int,
        *,
        release: Callable[[int], None] | None = None,
        auto_release: bool = True,
    ) -> None:
        if not 0 <= start_step <= stop_step:
            raise ValueError(f"steps {start_step}..{stop_step} are no range; wanted 0 <= start_step <= stop_step")
        self._open_source, self._make_buffer = open_source, make_buffer
        self._step, self._stop = start_step, stop_step
        self._buffers: list[BatchBuffer] = []
        self._pipeline: Pipeline | None = None
        self._stopper: Any = None
        self._held: Ready | None = None
        self._items, self._stall_s, self.device_s = 0, 0.0, 0.0
        self._past: list[Counters] = []
        self._closed = False
        self._release, self._auto_release = release, auto_release

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[MiniBatch]:
        return self

    def __len__(self) -> int:
        """Batches left."""
        return self._stop - self._step

    def __next__(self) -> MiniBatch:
        if self._closed:
            raise ValueError("this feed is closed; open another")
        self._give_back()
        if self._step >= self._stop:
            raise StopIteration
        pipeline = self._pipeline or self._start()
        started = time.perf_counter()
        try:
            ready = pipeline.take()
        except BaseException:
            self.close()  # the error's traceback holds this feed, and so would keep the threads from stopping
            raise
        self._held = ready
        if ready.event is not None:
            stream = torch.cuda.current_stream(ready.batch.features.device)
            stream.wait_event(ready.event)
            ready.batch.record_stream(stream)
        ended = time.perf_counter()
        waited = ready.device_s(started, ended)
        self.device_s += waited
        self._stall_s += ended - started - waited
        self._items += 1
        self._step += 1
        return ready.batch

    def _give_back(self) -> None:
        if self._held is not None and self._pipeline is not None:
            self._held.batch.expire()
            self._pipeline.give_back(self._held.buffer)
            self._held = None
            if self._auto_release:
                self.release(self._step)

    def release(self, step: int) -> None:
        """Say that no step before `step` will be asked for again, so that what holds them may go (`rolling` packs)."""
        if self._release is not None:
            self._release(step)

    def _start(self) -> Pipeline:
        while len(self._buffers) < 2:  # one is filled while the consumer works on the other
            self._buffers.append(self._make_buffer())
        steps = range(self._step, self._stop)
        self._pipeline = Pipeline(self._open_source(steps), steps, self._buffers)
        self._stopper = weakref.finalize(self, self._pipeline.close)
        return self._pipeline

    def _stop_threads(self) -> None:
        if self._pipeline is not None:
            if self._held is not None:
                self._held.batch.expire()
                self._held.buffer.mark_consumed()  # a feed that goes on elsewhere fills it again
            self._stopper()
            self._past.append(self._pipeline.source.counters)
            self._pipeline = self._held = None

    def close(self) -> None:
        """Stop all threads; the last batch is no longer valid. A second call does nothing."""
        self._stop_threads()
        self._closed = True
        self._buffers.clear()

    @property
    def stats(self) -> FeedStats:
        """Numbers so far."""
        counters = [*self._past, *([self._pipeline.source.counters] if self._pipeline else [])]
        return FeedStats(
            items=self._items,
            bytes_read=sum(c.bytes_read for c in counters),
            device_rows=sum(c.device_rows for c in counters),
            host_rows=sum(c.host_rows for c in counters),
            pack_rows=sum(c.pack_rows for c in counters),
            stall_s=self._stall_s,
            device_s=self.device_s,
            read_s=sum(c.read_s for c in counters),
            assemble_s=sum(c.assemble_s for c in counters),
        )

    def state_dict(self) -> dict[str, int]:
        """The position: the step that the next batch belongs to."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved position. ValueError where it lies past the end."""
        step = state["step"]
        if not 0 <= step <= self._stop:
            raise ValueError(f"step {step} is not within 0..{self._stop}; open the feed with a larger stop_step")
        self._stop_threads()
        self._step = step
