"""Rows on their way into tables that training rewrites every epoch: spread over runs, or rounded to bfloat16 and back.

A bfloat16 is the upper half of a float32. NumPy has no such type and needs three passes and 64-bit temporaries.
"""

import numpy as np
from numba import njit

from penstock.kernels.bfloat16 import round_bfloat16

_word = np.uint32


@njit(cache=True, nogil=True)
def encode_bfloat16(bits, out, lo, hi):  # type: ignore[no-untyped-def]
    """Round float32 `bits` uint32 [n] into `out` uint16 [n]; see `bfloat16`."""
    source, target = bits[lo:hi], out[lo:hi]  # slices: their indices cannot be negative, so the loop is vectorized
    for i in range(len(source)):
        target[i] = round_bfloat16(source[i])


@njit(cache=True, nogil=True)
def decode_bfloat16(rows, bits, lo, hi):  # type: ignore[no-untyped-def]
    """Widen `rows` uint16 [n] to float32 `bits` uint32 [n], exactly."""
    source, target = rows[lo:hi], bits[lo:hi]
    for i in range(len(source)):
        target[i] = _word(source[i]) << _word(16)


@njit(cache=True, nogil=True)
def spread_runs(rows, which, offsets, starts, out, lo, hi):  # type: ignore[no-untyped-def]
    """Copy row which[n] of `rows` [M, F], for offsets[d] <= n < offsets[d + 1], to rows of `out` from starts[d] on.

    Runs lo <= d < hi, `offsets` int64 [K + 1], `starts` int64 [K]; `which` int64 [offsets[K]] may be None: row n.
    """
    for d in range(lo, hi):
        to = starts[d]
        for n in range(offsets[d], offsets[d + 1]):
            source = rows[n if which is None else which[n]]
            target = out[to]
            for f in range(len(source)):
                target[f] = source[f]
            to += 1
