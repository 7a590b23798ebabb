"""Twins of `rng` in Python's integers, modulo 2^64."""

from typing import SupportsInt

_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 1 << 64


def mix(x: SupportsInt) -> int:
    """Hash a word."""
    value = int(x)
    value = (value ^ (value >> 30)) * _M1 % _WORD
    value = (value ^ (value >> 27)) * _M2 % _WORD
    return value ^ (value >> 31)


def fold(key: SupportsInt, value: SupportsInt) -> int:
    """Derive a key."""
    return mix((int(key) + _GOLDEN + int(value) * _M2) % _WORD)


def draw(key: SupportsInt, k: SupportsInt) -> int:
    """The k-th word of a key."""
    return mix((int(key) + (int(k) + 1) * _GOLDEN) % _WORD)


def below(bits: SupportsInt, n: SupportsInt) -> int:
    """Scale a word to [0, n)."""
    return ((int(bits) >> 32) * int(n)) >> 32


def unit(bits: SupportsInt) -> float:
    """Scale a word to a float64 in (0, 1)."""
    return ((int(bits) >> 11) + 0.5) / 2**53
