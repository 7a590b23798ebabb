"""Twins of `runs`."""

import numpy as np


def encode_bfloat16(bits, out, lo, hi):  # type: ignore[no-untyped-def]
    """Round to nearest, ties to even, but never from finite to infinite; NaN stays NaN."""
    wide = bits[lo:hi].astype(np.uint64)
    values = bits[lo:hi].view(np.float32)
    rounded = wide + 0x7FFF + ((wide >> 16) & 1)
    largest = (wide & 0x80000000) | 0x7F7F0000
    rounded = np.where(np.isfinite(values) & (rounded & 0x7FFFFFFF >= 0x7F800000), largest, rounded)
    out[lo:hi] = np.where(np.isnan(values), wide | 0x00400000, rounded) >> 16


def decode_bfloat16(rows, bits, lo, hi):  # type: ignore[no-untyped-def]
    """Widen to float32."""
    bits[lo:hi] = rows[lo:hi].astype(np.uint32) << 16


def spread_runs(rows, which, offsets, starts, out, lo, hi):  # type: ignore[no-untyped-def]
    """Copy runs of rows, one after the other."""
    for d in range(lo, hi):
        run = np.arange(offsets[d], offsets[d + 1])
        out[starts[d] : starts[d] + len(run)] = rows[run if which is None else which[run]]
