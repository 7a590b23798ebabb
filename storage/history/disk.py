"""Buffers of runs in a file, read past the page cache and ahead, written behind.

A write encodes its rows into a transfer buffer and queues one transfer per run; a read fetches a reader's region in as
few transfers as its mix of buffers allows. What is prefetched remembers how often each of its runs had been written:
runs that were written since are read again, and runs that were known to be still due are copied over when they come,
so prefetching changes no result. A run's checksum is kept in memory when it is written and compared when it is read.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.storage.budget import require_free_disk
from penstock.storage.directio import DirectFile
from penstock.storage.errors import FormatError, full_disk_is_clear
from penstock.storage.history.layout import RunLayout
from penstock.storage.history.store import check_size
from penstock.storage.history.transfers import Buffers, IoThreads, Job, Piece

_PIECE_BYTES = 1 << 20  # threads share a region in pieces of this size
_DUE, _UNREAD = -1, -2  # in `Request.seen`: not read, and its writer is expected or not


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A region that is read, or is to be read when a buffer is free. Runs lie in `memory` as in the region."""

    reader: int
    buffers: NDArray[np.int64]
    seen: NDArray[np.int64]  # [K] how often the run had been written when it was read
    memory: NDArray[np.uint8] | None = None
    job: Job | None = None
    prefetched: bool = False


@dataclass(slots=True, kw_only=True)
class Disk:
    """What the files of a rank share: threads, buffers, and requests that wait for a buffer, in order."""

    io: IoThreads
    buffers: Buffers
    waiting: deque[tuple["DiskStore", Request]] = field(default_factory=deque)

    def go_on(self) -> None:
        """Start what waits, as far as buffers are free."""
        while self.waiting:
            memory = self.buffers.take_for_prefetch()
            if memory is None:
                return
            store, request = self.waiting.popleft()
            request.prefetched = True
            store.start(request, memory)


class DiskStore:
    """See `RunStore`; used by one thread, with the I/O threads behind it."""

    def __init__(self, layout: RunLayout, num_buffers: int, file: DirectFile, disk: Disk) -> None:
        self.layout, self.file, self.path, self._disk = layout, file, file.path, disk
        self.num_bytes = num_buffers * layout.buffer_bytes
        self._writes = np.zeros((num_buffers, layout.num_chunks), np.int64)  # of every writer's runs; 0: all zeros
        self._sums = np.zeros((num_buffers, layout.num_chunks, layout.num_chunks), np.uint64)  # of every run
        self._requests: dict[int, Request] = {}
        require_free_disk(self.path.parent, self.num_bytes, f"the history {self.path.name}")
        if self.num_bytes:
            file.reserve(self.num_bytes)

    def write(self, buffer: int, writer: int, rows: NDArray[Any], which: NDArray[np.int64] | None = None) -> None:
        """See `RunStore`."""
        self._check()
        layout, memory = self.layout, self._disk.buffers.take()
        self._writes[buffer, writer] += 1
        pieces: list[Piece] = []
        at = 0
        for reader in np.flatnonzero(layout.sizes[writer]).tolist():
            run = memory[at : at + int(layout.padded[writer, reader])]
            lo, hi = layout.send_offsets[writer, reader : reader + 2]
            values = rows[lo:hi] if which is None else rows.take(which[lo:hi], axis=0)
            layout.values.encode(values, self._values(run, writer, reader))
            self._note(buffer, writer, reader, run)
            self._hand_over(buffer, writer, reader, run)
            pieces.append((self._offset(buffer, writer, reader), run))
            at += len(run)
        self._queue_write(pieces, memory)

    def _note(self, buffer: int, writer: int, reader: int, run: NDArray[np.uint8]) -> None:
        """Keep the checksum of a run that is about to be written."""
        self._sums[buffer, writer, reader] = _sum(self._values(run, writer, reader))

    def _verify(self, buffer: int, writer: int, reader: int, run: NDArray[np.uint8]) -> NDArray[Any]:
        """The values of a run that was read; FormatError where they are not those that were written."""
        values = self._values(run, writer, reader)
        if self._writes[buffer, writer]:
            damaged = _sum(values) != int(self._sums[buffer, writer, reader])
        else:
            damaged = bool(values.view(np.uint8).any())  # nothing was written: zeros
        if damaged:
            raise FormatError(
                f"{self.path}: the rows that chunk {writer} left for chunk {reader} are not those that were written: "
                "the disk damaged them; run the same command again, it goes on from the last checkpoint"
            )
        return values

    def _check(self) -> None:
        self._disk.io.check()
        check_size(self.path, self.num_bytes)

    def _hand_over(self, buffer: int, writer: int, reader: int, run: NDArray[np.uint8]) -> None:
        """Give a run to the reader that waits for it; not to one that has its old rows, which will read it again."""
        request = self._requests.get(reader)
        if request and request.memory is not None and request.buffers[writer] == buffer:
            if request.seen[writer] == _DUE:
                self._place(request, writer)[:] = run
                request.seen[writer] = self._writes[buffer, writer]

    def view(self, buffers: NDArray[np.int64], reader: int) -> NDArray[Any] | None:
        """See `RunStore`."""
        return None

    def read(self, buffers: NDArray[np.int64], reader: int, out: NDArray[Any]) -> None:
        """See `RunStore`."""
        self._check()
        request = self._requests.pop(reader, None)
        if request is None or request.memory is None:
            if request is not None:
                self._drop(request)
            request = self._request(buffers, reader)
            self.start(request, self._disk.buffers.take())
        self._complete(request, buffers)
        self._decode(request, out)
        self._drop(request)
        self._disk.go_on()

    def prefetch(self, buffers: NDArray[np.int64], reader: int, pending: NDArray[np.bool_]) -> None:
        """See `RunStore`. It starts when a buffer is free, or never where none becomes free before the read."""
        if reader in self._requests:
            self._drop(self._requests.pop(reader))
        request = self._requests[reader] = self._request(buffers, reader)
        # Due runs are told by the count that they have now, in case they are written before the request is started.
        request.seen[pending] = self._counts(buffers)[pending]
        self._disk.waiting.append((self, request))
        self._disk.go_on()

    def forget(self) -> None:
        """See `RunStore`."""
        while self._requests:
            self._drop(self._requests.popitem()[1])

    def fill(self, buffer: int, byte: int) -> None:
        """See `RunStore`."""
        self._check()
        if not self.layout.buffer_bytes or (byte == 0 and not self._writes[buffer].any()):
            return
        self._writes[buffer] += 1
        memory = self._disk.buffers.take()
        memory[:] = byte
        for writer, reader in np.argwhere(self.layout.sizes).tolist():
            self._note(buffer, writer, reader, memory[: int(self.layout.padded[writer, reader])])
        step, start = min(len(memory), _PIECE_BYTES), buffer * self.layout.buffer_bytes
        cuts = range(0, self.layout.buffer_bytes, step)
        self._queue_write([(start + at, memory[: min(step, cuts.stop - at)]) for at in cuts], memory)

    def blend(self, source: int, target: int, shares: NDArray[np.float64]) -> None:
        """See `RunStore`."""
        self._check()
        for reader in np.flatnonzero(self.layout.region_bytes).tolist():
            fresh, past = (self._read_region(buffer, reader) for buffer in (source, target))
            for writer in np.flatnonzero(self.layout.sizes[:, reader]).tolist():
                runs = [(buffer, self._at(data, writer, reader)) for buffer, data in ((source, fresh), (target, past))]
                one, other = (self._verify(buffer, writer, reader, run) for buffer, run in runs)
                self.layout.values.blend(one, other, float(shares[writer]))
                self._note(target, writer, reader, runs[1][1])
            self._disk.buffers.give(fresh)
            self._write_region(target, reader, past)
        self._writes[target] += 1

    def snapshot(self, buffer: int) -> NDArray[Any]:
        """See `RunStore`: a mapped file without a name, which is gone when the array is."""
        self._check()
        dtype, num_values = self.layout.values.array_dtype, int(self.layout.sizes.sum()) * self.layout.width
        if not num_values:
            return np.empty(0, dtype)
        folder = self.path.parent
        require_free_disk(folder, num_values * dtype.itemsize, f"the copy of {self.path.name} for a checkpoint")
        with full_disk_is_clear(folder), TemporaryFile(dir=folder, buffering=_PIECE_BYTES) as file:
            for reader in np.flatnonzero(self.layout.region_bytes).tolist():
                data = self._read_region(buffer, reader)
                for writer in np.flatnonzero(self.layout.sizes[:, reader]).tolist():
                    file.write(self._verify(buffer, writer, reader, self._at(data, writer, reader)).data)
                self._disk.buffers.give(data)
            file.flush()
            return np.memmap(file, dtype, "r", shape=(num_values,))

    def restore(self, buffer: int, stored: NDArray[Any]) -> None:
        """See `RunStore`."""
        self._check()
        self._writes[buffer] += 1
        at = 0
        for reader in np.flatnonzero(self.layout.region_bytes).tolist():
            data = self._disk.buffers.take()
            for writer in np.flatnonzero(self.layout.sizes[:, reader]).tolist():
                run = self._values(self._at(data, writer, reader), writer, reader)
                run[:] = stored[at : at + len(run)]
                self._note(buffer, writer, reader, self._at(data, writer, reader))
                at += len(run)
            self._write_region(buffer, reader, data)

    def start(self, request: Request, memory: NDArray[np.uint8]) -> None:
        """Read into `memory` what is there; runs that are due and still unwritten are left out."""
        counts = self._counts(request.buffers)
        due = request.seen == counts
        request.seen, request.memory = np.where(due, _DUE, counts), memory
        request.job = self._queue_read(request, np.flatnonzero(~due & self._wanted(request)))

    def _complete(self, request: Request, buffers: NDArray[np.int64]) -> None:
        """Wait for the request, and read what was written since, never came, or is wanted from elsewhere."""
        assert request.job is not None
        self._disk.io.wait(request.job)
        request.seen[request.buffers != buffers] = _UNREAD
        request.buffers = buffers
        late = np.flatnonzero(self._wanted(request) & (request.seen != self._counts(buffers)))
        if len(late):
            self._disk.io.wait(self._queue_read(request, late))

    def _decode(self, request: Request, out: NDArray[Any]) -> None:
        offsets, reader = self.layout.halo_offsets[request.reader], request.reader
        for writer in np.flatnonzero(self.layout.sizes[:, reader]).tolist():
            part = out[offsets[writer] : offsets[writer + 1]]
            if request.buffers[writer] < 0:
                part[:] = 0
            else:
                run = self._place(request, writer)
                self.layout.values.decode(self._verify(int(request.buffers[writer]), writer, reader, run), part)

    def _drop(self, request: Request) -> None:
        """Give the buffer back, when nothing reads into it any more."""
        if request.memory is None or request.job is None:
            self._disk.waiting.remove((self, request))
            return
        self._disk.io.wait(request.job)
        self._disk.buffers.give(request.memory, prefetched=request.prefetched)

    def _request(self, buffers: NDArray[np.int64], reader: int) -> Request:
        return Request(reader=reader, buffers=buffers, seen=np.full(self.layout.num_chunks, _UNREAD, np.int64))

    def _counts(self, buffers: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._writes[buffers, np.arange(self.layout.num_chunks)]

    def _wanted(self, request: Request) -> NDArray[np.bool_]:
        return (request.buffers >= 0) & (self.layout.sizes[:, request.reader] > 0)

    def _queue_read(self, request: Request, writers: NDArray[np.int64]) -> Job:
        """Read the runs of `writers`; neighbours of one buffer together."""
        reader, pieces = request.reader, deque[Piece]()
        first = int(self.layout.starts[0, reader])
        starts = self.layout.starts[writers, reader]
        at = request.buffers[writers] * self.layout.buffer_bytes + starts
        ends = at + self.layout.padded[writers, reader]
        cuts = [0, *(np.flatnonzero(at[1:] != ends[:-1]) + 1).tolist(), len(writers)]
        assert request.memory is not None
        for lo, hi in pairwise(cuts):
            if lo < hi:
                pieces.extend(_cut(int(at[lo]), int(ends[hi - 1]), request.memory[int(starts[lo]) - first :]))
        return self._disk.io.submit(self.file, pieces, is_write=False)

    def _queue_write(self, pieces: Iterable[Piece], memory: NDArray[np.uint8]) -> None:
        """Write pieces of a buffer and then give it back."""
        self._disk.io.submit(self.file, pieces, is_write=True, then=lambda: self._disk.buffers.give(memory))

    def _read_region(self, buffer: int, reader: int) -> NDArray[np.uint8]:
        memory = self._disk.buffers.take()
        pieces = _cut(*self._region(buffer, reader), memory)
        self._disk.io.wait(self._disk.io.submit(self.file, pieces, is_write=False))
        return memory

    def _write_region(self, buffer: int, reader: int, memory: NDArray[np.uint8]) -> None:
        self._queue_write(_cut(*self._region(buffer, reader), memory), memory)

    def _region(self, buffer: int, reader: int) -> tuple[int, int]:
        start, end = self.layout.region(reader)
        return buffer * self.layout.buffer_bytes + start, buffer * self.layout.buffer_bytes + end

    def _offset(self, buffer: int, writer: int, reader: int) -> int:
        return buffer * self.layout.buffer_bytes + int(self.layout.starts[writer, reader])

    def _place(self, request: Request, writer: int) -> NDArray[np.uint8]:
        assert request.memory is not None
        return self._at(request.memory, writer, request.reader)

    def _at(self, region: NDArray[np.uint8], writer: int, reader: int) -> NDArray[np.uint8]:
        """A run within its reader's region."""
        start = int(self.layout.starts[writer, reader] - self.layout.starts[0, reader])
        return region[start : start + int(self.layout.padded[writer, reader])]

    def _values(self, run: NDArray[np.uint8], writer: int, reader: int) -> NDArray[Any]:
        """A run without its padding."""
        used = int(self.layout.sizes[writer, reader]) * self.layout.row_bytes
        return run[:used].view(self.layout.values.array_dtype)


def _sum(values: NDArray[Any]) -> int:
    return xxhash.xxh3_64_intdigest(values.view(np.uint8).data)


def _cut(start: int, end: int, memory: NDArray[np.uint8]) -> list[Piece]:
    """Split a stretch of a file, and the memory that belongs to it, into what one thread moves at a time."""
    cuts = range(start, end, _PIECE_BYTES)
    return [(at, memory[at - start : min(end, at + _PIECE_BYTES) - start]) for at in cuts]
