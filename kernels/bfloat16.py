"""One float32 to bfloat16, for all who encode: features, packs and histories round alike.

Nearest, ties to even; but a finite number never becomes infinite: what IEEE would round up from the largest bfloat16
stays there, 0.4 % off at most, where an infinity would make every sum that it meets NaN. NaN becomes a quiet NaN.
"""

import numpy as np
from numba import njit

_word = np.uint32  # every step is cast to it: Numba would go on in 64 bits, at half the speed
_QUIET, _INFINITE, _SIGNLESS = np.uint32(0x40), np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)


@njit(cache=True, nogil=True, inline="always")
def round_bfloat16(word):  # type: ignore[no-untyped-def]
    """Round the bits of a float32, uint32, to those of a bfloat16 in the lower half of a uint32."""
    magnitude = _word(word & _SIGNLESS)
    upper, lower = _word(word >> _word(16)), _word(word & _word(0xFFFF))
    odd = _word(upper & _word(1))
    up = _word(_word(_word(lower + _word(0x7FFF)) + odd) >> _word(16))
    rounded = _word(upper + up)
    reached = _word(_word(rounded << _word(16)) & _SIGNLESS) == _INFINITE and magnitude < _INFINITE
    kept = _word(rounded - _word(1)) if reached else rounded
    return _word(upper | _QUIET) if magnitude > _INFINITE else kept
