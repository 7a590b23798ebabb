"""Checksums of blocks, so that a read verifies the bytes that it uses without reading the whole file.

The data of an `.npy` of ours, from byte 4096 on, is cut into blocks of 1 MiB, the last of which may be shorter; the
xxh3-64 of each lies in a second `.npy`, uint64 [blocks]. Who reads rows reads the blocks that they lie in, whole.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.storage.directio import PAGE
from penstock.storage.errors import FormatError

BLOCK_BYTES = 1 << 20


def sums_name(name: str) -> str:
    """Name of the file with the checksums of an `.npy`."""
    return f"{name.removesuffix('.npy')}.sums.npy"


def block_down(num_bytes: int) -> int:
    """Round down to whole blocks."""
    return num_bytes // BLOCK_BYTES * BLOCK_BYTES


def block_up(num_bytes: int) -> int:
    """Round up to whole blocks."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


class BlockDigest:
    """Takes data front to back, in pieces of any size; `sums` are those of what came."""

    def __init__(self) -> None:
        self._digest, self._filled = xxhash.xxh3_64(), 0
        self._sums: list[int] = []

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        while len(data):
            piece = data[: BLOCK_BYTES - self._filled]
            self._digest.update(piece)
            self._filled += len(piece)
            if self._filled == BLOCK_BYTES:
                self._cut()
            data = data[len(piece) :]

    def _cut(self) -> None:
        self._sums.append(self._digest.intdigest())
        self._digest.reset()
        self._filled = 0

    def sums(self) -> NDArray[np.uint64]:
        """Checksums of all blocks; nothing may come after."""
        if self._filled:
            self._cut()
        return np.array(self._sums, np.uint64)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSums:
    """What the `num_bytes` of data of `path` have to be; `remedy` ends the message of a block that is not."""

    path: Path
    num_bytes: int
    sums: NDArray[np.uint64]
    remedy: str

    def verify(self, start: int, data: NDArray[np.uint8]) -> None:
        """Compare the bytes of the file's data from `start` on; FormatError names the first block that differs.

        `start` is at a block, and `data` goes to the end of one or beyond the end of the file's data.
        """
        view = data.data
        stop = min(self.num_bytes, start + len(view))
        for lo in range(start, stop, BLOCK_BYTES):
            hi = min(lo + BLOCK_BYTES, stop)
            found, wanted = xxhash.xxh3_64_intdigest(view[lo - start : hi - start]), int(self.sums[lo // BLOCK_BYTES])
            if found != wanted:
                raise FormatError(
                    f"{self.path}: bytes {PAGE + lo} to {PAGE + hi} have checksum {found:016x}, wanted {wanted:016x}: "
                    f"the disk damaged them, or the file was replaced; {self.remedy}"
                )


def read_block_sums(sums_path: Path, xxh3: str, path: Path, num_bytes: int, remedy: str) -> BlockSums:
    """Read the checksums of the blocks of `path`, themselves checked against `xxh3`; FormatError where they differ."""
    found = xxhash.xxh3_64_hexdigest(sums_path.read_bytes()) if sums_path.is_file() else "none, for there is no file"
    if found != xxh3:
        raise FormatError(f"{sums_path} has checksum {found}, wanted {xxh3}; {remedy}")
    sums: NDArray[np.uint64] = np.load(sums_path, allow_pickle=False)
    if len(sums) != -(-num_bytes // BLOCK_BYTES):
        raise FormatError(f"{sums_path} has {len(sums)} checksums for {num_bytes} bytes of {path}; {remedy}")
    return BlockSums(path=path, num_bytes=num_bytes, sums=sums, remedy=remedy)
