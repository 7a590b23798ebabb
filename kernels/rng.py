"""Counter-based randomness: every draw is a hash of what it is for, so its value depends on nothing else.

`mix` is the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, section 4). Keys are folded in one by one:
key(seed, epoch, item, hop, node), and the k-th draw hashes key + k * GOLDEN. The same item is drawn identically on any
number of threads, in any order, in one pass or hop by hop.
"""

import numpy as np
from numba import njit

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S32, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32), np.uint64(11)
_LOW = np.uint64(0xFFFFFFFF)
_UNIT = 1.0 / (1 << 53)


@njit(cache=True, nogil=True, inline="always")
def mix(x):  # type: ignore[no-untyped-def]
    """Hash uint64 -> uint64, a bijection."""
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


@njit(cache=True, nogil=True, inline="always")
def fold(key, value):  # type: ignore[no-untyped-def]
    """Derive a key from a key (uint64) and an integer."""
    return mix(key + GOLDEN + np.uint64(value) * _M2)


@njit(cache=True, nogil=True, inline="always")
def draw(key, k):  # type: ignore[no-untyped-def]
    """The k-th uint64 of a key."""
    return mix(key + (np.uint64(k) + np.uint64(1)) * GOLDEN)


@njit(cache=True, nogil=True, inline="always")
def below(bits, n):  # type: ignore[no-untyped-def]
    """Scale 64 random bits to [0, n), n < 2^32, by multiply and shift; bias below n / 2^32."""
    return np.int64(((bits >> _S32) * np.uint64(n)) >> _S32)


@njit(cache=True, nogil=True, inline="always")
def unit(bits):  # type: ignore[no-untyped-def]
    """Scale 64 random bits to a float64 in (0, 1)."""
    return (np.float64(bits >> _S11) + 0.5) * _UNIT
