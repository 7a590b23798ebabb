"""A peer: index a memory-mapped feature table, as PyG users with `np.memmap` do; the kernel's page cache decides.

Before each timed pass the table's pages are dropped from the cache (`posix_fadvise`), which the kernel may do only
partly, and nothing stops it from caching the table while the pass runs; so the figure is a lower bound of the trouble.
"""

import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray


class MmapFeatures:
    """A mapped table of float32 rows; a context manager."""

    def __init__(self, path: Path, offset: int, width: int) -> None:
        self._file = open(path, "rb")
        self._map = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)
        self._rows = np.frombuffer(self._map, "<f4", offset=offset).reshape(-1, width)

    def __enter__(self) -> "MmapFeatures":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        del self._rows
        self._map.close()
        self._file.close()

    def drop_cache(self) -> None:
        """Ask the kernel to forget the table."""
        self._map.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def gather(self, ids: NDArray[Any], out: NDArray[np.float32]) -> None:
        """Copy rows into `out` float32 [n, width]."""
        np.take(self._rows, ids, axis=0, out=out, mode="clip")  # the default mode would gather into a copy first
