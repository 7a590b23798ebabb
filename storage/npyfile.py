"""`.npy` files whose header fills one page.

NumPy pads a header with spaces; we pad it to 4096 bytes instead of 64. Every tool that reads `.npy` reads these, and
the data starts on a page, so that O_DIRECT reads of it land on pages. Byte layout: magic and version (8), header length
(uint16), Python dict literal, spaces, newline at byte 4095, then the array in C order, little-endian.
"""

import mmap
import os
import re
import struct
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.storage.blocks import BlockDigest, sums_name
from penstock.storage.directio import PAGE
from penstock.storage.errors import FormatError, full_disk_is_clear
from penstock.storage.manifest import FileEntry

_HEADER = re.compile(rb"\{'descr': '([<|]\w\d+)', 'fortran_order': False, 'shape': \(((?:\d+,? ?)*)\), ?\}\s*")


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Make the 4096-byte header of a little-endian C-order array."""
    descr = np.lib.format.dtype_to_descr(dtype.newbyteorder("<"))
    literal = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    text = literal.ljust(PAGE - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin1")


def _read_header(path: Path) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Dtype, shape and offset of the data.

    NumPy reads the header with `ast.literal_eval`, whose recursion counter all threads of CPython 3.11 share: two
    threads that map files at once can end with "AST constructor recursion depth mismatch".
    """
    with open(path, "rb") as file:
        head = file.read(10)
        if head[:8] != b"\x93NUMPY\x01\x00" or len(head) < 10:
            raise ValueError("it has no header of .npy version 1.0")
        (length,) = struct.unpack("<H", head[8:])
        found = _HEADER.fullmatch(file.read(length))
    if found is None:
        raise ValueError("its header is not one of a little-endian array in C order")
    shape = tuple(int(size) for size in found[2].split(b",") if size.strip())
    return np.dtype(found[1].decode()), shape, 10 + length


def open_npy(path: Path) -> NDArray[Any]:
    """Map an array read-only. FormatError where the file is missing, damaged or shorter than its header says."""
    try:
        dtype, shape, offset = _read_header(path)
        return np.memmap(path, dtype, "r", offset, shape)
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(f"{path} cannot be mapped as .npy ({error}); rebuild its folder") from error


def read_npy(path: Path, xxh3: str, remedy: str) -> NDArray[Any]:
    """Read a small array into memory; FormatError, ending with `remedy`, where its file does not have this checksum."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    if (found := xxhash.xxh3_64_hexdigest(data)) != xxh3:
        raise FormatError(
            f"{path} has checksum {found}, wanted {xxh3}: the disk damaged it, or it was replaced; {remedy}"
        )
    array: NDArray[Any] = np.load(BytesIO(data), allow_pickle=False)
    return array


class NpyWriter:
    """Write one array of known shape front to back, and checksum it on the way.

    A context manager: leaving it without an error checks that all rows came, syncs, and makes `entry` available.
    With `blocks` it also writes the checksums of blocks (see `blocks`) beside the file; `sums_entry` is theirs.
    Not safe for several threads.
    """

    def __init__(self, path: Path, dtype: Any, shape: tuple[int, ...], *, blocks: bool = False) -> None:
        self.path, self.dtype, self.shape = path, np.dtype(dtype), tuple(int(n) for n in shape)
        self._rows = 0
        self._digest = xxhash.xxh3_64()
        self._blocks = BlockDigest() if blocks else None
        self.entry: FileEntry | None = None
        self.sums_entry: FileEntry | None = None

    def __enter__(self) -> "NpyWriter":
        with full_disk_is_clear(self.path):
            self._file = open(self.path, "wb", buffering=0)
            self._write(npy_header(self.dtype, self.shape))
        return self

    def append(self, rows: NDArray[Any]) -> None:
        """Add rows [n, *shape[1:]]; they are cast to the file's dtype only if that loses nothing of their kind."""
        rows = np.ascontiguousarray(rows.astype(self.dtype, casting="same_kind", copy=False))
        if rows.shape[1:] != self.shape[1:]:
            raise ValueError(f"rows of shape {rows.shape[1:]} do not belong into {self.path} of {self.shape[1:]}")
        self._rows += rows.shape[0]
        data = rows.data.cast("B") if rows.size else memoryview(b"")
        if self._blocks is not None:
            self._blocks.update(data)
        self._write(data)

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        view = memoryview(data)
        with full_disk_is_clear(self.path):
            while view:  # a raw write may be short
                view = view[self._file.write(view) :]

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is not None:
                return
            if self._rows != self.shape[0]:
                raise FormatError(f"{self.path} got {self._rows} rows of {self.shape[0]}")
            with full_disk_is_clear(self.path):
                os.fsync(self._file.fileno())
            self.entry = FileEntry(
                name=self.path.name,
                bytes=self._file.tell(),
                dtype=self.dtype.name,
                shape=self.shape,
                xxh3=str(self._digest.hexdigest()),
            )
            if self._blocks is not None:
                self.sums_entry = write_npy(self.path.with_name(sums_name(self.path.name)), self._blocks.sums())
        finally:
            self._file.close()


def write_npy(path: Path, array: NDArray[Any]) -> FileEntry:
    """Write a whole array and return its manifest entry."""
    with NpyWriter(path, array.dtype, array.shape) as writer:
        writer.append(array)
    assert writer.entry is not None
    return writer.entry


def npy_entry(path: Path, checksum: str) -> FileEntry:
    """Make the manifest entry of a finished `.npy` whose checksum is already known."""
    array = open_npy(path)
    return FileEntry(
        name=path.name, bytes=path.stat().st_size, dtype=array.dtype.name, shape=array.shape, xxh3=checksum
    )


def drop_pages(array: NDArray[Any]) -> None:
    """Let the kernel forget the pages of a mapped array, so that streaming through it does not count as memory."""
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "_mmap", None) or getattr(base, "base", None)
    if base is not None:
        base.madvise(mmap.MADV_DONTNEED)
