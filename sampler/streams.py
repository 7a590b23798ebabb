"""Many byte streams into few files, each growing by large page-aligned writes.

A stream is a page-aligned region of a window file that is written front to back: an extent, or a bucket of a shared
segment. The bytes after its last whole page wait in memory until more come, or until `sync` writes their page padded
with zeros: a later write of that page repeats them, so whatever a kill leaves there begins with the bytes synced.
Writing is done by threads; the first error wins and is raised in the caller.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.storage.directio import PAGE, DirectFile, aligned_buffer, page_down, page_up

_WRITERS = 3
NUM_STAGES = 2 * _WRITERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Where a stream lies: `offset` in its window's file, and the bytes before its first row.

    An extent has its `item`, counted from the plan's first; a bucket of a shared segment has item -1 and begins at
    row `first_row` of the segment.
    """

    window: int
    offset: int
    prefix_bytes: int
    num_rows: int
    item: int
    first_row: int


class StreamWriter:
    """Appends to streams through a ring of staging buffers; a context manager.

    Several threads may append to different streams, fewer threads than there are buffers; the rest is for one thread.

    `tails` uint8 [S, PAGE] hold the bytes after each stream's last whole page, `digests` what was appended so far.
    """

    def __init__(self, regions: Sequence[Region], files: dict[int, DirectFile], stage_bytes: int) -> None:
        self.regions, self._files, self.stage_bytes = regions, files, stage_bytes
        self.tails = aligned_buffer(len(regions) * PAGE)[: len(regions) * PAGE].reshape(-1, PAGE)
        self.positions = np.zeros(len(regions), np.int64)
        self._synced = np.zeros(len(regions), np.int64)
        self.digests: list[Any] = [xxhash.xxh3_64() for _ in regions]
        self._free: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()
        for _ in range(NUM_STAGES):
            self._free.put(aligned_buffer(stage_bytes))
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="penstock-writer")
        self._errors: list[BaseException] = []

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, stream: int) -> tuple[NDArray[np.uint8], int]:
        """Take a staging buffer that starts with the stream's tail; new bytes go behind it, at the returned offset.

        Waits for a write to finish if none is free. Hand the buffer back with `append`.
        """
        stage = self._free.get()  # a writer always returns its buffer, failed or not
        if self._errors:
            self._free.put(stage)  # another thread may wait for it
            raise self._errors[0]
        tail = int(self.positions[stream]) % PAGE
        stage[:tail] = self.tails[stream, :tail]
        return stage, tail

    def append(self, stream: int, stage: NDArray[np.uint8], num_bytes: int) -> None:
        """Add the `num_bytes` new bytes in a buffer from `begin` to the stream; whole pages are written."""
        position = int(self.positions[stream])
        tail = position % PAGE
        self.digests[stream].update(stage[tail : tail + num_bytes])
        whole = page_down(tail + num_bytes)
        left = tail + num_bytes - whole
        self.tails[stream, :left] = stage[whole : whole + left]
        self.positions[stream] += num_bytes
        file, offset = self._files[self.regions[stream].window], self.regions[stream].offset + page_down(position)
        self._pool.submit(self._write_stage, file, stage, offset, whole)

    def _write_stage(self, file: DirectFile, stage: NDArray[np.uint8], offset: int, num_bytes: int) -> None:
        try:
            self._write(file, stage, offset, num_bytes)
        finally:
            self._free.put(stage)

    def _write(self, file: DirectFile, data: NDArray[np.uint8], offset: int, num_bytes: int) -> None:
        try:
            if num_bytes and not self._errors:
                file.write_from(data, offset, num_bytes)
        except BaseException as error:
            self._errors.append(error)

    def _drain(self) -> None:
        """Wait until everything handed over is written; raises the first error."""
        stages = [self._free.get() for _ in range(NUM_STAGES)]
        for stage in stages:
            self._free.put(stage)
        if self._errors:
            raise self._errors[0]

    def _write_tail(self, stream: int) -> None:
        region, position = self.regions[stream], int(self.positions[stream])
        self.tails[stream, position % PAGE :] = 0
        self._write(self._files[region.window], self.tails[stream], region.offset + page_down(position), PAGE)

    def sync(self) -> None:
        """Make what was appended durable; of the last pages only those that changed since are written."""
        self._drain()
        changed = np.flatnonzero((self.positions != self._synced) & (self.positions % PAGE > 0))
        for _ in self._pool.map(self._write_tail, changed.tolist()):
            pass
        if self._errors:
            raise self._errors[0]
        for file in self._files.values():
            file.sync()
        self._synced[:] = self.positions

    def finish(self) -> None:
        """End all streams, which were synced: the padding of their last pages counts as theirs."""
        assert np.array_equal(self.positions, self._synced)
        for digest, position in zip(self.digests, self.positions.tolist(), strict=True):
            digest.update(bytes(page_up(position) - position))

    def resume(self, stream: int, position: int, buffer: NDArray[np.uint8]) -> int:
        """Continue a stream that a killed run left at `position`; returns the xxh3-64 of the bytes found before it."""
        region, digest, done = self.regions[stream], self.digests[stream], 0
        while done < position:
            count = min(page_down(len(buffer)), page_up(position - done))
            self._files[region.window].read_into(buffer, region.offset + done, count)
            digest.update(buffer[: min(count, position - done)])
            done += count
        if tail := position % PAGE:
            self.tails[stream, :tail] = buffer[count - PAGE : count - PAGE + tail]
        self.positions[stream] = self._synced[stream] = position
        return int(digest.intdigest())


def stage_for(row_bytes: int, wanted: int) -> int:
    """A staging buffer that holds at least one row and a tail."""
    return page_up(max(wanted, row_bytes + 2 * PAGE))
