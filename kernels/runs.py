"""Rounding of rows to bfloat16 and back, for tables that training rewrites every epoch.

A bfloat16 is the upper half of a float32. NumPy has no such type and needs three passes and 64-bit temporaries.
"""

import numpy as np
from numba import njit

_S16, _ONE, _HALF = np.uint32(16), np.uint32(1), np.uint32(0x7FFF)
_MAGNITUDE, _INFINITE, _QUIET = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.uint32(0x00400000)


@njit(cache=True, nogil=True)
def encode_bfloat16(bits, out, lo, hi):  # type: ignore[no-untyped-def]
    """Round float32 `bits` uint32 [n] to nearest, ties to even, into `out` uint16 [n]; NaN stays NaN."""
    for i in range(lo, hi):
        word = bits[i]
        rounded = word + _HALF + ((word >> _S16) & _ONE)
        out[i] = (rounded if (word & _MAGNITUDE) <= _INFINITE else word | _QUIET) >> _S16


@njit(cache=True, nogil=True)
def decode_bfloat16(rows, bits, lo, hi):  # type: ignore[no-untyped-def]
    """Widen `rows` uint16 [n] to float32 `bits` uint32 [n], exactly."""
    for i in range(lo, hi):
        bits[i] = np.uint32(rows[i]) << _S16
