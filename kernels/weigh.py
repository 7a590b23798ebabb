"""Weigh what was drawn by weight, so that sums over the draws estimate sums over all in-edges without bias.

Legend and conventions as in `sample_weighted`; W is the sum of a destination's weights, d its edges of positive weight,
c its picks. `out` float32 gets a weight w' per pick such that E[sum w' x] = sum w x over all in-edges, and the w' of a
destination always add up to W. So the mean weighted by w' is an unbiased estimate of the mean weighted by w.

- All of positive weight were picked: w' = w.
- With replacement: w' = W / c.
- Without, one after the other with probability proportional to weight (which is what the smallest -log(u)/w are, in
  their order): Des Raj's estimators ("Some Estimators in Sampling with Varying Probabilities without Replacement", JASA
  51(274), 1956). Given picks 1..j-1, pick j stands for all that was left: t_j = sum of w_i x_i of i < j, plus
  (W - sum of w_i of i < j) x_j. Each t_j is unbiased, so any constant mixture of them is; ours weighs t_j by
  1 / (d - j + 1)^2, one over its variance where weights are equal. Des Raj's is the plain average, which is twice as
  noisy where nearly all are picked.
"""

import numpy as np
from numba import njit

from penstock.kernels.prefetch import prefetch
from penstock.kernels.rng import draw, fold, unit
from penstock.kernels.sample import sort_range

_AHEAD = 8  # destinations, as in `sample_weighted`
_LARGEST = np.float64(np.finfo(np.float32).max)  # the sum of a destination's weights is scaled to it where it is larger


@njit(cache=True, nogil=True, inline="always")
def copy_number(indices, start, position):  # type: ignore[no-untyped-def]
    """How many earlier edges of a destination come from the same source: parallel ones have draws of their own."""
    number = 0
    while position - number > start and indices[position - number - 1] == indices[position]:
        number += 1
    return number


@njit(cache=True, nogil=True)
def weigh_draws(  # type: ignore[no-untyped-def]
    indices, weights, nodes, slots, keys, starts, degrees, offsets, lo, hi, by_source, replace, by_position, in_order,
    places, positions, out,
):  # fmt: skip
    """Fill out[offsets[i]:offsets[i+1]] for destinations lo..hi-1 from their picks.

    `by_source` says that numbers were drawn per neighbour (LABOR), else per edge. `by_position`, `in_order` float64 and
    `places` int64 hold as many as are picked of one destination.
    """
    for i in range(lo, hi):
        if i + _AHEAD < hi:
            prefetch(weights, starts[i + _AHEAD])
        start, at, count = starts[i], offsets[i], offsets[i + 1] - offsets[i]
        if count == 0:
            continue
        total, positive = 0.0, 0
        for position in range(start, start + degrees[i]):
            total += weights[position]
            positive += weights[position] > 0
        scale = min(1.0, _LARGEST / total)
        if replace:
            for k in range(count):
                out[at + k] = scale * total / count
            continue
        if count == positive:
            for k in range(count):
                out[at + k] = weights[positions[at + k]]
            continue
        key = keys[slots[i]]
        for k in range(count):
            position = positions[at + k]
            if by_source:
                bits = draw(fold(key, indices[position]), copy_number(indices, start, position))
            else:
                bits = draw(fold(key, nodes[i]), position - start)
            by_position[k] = -np.log(unit(bits)) / weights[position]
            in_order[k] = by_position[k]
        sort_range(in_order, 0, count)
        for k in range(count):
            places[k] = np.searchsorted(in_order[:count], by_position[k])
        mixed = 0.0
        for j in range(count):
            in_order[j] = 0.0
            mixed += 1.0 / (np.float64(positive - j) * np.float64(positive - j))
        for k in range(count):
            in_order[places[k]] = weights[positions[at + k]]
        left, before = total, 0.0
        for j in range(count):
            share = 1.0 / (np.float64(positive - j) * np.float64(positive - j)) / mixed
            before += share
            weight = in_order[j]
            in_order[j] = share * left + max(0.0, 1.0 - before) * weight
            left = max(0.0, left - weight)
        for k in range(count):
            out[at + k] = scale * in_order[places[k]]
