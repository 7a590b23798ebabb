"""Read the feature table part by part, past the page cache, the next part while the last is in use.

Blocks that no missing row touches are not read; those that are read are read whole and verified, so that one at the
border of two parts is read twice.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.sampler.recording import Table
from penstock.storage.blocks import BLOCK_BYTES, block_down, block_up
from penstock.storage.directio import IO_BYTES, DirectFile, aligned_buffer, page_up


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows lo..hi-1 of the table in a buffer; row lo starts at `data[0]`. Blocks nobody needs hold old bytes."""

    lo: int
    hi: int
    data: NDArray[np.uint8]


def part_buffer_bytes(table: Table, part_rows: int) -> int:
    """Bytes of one buffer for parts of this many rows, cut blocks at both ends included."""
    whole = block_up(min(part_rows, table.num_rows) * table.row_bytes) + BLOCK_BYTES
    return page_up(min(whole, table.num_bytes))


class PartReader:
    """Two buffers, a thread that reads and one that verifies; a context manager.

    Each part must be done with before the next is asked for.
    """

    def __init__(self, table: Table, part_rows: int, needed: NDArray[np.uint8], buffer_bytes: int) -> None:
        self.table, self.part_rows, self._needed = table, part_rows, needed
        self.buffers = (aligned_buffer(buffer_bytes), aligned_buffer(buffer_bytes))
        self._file = DirectFile(table.path, "read")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="penstock-reader")
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="penstock-checker")  # while the next bytes come
        self.read_bytes = 0

    def __enter__(self) -> "PartReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._checker.shutdown(wait=True, cancel_futures=True)
        self._file.close()

    def parts(self, first_row: int) -> Iterator[Part]:
        """Parts from a row on; an error of the reading thread is raised here."""
        coming: Future[Part] | None = None
        for number, lo in enumerate(range(first_row, self.table.num_rows, self.part_rows)):
            part = (coming or self._pool.submit(self._read, lo, number)).result()
            coming = self._pool.submit(self._read, part.hi, number + 1) if part.hi < self.table.num_rows else None
            yield part

    def _read(self, lo: int, number: int) -> Part:
        table, buffer, hi = self.table, self.buffers[number % 2], min(lo + self.part_rows, self.table.num_rows)
        first, past = lo * table.row_bytes // BLOCK_BYTES, block_up(hi * table.row_bytes) // BLOCK_BYTES
        checks: list[Future[None]] = []
        for run in _runs(first + np.flatnonzero(self._needed[first:past])):
            start, stop = int(run[0]) * BLOCK_BYTES, min((int(run[-1]) + 1) * BLOCK_BYTES, table.num_bytes)
            for at in range(start, stop, IO_BYTES):
                end, data = min(at + IO_BYTES, stop), buffer[at - first * BLOCK_BYTES :]
                self._file.read_into(data, table.offset + at, page_up(end - at))
                if table.sums is not None:
                    checks.append(self._checker.submit(table.sums.verify, at, data[: end - at]))
            self.read_bytes += page_up(stop - start)
        for check in checks:
            check.result()
        at = lo * table.row_bytes
        return Part(lo=lo, hi=hi, data=buffer[at - block_down(at) :])


def _runs(blocks: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Split ascending block numbers where one is left out."""
    return [run for run in np.split(blocks, np.flatnonzero(np.diff(blocks) > 1) + 1) if len(run)]
