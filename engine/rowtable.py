"""Read rows of a table on disk by ascending ids: from memory where the table fits, else in few large reads.

Neither path maps the file, so what is resident is what the caller budgeted: the table, or one read buffer.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.parallel import parallel_for
from penstock.storage.directio import IO_BYTES, PAGE, DirectFile, aligned_buffer, page_down, page_up

_GAP_BYTES = 64 << 10  # reading over a gap of this size costs less than another read: SSDs and disks alike


def buffer_bytes(row_bytes: int) -> int:
    """Size of the read buffer of a table that is not resident."""
    return IO_BYTES + page_up(row_bytes) + PAGE


class RowTable:
    """`num_rows` rows of `row_bytes` from byte 4096 of a file on; a context manager, not safe for several threads."""

    def __init__(self, path: Path, row_bytes: int, num_rows: int, *, resident: bool, threads: int) -> None:
        self.path, self.row_bytes, self.num_rows, self._threads = path, row_bytes, num_rows, threads
        self._file = DirectFile(path, "read")
        self._rows: NDArray[np.uint8] | None = None
        table_bytes = num_rows * row_bytes
        self._buffer = aligned_buffer(table_bytes if resident else buffer_bytes(row_bytes))
        if resident:
            for start in range(0, table_bytes, IO_BYTES):
                num_bytes = page_up(min(IO_BYTES, table_bytes - start))
                self._file.read_into(self._buffer[start:], PAGE + start, num_bytes)
            self._rows = self._buffer[:table_bytes].reshape(num_rows, row_bytes)

    def __enter__(self) -> "RowTable":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._file.close()

    def gather(self, ids: NDArray[Any], out: NDArray[np.uint8]) -> None:
        """Copy rows `ids` [n], strictly ascending, to `out` uint8 [n, row_bytes]."""
        rows = self._rows
        if rows is None:
            self._gather_from_disk(ids, out)
            return

        def copy(lo: int, hi: int) -> None:
            np.take(rows, ids[lo:hi], axis=0, out=out[lo:hi], mode="clip")  # "raise" would buffer the output

        parallel_for(copy, len(ids), self._threads)

    def _gather_from_disk(self, ids: NDArray[Any], out: NDArray[np.uint8]) -> None:
        first = PAGE + ids.astype(np.int64) * self.row_bytes
        starts, ends = first // PAGE * PAGE, -(-(first + self.row_bytes) // PAGE) * PAGE
        breaks = np.flatnonzero(starts[1:] - ends[:-1] > _GAP_BYTES) + 1
        lo = 0
        for stop in [*breaks.tolist(), len(ids)]:
            while lo < stop:
                reach = starts[lo] + page_down(len(self._buffer))
                hi = min(stop, int(np.searchsorted(ends, reach, side="right")))
                self._read_run(ids[lo:hi], int(starts[lo]), int(ends[hi - 1]), out[lo:hi])
                lo = hi

    def _read_run(self, ids: NDArray[Any], start: int, end: int, out: NDArray[np.uint8]) -> None:
        self._file.read_into(self._buffer, start, end - start)
        at = PAGE + int(ids[0]) * self.row_bytes - start
        count = int(ids[-1]) - int(ids[0]) + 1
        rows = self._buffer[at : at + count * self.row_bytes].reshape(count, self.row_bytes)
        np.take(rows, ids - ids[0], axis=0, out=out, mode="clip")
