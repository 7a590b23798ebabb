"""The host tier, and what every tier can do.

A tier holds rows in slots and decides nothing: which node sits in which slot is the plan's business. Its content is
mutable on purpose and belongs to one thread. The device tier lives in `penstock.engine.device_tier`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.kernels import gather
from penstock.kernels.parallel import parallel_for
from penstock.storage.pack import Extent
from penstock.storage.rows import RowDtype, RowFormat, decode_rows
from penstock.storage.table import RowSource

_WORDS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16, "int8": np.uint8}
_KERNELS: dict[RowDtype, Callable[..., None]] = {
    "float32": gather.gather_float32,
    "float16": gather.gather_float16,
    "bfloat16": gather.gather_bfloat16,
    "int8": gather.gather_int8,
}
_FILL_BYTES = 16 << 20


class Tier(Protocol):
    """Slots of rows of one row format."""

    num_slots: int
    row_format: RowFormat

    def fill(self, slots: NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
        """Put encoded `rows` uint8 [n, row_bytes] into distinct `slots`; ValueError where a slot does not exist."""

    def read(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Decode the rows in `slots` into a fresh array; ValueError where a slot does not exist."""


def check_slots(slots: NDArray[Any], num_slots: int) -> None:
    """ValueError unless all slots are in [0, num_slots)."""
    if slots.size and (int(slots.min()) < 0 or int(slots.max()) >= num_slots):
        raise ValueError(f"slots {int(slots.min())}..{int(slots.max())} are not all within the tier's {num_slots}")


def restore(tier: Tier, residents: NDArray[Any], source: RowSource) -> int:
    """Fill the tier: slot k gets node `residents[k]`, or nothing where it is negative.

    Rows are read in node order, and in pieces, so that memory stays bounded. Returns the bytes read.
    """
    slots = np.flatnonzero(residents >= 0)
    slots = slots[np.argsort(residents[slots], kind="stable")]
    ids = np.asarray(residents)[slots]
    piece = max(1, _FILL_BYTES // tier.row_format.row_bytes)
    rows = np.empty((min(piece, len(ids)), tier.row_format.row_bytes), np.uint8)
    with source.open_rows(tier.row_format) as table:
        for lo in range(0, len(ids), piece):
            hi = min(lo + piece, len(ids))
            table.gather(ids[lo:hi], rows[: hi - lo])
            tier.fill(slots[lo:hi], rows[: hi - lo])
        return table.bytes_read


def row_words(row_format: RowFormat) -> int:
    """Words of a row, as the gather kernels count them."""
    return row_format.row_bytes // np.dtype(_WORDS[row_format.dtype]).itemsize


def as_words(raw: NDArray[np.uint8], row_format: RowFormat) -> NDArray[Any]:
    """View bytes as the words that the gather kernels want; a tail of less than a word is left out."""
    size = np.dtype(_WORDS[row_format.dtype]).itemsize
    return raw[: len(raw) // size * size].view(_WORDS[row_format.dtype])


def gather_table(
    table: NDArray[Any], codes: NDArray[Any], row_format: RowFormat, out: NDArray[np.float32], threads: int
) -> None:
    """Decode rows `codes` of a flat array of words (see `as_words`) into `out` float32 [M, width]."""
    kernel, bits, words = _KERNELS[row_format.dtype], out.view(np.uint32), row_words(row_format)
    num_rows, none = len(table) // max(1, words), np.empty(0, np.int64)
    nothing = table[:0]

    def part(lo: int, hi: int) -> None:
        kernel(codes, num_rows, 0, table, nothing, 0, none, words, bits, lo, hi)

    parallel_for(part, len(codes), threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlace:
    """Where an extent's rows lie, in words: private row r at rows_at + r * row_words, shared row k at shared_at[k]."""

    words: NDArray[Any]
    num_private: int
    rows_at: int
    shared_at: NDArray[np.int64]


def place_rows(buffer: NDArray[np.uint8], extent: Extent, row_format: RowFormat) -> RowPlace:
    """Locate an extent's rows in the buffer that starts with the extent and goes on with its shared pages."""
    words = as_words(buffer, row_format)
    size = words.dtype.itemsize
    return RowPlace(
        words=words,
        num_private=extent.head.num_rows,
        rows_at=extent.head.rows_offset // size,
        shared_at=(extent.head.extent_bytes + extent.shared_offsets) // size,
    )


class HostTier:
    """Rows in host memory, as the bytes that the packs hold."""

    def __init__(self, num_slots: int, row_format: RowFormat) -> None:
        self.num_slots, self.row_format = num_slots, row_format
        self._row_words = row_words(row_format)
        # NumPy asks for huge pages where an array is large, which random rows need; an own mapping would not.
        self._words: NDArray[Any] = np.zeros(num_slots * self._row_words, _WORDS[row_format.dtype])

    @property
    def num_bytes(self) -> int:
        """Memory of the slots."""
        return self._words.nbytes

    def fill(self, slots: NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
        """See `Tier.fill`."""
        check_slots(slots, self.num_slots)
        self._table()[slots] = as_words(np.ascontiguousarray(rows).reshape(-1), self.row_format).reshape(
            len(slots), self._row_words
        )

    def read(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Tier.read`."""
        check_slots(slots, self.num_slots)
        raw = np.ascontiguousarray(self._table()[slots])
        return decode_rows(raw.view(np.uint8).reshape(len(slots), self.row_format.row_bytes), self.row_format)

    def _table(self) -> NDArray[Any]:
        return self._words.reshape(self.num_slots, self._row_words)

    def gather(self, codes: NDArray[np.int32], place: RowPlace, out: NDArray[np.float32], threads: int) -> None:
        """Decode rows into `out` float32 [M, width]: code c < num_slots is slot c, else extent row c - num_slots."""
        kernel, bits = _KERNELS[self.row_format.dtype], out.view(np.uint32)

        def part(lo: int, hi: int) -> None:
            kernel(
                codes,
                self.num_slots,
                place.num_private,
                self._words,
                place.words,
                place.rows_at,
                place.shared_at,
                self._row_words,
                bits,
                lo,
                hi,
            )

        parallel_for(part, len(codes), threads)

    def admit(self, rows: NDArray[np.int32], slots: NDArray[np.int32], place: RowPlace) -> None:
        """Copy extent rows into slots."""
        check_slots(slots, self.num_slots)
        gather.admit_rows(
            rows, slots, place.num_private, self._words, place.words, place.rows_at, place.shared_at, self._row_words
        )

    def wrap(self, moves: NDArray[np.int32]) -> None:
        """Move the row of slot moves[0, k] to slot moves[1, k], all at once, in place."""
        check_slots(moves, self.num_slots)
        spare = np.empty(self._row_words, self._words.dtype)
        origin, readers = np.full(self.num_slots, -1, np.int32), np.zeros(self.num_slots, np.int32)
        sources, targets = np.ascontiguousarray(moves[0]), np.ascontiguousarray(moves[1])
        gather.move_rows(self._words, sources, targets, self._row_words, spare, origin, readers)
