"""Twins of `sample_weighted`: sort all candidates by (key, position) and cut."""

import numpy as np

from penstock.kernels.reference_rng import draw, fold, unit
from penstock.kernels.reference_weigh import copy_number


def count_weighted(indptr, weights, nodes, lo, hi, fanout, replace, starts, degrees, offsets):  # type: ignore[no-untyped-def]
    """Note starts, degrees and counts of positive edges; return the first position of a wrong weight, else -1."""
    for i in range(lo, hi):
        start, end = int(indptr[nodes[i]]), int(indptr[nodes[i] + 1])
        starts[i], degrees[i] = start, end - start
        wrong = np.flatnonzero(~(np.isfinite(weights[start:end]) & (weights[start:end] >= 0)))
        if len(wrong):
            return start + int(wrong[0])
        positive = int((weights[start:end] > 0).sum())
        wanted = positive if fanout < 0 else fanout
        offsets[i + 1] = wanted if replace and positive else min(wanted, positive)
    return -1


def pick_positive(weights, starts, degrees, offsets, lo, hi, positions):  # type: ignore[no-untyped-def]
    """Pick all of positive weight."""
    for i in range(lo, hi):
        around = weights[starts[i] : starts[i] + degrees[i]]
        positions[offsets[i] : offsets[i + 1]] = starts[i] + np.flatnonzero(around > 0)


def _smallest(candidates: list[tuple[float, int]], count: int) -> list[int]:
    return sorted(position for _, position in sorted(candidates)[:count])


def pick_weighted(weights, nodes, slots, keys, starts, degrees, offsets, lo, hi, heap, positions):  # type: ignore[no-untyped-def]
    """Pick the smallest -log(u)/w, one u per edge."""
    for i in range(lo, hi):
        key = fold(keys[slots[i]], nodes[i])
        edges = [(k, int(starts[i]) + k) for k in range(degrees[i])]
        keyed = [(-np.log(unit(draw(key, k))) / weights[p], p) for k, p in edges if weights[p] > 0]
        positions[offsets[i] : offsets[i + 1]] = _smallest(keyed, offsets[i + 1] - offsets[i])


def pick_labor(indices, nodes, slots, keys, starts, degrees, offsets, lo, hi, heap, positions):  # type: ignore[no-untyped-def]
    """Pick the smallest u, one u per neighbour."""
    for i in range(lo, hi):
        edges = range(int(starts[i]), int(starts[i] + degrees[i]))
        keyed = [(unit(draw(fold(keys[slots[i]], indices[p]), copy_number(indices, starts[i], p))), p) for p in edges]
        positions[offsets[i] : offsets[i + 1]] = _smallest(keyed, offsets[i + 1] - offsets[i])


def pick_labor_weighted(indices, weights, nodes, slots, keys, starts, degrees, offsets, lo, hi, heap, positions):  # type: ignore[no-untyped-def]
    """Pick the smallest -log(u)/w, one u per neighbour."""
    for i in range(lo, hi):
        edges = [p for p in range(int(starts[i]), int(starts[i] + degrees[i])) if weights[p] > 0]
        numbers = [unit(draw(fold(keys[slots[i]], indices[p]), copy_number(indices, starts[i], p))) for p in edges]
        keyed = [(-np.log(u) / weights[p], p) for u, p in zip(numbers, edges, strict=True)]
        positions[offsets[i] : offsets[i + 1]] = _smallest(keyed, offsets[i + 1] - offsets[i])


def pick_weighted_replace(weights, nodes, slots, keys, starts, degrees, offsets, lo, hi, targets, positions):  # type: ignore[no-untyped-def]
    """Pick by the inverse of the running sum of weights."""
    for i in range(lo, hi):
        if offsets[i + 1] == offsets[i]:
            continue
        around = weights[starts[i] : starts[i] + degrees[i]].astype(np.float64)
        running = np.cumsum(around)
        last = np.flatnonzero(around > 0)[-1]
        key = fold(keys[slots[i]], nodes[i])
        draws = np.sort([unit(draw(key, k)) * running[-1] for k in range(offsets[i + 1] - offsets[i])])
        picks = np.searchsorted(running, draws, side="right")
        positions[offsets[i] : offsets[i + 1]] = starts[i] + np.minimum(picks, last)
