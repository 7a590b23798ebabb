"""Aligned reads and writes past the page cache.

O_DIRECT wants file offset, length and memory aligned to the logical block of the device; 4096 suits all. Where a file
system refuses it, the same calls go through the page cache, and the log says so once per file system.
"""

import errno
import logging
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from penstock.storage.errors import FormatError, full_disk_is_clear

logger = logging.getLogger(__name__)

PAGE = 4096
IO_BYTES = 4 << 20  # one system call; 1 to 8 MiB were equally fast on the reference machine, 64 KiB was half
_HUGE_BYTES = 4 << 20
_REFUSED_ON: set[int] = set()


def page_up(num_bytes: int) -> int:
    """Round up to whole pages."""
    return -(-num_bytes // PAGE) * PAGE


def page_down(num_bytes: int) -> int:
    """Round down to whole pages."""
    return num_bytes // PAGE * PAGE


def aligned_buffer(num_bytes: int) -> NDArray[np.uint8]:
    """Allocate zeroed, page-aligned memory of at least `num_bytes`, in whole pages; freed with the last view of it.

    Large buffers ask for huge pages: direct I/O pins fewer of them, and rows gathered from them miss the TLB less.
    """
    memory = mmap.mmap(-1, max(PAGE, page_up(num_bytes)))
    if len(memory) >= _HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            logger.debug("no huge pages here")
    return np.frombuffer(memory, dtype=np.uint8)


class DirectFile:
    """One open file for aligned, exact transfers at given offsets; a context manager.

    `direct` tells whether the page cache is bypassed. Transfers are safe from several threads.
    """

    def __init__(self, path: Path, mode: Literal["read", "write"], *, direct: bool = True) -> None:
        self.path, self.direct = path, direct
        self._flags = os.O_RDONLY if mode == "read" else os.O_RDWR | os.O_CREAT
        self._fd = self._open()
        self.num_bytes = os.fstat(self._fd).st_size

    def _open(self) -> int:
        with full_disk_is_clear(self.path):
            if self.direct:
                try:
                    return os.open(self.path, self._flags | os.O_DIRECT, 0o644)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._say_refused()
            return os.open(self.path, self._flags, 0o644)

    def _say_refused(self) -> None:
        self.direct = False
        device = os.stat(self.path.parent).st_dev
        if device not in _REFUSED_ON:
            _REFUSED_ON.add(device)
            logger.warning("the file system of %s refuses O_DIRECT; its files go through the page cache", self.path)

    def _fall_back(self) -> None:
        """Reopen through the page cache, after the first transfer was refused."""
        self._say_refused()
        fd = self._open()
        os.dup2(fd, self._fd)
        os.close(fd)

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, buffer: NDArray[np.uint8], offset: int, num_bytes: int) -> None:
        """Fill `buffer[:num_bytes]` from `offset`; both must be page multiples and the buffer page aligned.

        A read that crosses the end of the file leaves the rest of the buffer as it was, but only the last page of
        the file may be cut. FormatError if the file ends before that page.
        """
        view = buffer.data[:num_bytes]
        done = 0
        while done < num_bytes:
            try:
                count = os.preadv(self._fd, [view[done : done + IO_BYTES]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and self.direct:
                    self._fall_back()
                    continue
                raise
            done += count
            if count == 0 or (count % PAGE and self.direct):
                break  # end of file; a direct read may not go on from an unaligned offset
        if done < num_bytes - PAGE + 1:
            raise FormatError(
                f"{self.path}: read {done} of {num_bytes} bytes at offset {offset}: the file is truncated; "
                "restore it or rebuild its folder"
            )

    def write_from(self, buffer: NDArray[np.uint8], offset: int, num_bytes: int) -> None:
        """Write `buffer[:num_bytes]` at `offset`; alignment as for reads. DoesNotFit where the disk is full."""
        view = buffer.data[:num_bytes]
        done = 0
        with full_disk_is_clear(self.path):
            while done < num_bytes:
                try:
                    done += os.pwritev(self._fd, [view[done : done + IO_BYTES]], offset + done)
                except OSError as error:
                    if error.errno == errno.EINVAL and self.direct:
                        self._fall_back()
                        continue
                    raise

    def reserve(self, num_bytes: int) -> None:
        """Allocate the file's blocks now, so that a full disk is found before the work and not in its middle."""
        with full_disk_is_clear(self.path):
            os.posix_fallocate(self._fd, 0, num_bytes)

    def truncate(self, num_bytes: int) -> None:
        """Cut or extend the file."""
        with full_disk_is_clear(self.path):
            os.ftruncate(self._fd, num_bytes)

    def sync(self) -> None:
        """Make all writes durable."""
        with full_disk_is_clear(self.path):
            os.fsync(self._fd)
