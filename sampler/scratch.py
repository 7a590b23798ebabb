"""Arrays of a plan, one per item, in files of a scratch folder: a plan is larger than memory.

Files are read and written at offsets and not mapped, so that they never count as memory of ours.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.storage.errors import FormatError, full_disk_is_clear


class ItemArrays:
    """One one-dimensional array per item. With `counts` items may be written in any order, else they are appended.

    A context manager; leaving it closes the file and keeps it. Not safe for several threads.
    """

    def __init__(self, path: Path, dtype: Any, num_items: int, counts: NDArray[np.int64] | None = None) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.counts = np.zeros(num_items, np.int64)
        self._offsets = np.zeros(num_items, np.int64)
        self._end = 0
        if counts is not None:
            ends = np.cumsum(counts)
            self.counts[:], self._offsets[:] = counts, ends - counts
            self._end = int(ends[-1]) if len(ends) else 0
        self._fixed = counts is not None
        with full_disk_is_clear(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    def __enter__(self) -> "ItemArrays":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def delete(self) -> None:
        """Close and remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)

    @property
    def num_bytes(self) -> int:
        """Size of all arrays so far."""
        return self._end * int(self.dtype.itemsize)

    def put(self, item: int, values: NDArray[Any]) -> None:
        """Keep the array of an item; appended unless its place is known, in which case its length must be as said."""
        if not self._fixed and self.counts[item] != len(values):
            self.counts[item], self._offsets[item] = len(values), self._end
            self._end += len(values)
        assert self.counts[item] == len(values)
        view = np.ascontiguousarray(values, dtype=self.dtype).data.cast("B") if len(values) else memoryview(b"")
        offset = int(self._offsets[item]) * self.dtype.itemsize
        with full_disk_is_clear(self.path):
            while view:
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count

    def get(self, item: int, lo: int = 0, hi: int | None = None) -> NDArray[Any]:
        """Read entries lo..hi-1 of an item's array, all by default; read-only."""
        hi = int(self.counts[item]) if hi is None else hi
        size = self.dtype.itemsize
        data = os.pread(self._fd, (hi - lo) * size, (int(self._offsets[item]) + lo) * size)
        if len(data) != (hi - lo) * size:
            raise FormatError(f"{self.path} is cut at item {item}; delete the scratch folder and plan again")
        return np.frombuffer(data, self.dtype)
