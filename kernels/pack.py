"""Packing: gather rows from a part of the feature table, change their format, put sorted rows into another order.

All arrays are bytes, little-endian, and rows are strings of bytes at any offset; the compiler turns the byte arithmetic
into plain loads and stores. Codes of row formats: 0 float32, 1 float16, 2 bfloat16, 3 int8 with a float32 scale after
the last value (see `storage.rows`, whose encoding these kernels repeat bit for bit).
"""

import numpy as np
from numba import njit

from penstock.kernels.bfloat16 import round_bfloat16

FLOAT32, FLOAT16, BFLOAT16, INT8 = 0, 1, 2, 3
_HALF_MAX = np.float32(65520.0)  # from here on float16 rounds to infinity


@njit(cache=True, nogil=True)
def gather_words(table, first_row, row_words, ids, out, lo, hi):  # type: ignore[no-untyped-def]
    """Copy rows `ids[lo:hi]` to rows lo..hi-1 of `out`; `table` holds the rows from `first_row` on.

    `table` and `out` are flat and of the same word type, `row_words` words per row; ids ascend, so reads do.
    """
    for n in range(lo, hi):
        start = (np.int64(ids[n]) - first_row) * row_words
        to = n * row_words
        for word in range(row_words):
            out[to + word] = table[start + word]


@njit(cache=True, nogil=True)
def scatter_words(rows, row_words, positions, out, lo, hi):  # type: ignore[no-untyped-def]
    """Copy rows lo..hi-1 of `rows` to rows `positions[lo:hi]` of `out`, both flat and of the same word type."""
    for n in range(lo, hi):
        start, to = n * row_words, np.int64(positions[n]) * row_words
        for word in range(row_words):
            out[to + word] = rows[start + word]


@njit(cache=True, nogil=True, inline="always")
def _half_to_float(half):  # type: ignore[no-untyped-def]
    sign = np.float32(-1.0) if half & 0x8000 else np.float32(1.0)
    exponent, fraction = (half >> 10) & 31, half & 1023
    if exponent == 0:
        return sign * np.float32(fraction) * np.float32(2.0**-24)
    if exponent == 31:
        return sign * np.float32(np.inf) if fraction == 0 else np.float32(np.nan)
    # the power of two is exact, and so is the product
    return sign * np.float32(1024 + fraction) * np.float32(2.0 ** (exponent - 25))


@njit(cache=True, nogil=True, inline="always")
def _float_to_half(bits):  # type: ignore[no-untyped-def]
    """Round to nearest even; the magnitude is below 65520."""
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if magnitude < 0x38800000:  # below 2^-14: a subnormal half, a multiple of 2^-24
        shift = 126 - (magnitude >> 23)
        if shift > 24:
            return sign  # at most 2^-25, and a tie goes to the even 0
        whole = (magnitude & 0x7FFFFF) | 0x800000
        half, rest, tie = whole >> shift, whole & ((1 << shift) - 1), 1 << (shift - 1)
        return sign | (half + (1 if rest > tie or (rest == tie and half & 1) else 0))
    rounded = magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)
    return sign | (rounded >> 13)


@njit(cache=True, nogil=True, inline="always")
def _word(rows, at):  # type: ignore[no-untyped-def]
    return (
        np.uint32(rows[at])
        | np.uint32(rows[at + 1]) << np.uint32(8)
        | np.uint32(rows[at + 2]) << np.uint32(16)
        | np.uint32(rows[at + 3]) << np.uint32(24)
    )


@njit(cache=True, nogil=True, inline="always")
def _put_word(out, at, bits):  # type: ignore[no-untyped-def]
    out[at] = bits & 255
    out[at + 1] = (bits >> 8) & 255
    out[at + 2] = (bits >> 16) & 255
    out[at + 3] = (bits >> 24) & 255


@njit(cache=True, nogil=True)
def decode_row(row, code, values):  # type: ignore[no-untyped-def]
    """Decode one row of bytes into float32 `values` [F]."""
    bits = values.view(np.uint32)
    width = len(values)
    if code == FLOAT32:
        for f in range(width):
            bits[f] = _word(row, 4 * f)
    elif code == FLOAT16:
        for f in range(width):
            values[f] = _half_to_float(np.int32(row[2 * f]) | np.int32(row[2 * f + 1]) << 8)
    elif code == BFLOAT16:
        for f in range(width):
            bits[f] = (np.uint32(row[2 * f]) | np.uint32(row[2 * f + 1]) << np.uint32(8)) << np.uint32(16)
    else:
        bits[0] = _word(row, width)
        scale = values[0]
        for f in range(width):
            values[f] = np.float32(np.int8(row[f])) * scale


@njit(cache=True, nogil=True)
def encode_row(values, code, row):  # type: ignore[no-untyped-def]
    """Encode float32 `values` [F] into one row of bytes; False where a value exceeds float16."""
    bits = values.view(np.uint32)
    width = len(values)
    if code == FLOAT32:
        for f in range(width):
            _put_word(row, 4 * f, bits[f])
    elif code == FLOAT16:
        for f in range(width):
            if not abs(values[f]) < _HALF_MAX:
                return False
            half = _float_to_half(np.int64(bits[f]))
            row[2 * f], row[2 * f + 1] = half & 255, half >> 8
    elif code == BFLOAT16:
        for f in range(width):
            rounded = round_bfloat16(bits[f])
            row[2 * f], row[2 * f + 1] = rounded & np.uint32(255), rounded >> np.uint32(8)
    else:
        largest = np.float32(0.0)
        for f in range(width):
            largest = max(largest, abs(values[f]))
        scale = largest / np.float32(127.0)
        safe = scale if scale > 0 else np.float32(1.0)
        for f in range(width):
            row[f] = np.uint8(np.int8(np.rint(values[f] / safe)))
        _put_word(row, width, np.float32(scale).view(np.uint32))
    return True


@njit(cache=True, nogil=True)
def convert_rows(rows, code, out, out_code, width, scratch, error):  # type: ignore[no-untyped-def]
    """Re-encode `rows` uint8 [n, row_bytes] into `out` uint8 [n, other row_bytes]; n, or the first row that overflows.

    `scratch` float32 [2, F]. `error` float64 [2] takes the largest absolute error so far and adds up all of them.
    """
    for n in range(len(rows)):
        decode_row(rows[n], code, scratch[0])
        if not encode_row(scratch[0], out_code, out[n]):
            return n
        decode_row(out[n], out_code, scratch[1])
        for f in range(width):
            off = np.float64(abs(scratch[1, f] - scratch[0, f]))
            error[1] += off
            if off > error[0]:
                error[0] = off
    return len(rows)
