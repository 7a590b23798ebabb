"""Where the runs of a table lie.

Run (c, d) holds the rows that writer chunk c gives to reader chunk d. A buffer holds all runs of reader 0, by writer,
then those of reader 1, and so on: a reader's *region* is contiguous, so that it is read in few large transfers, while a
writer's runs are scattered. On disk every run starts on a page, so that it is one aligned transfer of its own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.storage.directio import PAGE
from penstock.storage.history.values import HistoryDtype, Values

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLayout:
    """Offsets in bytes of the runs of one buffer, and rows of the runs in what writers give and readers get."""

    width: int
    values: Values
    sizes: Ints  # [K, K] rows of run (writer, reader)
    starts: Ints  # [K, K] byte offset of run (writer, reader) in the buffer
    padded: Ints  # [K, K] bytes of the run there, padding included
    send_offsets: Ints  # [K, K + 1] row at which reader d's run starts in what writer c gives
    halo_offsets: Ints  # [K, K + 1] row at which writer c's run starts in what reader d gets

    @property
    def num_chunks(self) -> int:
        """Readers, and writers."""
        return len(self.sizes)

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        return self.width * self.values.array_dtype.itemsize

    @property
    def buffer_bytes(self) -> int:
        """Bytes of one buffer."""
        return int(self.padded.sum())

    @property
    def region_bytes(self) -> Ints:
        """Bytes of every reader's region, [K]."""
        return np.asarray(self.padded.sum(axis=0))

    @property
    def transfer_bytes(self) -> int:
        """The largest that a push or a pull moves at once."""
        return int(max(self.padded.sum(axis=0).max(initial=0), self.padded.sum(axis=1).max(initial=0)))

    def region(self, reader: int) -> tuple[int, int]:
        """First and last byte (exclusive) of a reader's region."""
        start = int(self.starts[0, reader])
        return start, start + int(self.padded[:, reader].sum())

    def send_shape(self, writer: int) -> tuple[int, int]:
        """Shape of what a writer gives."""
        return int(self.send_offsets[writer, -1]), self.width

    def halo_shape(self, reader: int) -> tuple[int, int]:
        """Shape of what a reader gets."""
        return int(self.halo_offsets[reader, -1]), self.width


def plan_layout(sizes: NDArray[Any], width: int, dtype: HistoryDtype, *, paged: bool) -> RunLayout:
    """Place the runs of `sizes` [K, K] (writer, reader); `paged` pads each to whole pages."""
    values = Values(dtype=dtype)
    sizes = np.ascontiguousarray(sizes, np.int64)
    run_bytes = sizes * (width * values.array_dtype.itemsize)
    padded = -(-run_bytes // PAGE) * PAGE if paged else run_bytes
    starts = _exclusive(padded.T.reshape(1, -1))[0, :-1].reshape(sizes.shape).T
    return RunLayout(
        width=width,
        values=values,
        sizes=sizes,
        starts=starts,
        padded=padded,
        send_offsets=_exclusive(sizes),
        halo_offsets=_exclusive(sizes.T),
    )


def _exclusive(counts: Ints) -> Ints:
    """Running sums along the last axis that start with zero: [.., n] to [.., n + 1]."""
    out = np.zeros((*counts.shape[:-1], counts.shape[-1] + 1), np.int64)
    np.cumsum(counts, axis=-1, out=out[..., 1:])
    return out


def stretches(keys: NDArray[Any]) -> list[tuple[int, int]]:
    """Cut [0, len(keys)) into the longest ranges over which `keys` is constant."""
    cuts = np.flatnonzero(np.diff(keys)) + 1
    bounds = [0, *cuts.tolist(), len(keys)]
    return [(lo, hi) for lo, hi in zip(bounds[:-1], bounds[1:], strict=True) if lo < hi]
