"""The kernels of `pack` in the most obvious NumPy."""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.pack import BFLOAT16, FLOAT16, FLOAT32
from penstock.kernels.reference_runs import encode_bfloat16


def gather_words(
    table: NDArray[Any], first_row: int, row_words: int, ids: NDArray[Any], out: NDArray[Any], lo: int, hi: int
) -> None:
    """Copy rows of a part of a table."""
    out.reshape(-1, row_words)[lo:hi] = table.reshape(-1, row_words)[ids[lo:hi] - first_row]


def scatter_words(
    rows: NDArray[Any], row_words: int, positions: NDArray[Any], out: NDArray[Any], lo: int, hi: int
) -> None:
    """Put rows where they belong."""
    out.reshape(-1, row_words)[positions[lo:hi]] = rows.reshape(-1, row_words)[lo:hi]


def decode_row(row: NDArray[np.uint8], code: int, values: NDArray[np.float32]) -> None:
    """Decode one row."""
    if code == FLOAT32:
        values[:] = row.view("<f4")
    elif code == FLOAT16:
        values[:] = row.view("<f2")
    elif code == BFLOAT16:
        values[:] = (row.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values[:] = row[:-4].view(np.int8) * np.float32(struct.unpack("<f", row[-4:].tobytes())[0])


def encode_row(values: NDArray[np.float32], code: int, row: NDArray[np.uint8]) -> bool:
    """Encode one row."""
    if code == FLOAT32:
        row[:] = values.view(np.uint8)
    elif code == FLOAT16:
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        if not np.isfinite(half).all():
            return False
        row[:] = half.view(np.uint8)
    elif code == BFLOAT16:
        encode_bfloat16(values.view(np.uint32), row.view("<u2"), 0, len(values))  # type: ignore[no-untyped-call]
    else:
        scale = np.abs(values).max(initial=0) / np.float32(127)
        row[:-4] = np.rint(values / (scale if scale > 0 else np.float32(1))).astype(np.int8).view(np.uint8)
        row[-4:] = np.array([scale], "<f4").view(np.uint8)
    return True


def convert_rows(
    rows: NDArray[np.uint8],
    code: int,
    out: NDArray[np.uint8],
    out_code: int,
    width: int,
    scratch: NDArray[np.float32],
    error: NDArray[np.float64],
) -> int:
    """Re-encode rows one by one."""
    for n in range(len(rows)):
        decode_row(rows[n], code, scratch[0])
        if not encode_row(scratch[0], out_code, out[n]):
            return n
        decode_row(out[n], out_code, scratch[1])
        off = np.abs(scratch[1] - scratch[0]).astype(np.float64)
        error[0] = max(error[0], off.max(initial=0))
        for value in off:
            error[1] += value
    return len(rows)
