"""Twins of `sample`: the same draws, sets instead of bitmaps, no prefetch."""

import numpy as np

from penstock.kernels.reference_rng import below, draw, fold


def count_edges(indptr, nodes, lo, hi, fanout, replace, starts, degrees, offsets):  # type: ignore[no-untyped-def]
    """Note starts, degrees and counts."""
    for i in range(lo, hi):
        start, end = int(indptr[nodes[i]]), int(indptr[nodes[i] + 1])
        starts[i], degrees[i] = start, end - start
        wanted = end - start if fanout < 0 else fanout
        offsets[i + 1] = wanted if replace and end > start else min(wanted, end - start)


def _floyd(key: int, degree: int, num_draws: int) -> set[int]:
    chosen: set[int] = set()
    for k in range(num_draws):
        last = degree - num_draws + k
        position = below(draw(key, k), last + 1)
        chosen.add(last if position in chosen else position)
    return chosen


def pick_uniform(nodes, slots, keys, starts, degrees, offsets, lo, hi, bitmap, positions):  # type: ignore[no-untyped-def]
    """Pick by Floyd's algorithm, the picked or the left out, whichever are fewer."""
    for i in range(lo, hi):
        degree, count = int(degrees[i]), int(offsets[i + 1] - offsets[i])
        key = fold(keys[slots[i]], nodes[i])
        if count == degree:
            chosen = set(range(degree))
        elif 2 * count > degree:
            chosen = set(range(degree)) - _floyd(key, degree, degree - count)
        else:
            chosen = _floyd(key, degree, count)
        positions[offsets[i] : offsets[i + 1]] = starts[i] + np.array(sorted(chosen), np.int64)


def sort_range(values, lo, hi):  # type: ignore[no-untyped-def]
    """Sort a range in place."""
    values[lo:hi] = np.sort(values[lo:hi])


def pick_replace(nodes, slots, keys, starts, degrees, offsets, lo, hi, positions):  # type: ignore[no-untyped-def]
    """Pick independently."""
    for i in range(lo, hi):
        key = fold(keys[slots[i]], nodes[i])
        picks = [starts[i] + below(draw(key, k), degrees[i]) for k in range(offsets[i + 1] - offsets[i])]
        positions[offsets[i] : offsets[i + 1]] = sorted(picks)
