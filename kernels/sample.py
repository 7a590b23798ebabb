"""Pick in-neighbours of destination nodes, each draw a hash of what it is for.

Legend: d in-degree, c picks of a destination, k the fanout. A hop has destinations `nodes` [D]; `slots` int32 [D] says
which item each belongs to, `keys` uint64 [items] is key(seed, epoch, item, hop). A first pass counts, the caller
turns the counts into `offsets` int64 [D+1] by a running sum, a second pass writes the picked positions, which index
`indices`, to `positions[offsets[i]:offsets[i+1]]`, ascending: neighbour lists are then read forwards.

Without replacement we use Floyd's algorithm (Bentley and Floyd, CACM 30(9), 1987): c draws whatever d, or d - c of them
for the neighbours left out where those are fewer. Its set is a bitmap: one word up to d = 64, which covers most nodes
of a power-law graph without a branch that depends on data; sorted insertion up to 32 draws; `bitmap` beyond.
"""

import numpy as np
from numba import njit

from penstock.kernels.bits import count_trailing_zeros
from penstock.kernels.prefetch import prefetch
from penstock.kernels.rng import below, draw, fold

_AHEAD = 16  # destinations; 8 to 48 were equally fast
_WORD = 64
_INSERT = 32  # draws up to which sorted insertion beats scanning a bitmap
_ZERO, _ONE, _ALL = np.uint64(0), np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF)


@njit(cache=True, nogil=True)
def count_edges(indptr, nodes, lo, hi, fanout, replace, starts, degrees, offsets):  # type: ignore[no-untyped-def]
    """Note where the neighbours of `nodes[lo:hi]` lie, and in `offsets[i+1]` how many will be picked of node i.

    `fanout` -1 takes all. `starts`, `degrees` int64 [D].
    """
    for i in range(lo, hi):
        if i + _AHEAD < hi:
            prefetch(indptr, nodes[i + _AHEAD])
        start = indptr[nodes[i]]
        degree = indptr[nodes[i] + 1] - start
        starts[i] = start
        degrees[i] = degree
        if fanout < 0 or (degree < fanout and not replace) or degree == 0:
            offsets[i + 1] = degree
        else:
            offsets[i + 1] = fanout


@njit(cache=True, nogil=True, inline="always")
def _floyd_word(key, degree, num_draws):  # type: ignore[no-untyped-def]
    """Floyd's set of `num_draws` out of `degree` <= 64 as the bits of a word."""
    mask = _ZERO
    for k in range(num_draws):
        last = degree - num_draws + k
        bit = _ONE << np.uint64(below(draw(key, k), last + 1))
        mask |= bit if mask & bit == _ZERO else _ONE << np.uint64(last)
    return mask


@njit(cache=True, nogil=True, inline="always")
def _unpack_word(mask, base, at, positions):  # type: ignore[no-untyped-def]
    """Write `base` plus the index of every set bit, ascending; return the next place."""
    while mask:
        positions[at] = base + count_trailing_zeros(mask)
        at += 1
        mask &= mask - _ONE
    return at


@njit(cache=True, nogil=True, inline="always")
def _floyd_insert(key, degree, num_draws, start, at, positions):  # type: ignore[no-untyped-def]
    """Floyd's set as a sorted list, for few draws out of many."""
    for k in range(num_draws):
        last = degree - num_draws + k
        position = start + below(draw(key, k), last + 1)
        place = at + k
        while place > at and positions[place - 1] > position:
            place -= 1
        if place > at and positions[place - 1] == position:
            positions[at + k] = start + last  # larger than all before it
            continue
        for other in range(at + k, place, -1):
            positions[other] = positions[other - 1]
        positions[place] = position


@njit(cache=True, nogil=True)
def _floyd_bitmap(key, degree, num_draws, flip, start, at, bitmap, positions):  # type: ignore[no-untyped-def]
    """Floyd's set in zeroed `bitmap`, which is zeroed again on the way out; `flip` takes the complement."""
    for k in range(num_draws):
        last = degree - num_draws + k
        position = below(draw(key, k), last + 1)
        if bitmap[position // _WORD] >> np.uint64(position % _WORD) & _ONE:
            position = last
        bitmap[position // _WORD] |= _ONE << np.uint64(position % _WORD)
    for word in range((degree + _WORD - 1) // _WORD):
        mask = bitmap[word]
        bitmap[word] = _ZERO
        if flip:
            mask = ~mask
            if (word + 1) * _WORD > degree:
                mask &= _ALL >> np.uint64((word + 1) * _WORD - degree)
        at = _unpack_word(mask, start + word * _WORD, at, positions)


@njit(cache=True, nogil=True)
def pick_uniform(nodes, slots, keys, starts, degrees, offsets, lo, hi, bitmap, positions):  # type: ignore[no-untyped-def]
    """Pick `offsets[i+1] - offsets[i]` distinct neighbours of each destination, every set equally likely.

    `bitmap` uint64, zero, with a bit for each neighbour of the largest destination of which over 32 are picked.
    """
    for i in range(lo, hi):
        start, degree, at = starts[i], degrees[i], offsets[i]
        count = offsets[i + 1] - at
        if count == degree:
            for k in range(degree):
                positions[at + k] = start + k
            continue
        key = fold(keys[slots[i]], nodes[i])
        flip = 2 * count > degree
        num_draws = degree - count if flip else count
        if degree <= _WORD:
            mask = _floyd_word(key, degree, num_draws)
            if flip:
                mask = ~mask & (_ALL >> np.uint64(_WORD - degree))
            _unpack_word(mask, start, at, positions)
        elif num_draws <= _INSERT and not flip:
            _floyd_insert(key, degree, num_draws, start, at, positions)
        else:
            _floyd_bitmap(key, degree, num_draws, flip, start, at, bitmap, positions)


@njit(cache=True, nogil=True, inline="always")
def sort_range(values, lo, hi):  # type: ignore[no-untyped-def]
    """Sort `values[lo:hi]` in place."""
    if hi - lo > _INSERT:
        values[lo:hi].sort()
        return
    for i in range(lo + 1, hi):
        value = values[i]
        place = i
        while place > lo and values[place - 1] > value:
            values[place] = values[place - 1]
            place -= 1
        values[place] = value


@njit(cache=True, nogil=True)
def pick_replace(nodes, slots, keys, starts, degrees, offsets, lo, hi, positions):  # type: ignore[no-untyped-def]
    """Pick neighbours independently, so that one may come several times."""
    for i in range(lo, hi):
        key = fold(keys[slots[i]], nodes[i])
        for k in range(offsets[i + 1] - offsets[i]):
            positions[offsets[i] + k] = starts[i] + below(draw(key, k), degrees[i])
        sort_range(positions, offsets[i], offsets[i + 1])
