"""What a table needs of the place that holds its buffers, and the two places that are plain arrays."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.runs import spread_runs
from penstock.storage.budget import require_free_disk
from penstock.storage.directio import DirectFile, aligned_buffer
from penstock.storage.errors import FormatError
from penstock.storage.history.layout import RunLayout, stretches


class RunStore(Protocol):
    """One or two buffers of runs. `buffers` [K] names for every writer the buffer to read from, -1 for zeros.

    Used by one thread. Arrays given stay the caller's: they are copied before the call returns.
    """

    layout: RunLayout

    def write(self, buffer: int, writer: int, rows: NDArray[Any], which: NDArray[np.int64] | None = None) -> None:
        """Store a writer's rows by reader: `which` int64 [num_sends] of `rows` [any, width], None for all in order."""

    def view(self, buffers: NDArray[np.int64], reader: int) -> NDArray[Any] | None:
        """What `read` gives, [num_halo, width], without a copy, until the next `write`; None where there is no such."""

    def read(self, buffers: NDArray[np.int64], reader: int, out: NDArray[Any]) -> None:
        """Fill `out` [num_halo, width], by writer."""

    def prefetch(self, buffers: NDArray[np.int64], reader: int, pending: NDArray[np.bool_]) -> None:
        """Start what `read` will do; `pending` [K] are writers that will write before that."""

    def forget(self) -> None:
        """Drop what was prefetched and not read."""

    def fill(self, buffer: int, byte: int) -> None:
        """Set every byte of a buffer."""

    def blend(self, source: int, target: int, shares: NDArray[np.float64]) -> None:
        """Make target's run of writer c shares[c] * source + (1 - shares[c]) * target."""

    def snapshot(self, buffer: int) -> NDArray[Any]:
        """All rows of a buffer as they are stored, without padding, [sum of sizes * width], read-only.

        A view where the buffer is an array in memory: to be used before the next write.
        """

    def restore(self, buffer: int, stored: NDArray[Any]) -> None:
        """Undo `snapshot`."""


class ArrayStore:
    """Buffers that are arrays: in memory, or mapped from a file at `path`."""

    def __init__(self, layout: RunLayout, num_buffers: int, path: Path | None = None) -> None:
        self.layout, self.path = layout, path
        dtype, self.num_bytes = layout.values.array_dtype, layout.buffer_bytes * num_buffers
        self._data: list[NDArray[Any]]
        if path is None or not self.num_bytes:
            # Whole pages that the kernel zeroes when they are first touched.
            raw = [aligned_buffer(layout.buffer_bytes)[: layout.buffer_bytes] for _ in range(num_buffers)]
            self._data = [data.view(dtype) for data in raw]
        else:
            self._data = list(_map_file(path, self.num_bytes).view(dtype).reshape(num_buffers, -1))

    def _run(self, writer: int, reader: int) -> slice:
        size = self.layout.values.array_dtype.itemsize
        start = int(self.layout.starts[writer, reader]) // size
        return slice(start, start + int(self.layout.padded[writer, reader]) // size)

    def _check(self) -> None:
        # A mapped file that was cut would end the process at the next access.
        if self.path is not None and self.num_bytes:
            check_size(self.path, self.num_bytes)

    def write(self, buffer: int, writer: int, rows: NDArray[Any], which: NDArray[np.int64] | None = None) -> None:
        """See `RunStore`."""
        self._check()
        layout, data, offsets = self.layout, self._data[buffer], self.layout.send_offsets[writer]
        if layout.values.is_plain:
            starts = layout.starts[writer] // layout.row_bytes
            spread_runs(rows, which, offsets, starts, data.reshape(-1, layout.width), 0, layout.num_chunks)
            return
        rows = rows if which is None else rows.take(which, axis=0)
        for reader in np.flatnonzero(self.layout.sizes[writer]).tolist():
            self.layout.values.encode(rows[offsets[reader] : offsets[reader + 1]], data[self._run(writer, reader)])

    def view(self, buffers: NDArray[np.int64], reader: int) -> NDArray[Any] | None:
        """See `RunStore`."""
        self._check()
        layout, buffer = self.layout, int(buffers[0])
        if not layout.values.is_plain or buffer < 0 or (buffers != buffer).any():
            return None
        start, end = (at // layout.row_bytes for at in layout.region(reader))
        return self._data[buffer].reshape(-1, layout.width)[start:end]

    def read(self, buffers: NDArray[np.int64], reader: int, out: NDArray[Any]) -> None:
        """See `RunStore`."""
        self._check()
        offsets = self.layout.halo_offsets[reader]
        for lo, hi in stretches(buffers):
            part, buffer = out[offsets[lo] : offsets[hi]], int(buffers[lo])
            if buffer < 0:
                part[:] = 0
            elif len(part):
                stored = self._data[buffer][self._run(lo, reader).start : self._run(hi - 1, reader).stop]
                self.layout.values.decode(stored, part)

    def prefetch(self, buffers: NDArray[np.int64], reader: int, pending: NDArray[np.bool_]) -> None:
        """Nothing to do: the rows are there."""

    def forget(self) -> None:
        """Nothing to do: nothing was prefetched."""

    def fill(self, buffer: int, byte: int) -> None:
        """See `RunStore`."""
        self._check()
        self._data[buffer].view(np.uint8)[:] = byte

    def blend(self, source: int, target: int, shares: NDArray[np.float64]) -> None:
        """See `RunStore`."""
        self._check()
        for writer, reader in runs(self.layout):
            run = self._run(writer, reader)
            self.layout.values.blend(self._data[source][run], self._data[target][run], float(shares[writer]))

    def snapshot(self, buffer: int) -> NDArray[Any]:
        """See `RunStore`."""
        self._check()
        view = self._data[buffer].view()
        view.flags.writeable = False
        return view

    def restore(self, buffer: int, stored: NDArray[Any]) -> None:
        """See `RunStore`."""
        self._check()
        self._data[buffer][:] = stored


def runs(layout: RunLayout) -> Iterable[tuple[int, int]]:
    """All (writer, reader) with rows, as they lie in a buffer."""
    readers, writers = np.nonzero(layout.sizes.T)
    return zip(writers.tolist(), readers.tolist(), strict=True)


def _map_file(path: Path, num_bytes: int) -> NDArray[np.uint8]:
    require_free_disk(path.parent, num_bytes, f"the history {path.name}")
    with DirectFile(path, "write", direct=False) as file:
        file.reserve(num_bytes)
    return np.memmap(path, np.uint8, "r+", shape=(num_bytes,))


def check_size(path: Path, num_bytes: int) -> None:
    """FormatError unless the file of a table is still there in its whole length."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        size = 0
    if size < num_bytes:
        raise FormatError(
            f"{path} has {size} bytes of {num_bytes}: something else cut or deleted it during the run; "
            "keep other programs out of its folder and resume from the last checkpoint"
        )
