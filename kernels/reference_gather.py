"""Twins of `gather`, as plainly as NumPy allows."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[Any]
Ints = NDArray[np.int32]


def _rows(
    codes: Ints,
    num_slots: int,
    num_private: int,
    tier: Words,
    extent: Words,
    rows_at: int,
    shared_at: NDArray[np.int64],
    row_words: int,
) -> Words:
    found = np.empty((len(codes), row_words), tier.dtype)
    for n, code in enumerate(codes.tolist()):
        row = code - num_slots
        if code < num_slots:
            found[n] = tier[code * row_words : (code + 1) * row_words]
        elif row < num_private:
            found[n] = extent[rows_at + row * row_words : rows_at + (row + 1) * row_words]
        else:
            at = int(shared_at[row - num_private])
            found[n] = extent[at : at + row_words]
    return found


def gather_float32(
    codes: Ints,
    num_slots: int,
    num_private: int,
    tier: Words,
    extent: Words,
    rows_at: int,
    shared_at: NDArray[np.int64],
    row_words: int,
    out: NDArray[np.uint32],
    lo: int,
    hi: int,
) -> None:
    out[lo:hi] = _rows(codes[lo:hi], num_slots, num_private, tier, extent, rows_at, shared_at, row_words)


def gather_float16(
    codes: Ints,
    num_slots: int,
    num_private: int,
    tier: Words,
    extent: Words,
    rows_at: int,
    shared_at: NDArray[np.int64],
    row_words: int,
    out: NDArray[np.uint32],
    lo: int,
    hi: int,
) -> None:
    rows = _rows(codes[lo:hi], num_slots, num_private, tier, extent, rows_at, shared_at, row_words)
    out[lo:hi] = rows.view(np.float16).astype(np.float32).view(np.uint32)


def gather_bfloat16(
    codes: Ints,
    num_slots: int,
    num_private: int,
    tier: Words,
    extent: Words,
    rows_at: int,
    shared_at: NDArray[np.int64],
    row_words: int,
    out: NDArray[np.uint32],
    lo: int,
    hi: int,
) -> None:
    rows = _rows(codes[lo:hi], num_slots, num_private, tier, extent, rows_at, shared_at, row_words)
    out[lo:hi] = rows.astype(np.uint32) << 16


def gather_int8(
    codes: Ints,
    num_slots: int,
    num_private: int,
    tier: Words,
    extent: Words,
    rows_at: int,
    shared_at: NDArray[np.int64],
    row_words: int,
    out: NDArray[np.uint32],
    lo: int,
    hi: int,
) -> None:
    rows = _rows(codes[lo:hi], num_slots, num_private, tier, extent, rows_at, shared_at, row_words)
    scale = rows[:, -4:].copy().view(np.float32)
    out[lo:hi] = (rows[:, :-4].copy().view(np.int8).astype(np.float32) * scale).view(np.uint32)


def admit_rows(
    rows: Ints,
    slots: Ints,
    num_private: int,
    tier: Words,
    extent: Words,
    rows_at: int,
    shared_at: NDArray[np.int64],
    row_words: int,
) -> None:
    tier.reshape(-1, row_words)[slots] = _rows(rows, 0, num_private, tier, extent, rows_at, shared_at, row_words)


def move_rows(
    tier: Words,
    sources: Ints,
    targets: Ints,
    row_words: int,
    spare: Words,
    origin: Ints,
    readers: Ints,
) -> None:
    table = tier.reshape(-1, row_words)
    table[targets] = table[sources].copy()
