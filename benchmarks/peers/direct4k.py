"""A peer: gather rows one by one, each with a 4 KiB O_DIRECT read, as Ginex and GraphBolt do.

They keep 64 or more requests in flight through io_uring or threads. Here 64 threads each run a compiled loop around
libc's `pread64`, without the GIL, so that the peer waits for the disk and for nothing else.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from penstock.storage.directio import PAGE, aligned_buffer, page_up

QUEUE_DEPTH = 64

_pread = ctypes.CDLL(None, use_errno=True).pread64
_pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
_pread.restype = ctypes.c_ssize_t


@njit(nogil=True)  # not cached: it holds a function's address
def _gather(fd, ids, offset, row_bytes, buffer, out, lo, hi):  # type: ignore[no-untyped-def]
    """Read rows lo <= n < hi; returns how many reads came short."""
    short = 0
    for n in range(lo, hi):
        start = offset + np.int64(ids[n]) * row_bytes
        page = start // 4096 * 4096
        wanted = (start + row_bytes - page + 4095) // 4096 * 4096
        if _pread(fd, buffer.ctypes.data, wanted, page) < start + row_bytes - page:
            short += 1
        at = start - page
        for byte in range(row_bytes):
            out[n, byte] = buffer[at + byte]
    return short


class Direct4k:
    """An open table of rows; `gather` keeps `QUEUE_DEPTH` reads in flight. A context manager."""

    def __init__(self, path: Path, offset: int, row_bytes: int) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._offset, self._row_bytes = offset, row_bytes
        self._buffers = [aligned_buffer(page_up(row_bytes) + PAGE) for _ in range(QUEUE_DEPTH)]
        self._pool = ThreadPoolExecutor(QUEUE_DEPTH)

    def __enter__(self) -> "Direct4k":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._pool.shutdown()
        os.close(self._fd)

    def gather(self, ids: NDArray[Any], out: NDArray[np.uint8]) -> None:
        """Read the rows of `ids` into `out` uint8 [n, row_bytes]. RuntimeError where a read came short."""
        cuts = np.linspace(0, len(ids), QUEUE_DEPTH + 1).astype(int).tolist()
        parts = [
            self._pool.submit(_gather, self._fd, ids, self._offset, self._row_bytes, buffer, out, lo, hi)
            for buffer, lo, hi in zip(self._buffers, cuts, cuts[1:], strict=False)
        ]
        if short := sum(part.result() for part in parts):
            raise RuntimeError(f"{short} of {len(ids)} reads of 4 KiB came short")
