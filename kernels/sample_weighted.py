"""Pick in-neighbours by edge weight, or by one random number per neighbour (LABOR).

Legend and conventions as in `sample`; `weights` float32 [E], finite and not negative (`count_weighted`
looks), goes with `indices`; edges of weight zero are never picked, so a node that has no others gets no neighbours.

Without replacement, by weight: the c smallest of -log(u)/w, one u per edge (Efraimidis and Spirakis, Information
Processing Letters 97(5), 2006, in the exponential form). LABOR-0, sequential Poisson (Balin and Catalyurek, "Layer-
Neighbor Sampling: Defusing Neighborhood Explosion in GNNs", NeurIPS 2023, section 3 and appendix): the same with one u
per neighbour t, drawn from key(seed, epoch, item, hop, t) without the destination, so that the destinations of an item
agree on their neighbours and the hop reaches fewer nodes; parallel edges have one u each, or picks would favour or
shun them; without weights -log(u) may be u. With replacement, by
weight: sorted targets and one pass over the running sum of weights. All are O(d) time and O(c) memory. How draws by
weight count is in `weigh`.
"""

import numpy as np
from numba import njit

from penstock.kernels.prefetch import prefetch
from penstock.kernels.rng import draw, fold, unit
from penstock.kernels.sample import sort_range

_AHEAD = 8  # destinations; their whole lists are read, the first line is what the hardware cannot guess


@njit(cache=True, nogil=True)
def count_weighted(indptr, weights, nodes, lo, hi, fanout, replace, starts, degrees, offsets):  # type: ignore[no-untyped-def]
    """Do as `count_edges`, where edges of weight zero do not count.

    Returns the first position seen whose weight is negative, NaN or infinite, else -1: picks go wrong by such weights.
    """
    for i in range(lo, hi):
        if i + _AHEAD < hi:
            prefetch(indptr, nodes[i + _AHEAD])
        start = indptr[nodes[i]]
        degree = indptr[nodes[i] + 1] - start
        starts[i] = start
        degrees[i] = degree
        positive, good = 0, 0
        for position in range(start, start + degree):
            weight = weights[position]
            positive += weight > 0
            good += (weight >= 0) & (weight < np.inf)  # no branch, so that the loop is vectorized
        if good < degree:
            for position in range(start, start + degree):
                if not (weights[position] >= 0 and weights[position] < np.inf):
                    return position
        if fanout < 0 or (positive < fanout and not replace) or positive == 0:
            offsets[i + 1] = positive
        else:
            offsets[i + 1] = fanout
    return -1


@njit(cache=True, nogil=True)
def pick_positive(weights, starts, degrees, offsets, lo, hi, positions):  # type: ignore[no-untyped-def]
    """Pick all neighbours of positive weight: fanout -1."""
    for i in range(lo, hi):
        at = offsets[i]
        for position in range(starts[i], starts[i] + degrees[i]):
            if weights[position] > 0:
                positions[at] = position
                at += 1


@njit(cache=True, nogil=True, inline="always")
def _after(key_a, position_a, key_b, position_b):  # type: ignore[no-untyped-def]
    """Whether a is picked after b; of equal keys the earlier position wins."""
    return key_a > key_b or (key_a == key_b and position_a > position_b)


@njit(cache=True, nogil=True, inline="always")
def _keep_smallest(key, position, size, count, at, heap, positions):  # type: ignore[no-untyped-def]
    """Offer a candidate to the heap of the `count` smallest, largest on top; return the heap's size.

    The heap's keys are in `heap`, its positions lie where they will be written out.
    """
    if size == count:
        if not _after(heap[0], positions[at], key, position):
            return size
        place = 0
        while 2 * place + 1 < count:  # sift the candidate down from the top
            child = 2 * place + 1
            if child + 1 < count and _after(
                heap[child + 1], positions[at + child + 1], heap[child], positions[at + child]
            ):
                child += 1
            if not _after(heap[child], positions[at + child], key, position):
                break
            heap[place] = heap[child]
            positions[at + place] = positions[at + child]
            place = child
    else:
        place = size  # sift it up from the end
        size += 1
        while place > 0:
            parent = (place - 1) // 2
            if not _after(key, position, heap[parent], positions[at + parent]):
                break
            heap[place] = heap[parent]
            positions[at + place] = positions[at + parent]
            place = parent
    heap[place] = key
    positions[at + place] = position
    return size


@njit(cache=True, nogil=True)
def pick_weighted(weights, nodes, slots, keys, starts, degrees, offsets, lo, hi, heap, positions):  # type: ignore[no-untyped-def]
    """Pick distinct neighbours one after the other, each with probability proportional to its edge's weight.

    `heap` float64 holds as many as are picked of one destination.
    """
    for i in range(lo, hi):
        if i + _AHEAD < hi:
            prefetch(weights, starts[i + _AHEAD])
        start, at, count = starts[i], offsets[i], offsets[i + 1] - offsets[i]
        if count == 0:
            continue
        key = fold(keys[slots[i]], nodes[i])
        size = 0
        for k in range(degrees[i]):
            weight = weights[start + k]
            if weight > 0:
                edge_key = -np.log(unit(draw(key, k))) / weight
                size = _keep_smallest(edge_key, start + k, size, count, at, heap, positions)
        sort_range(positions, at, at + count)


@njit(cache=True, nogil=True)
def pick_labor(indices, nodes, slots, keys, starts, degrees, offsets, lo, hi, heap, positions):  # type: ignore[no-untyped-def]
    """Pick the neighbours whose own random numbers are smallest; `heap` as for `pick_weighted`."""
    for i in range(lo, hi):
        if i + _AHEAD < hi:
            prefetch(indices, starts[i + _AHEAD])
        start, at, count = starts[i], offsets[i], offsets[i + 1] - offsets[i]
        if count == degrees[i]:
            for k in range(count):
                positions[at + k] = start + k
            continue
        key = keys[slots[i]]
        size, copy = 0, 0
        for position in range(start, start + degrees[i]):
            copy = copy + 1 if position > start and indices[position] == indices[position - 1] else 0
            node_key = unit(draw(fold(key, indices[position]), copy))
            size = _keep_smallest(node_key, position, size, count, at, heap, positions)
        sort_range(positions, at, at + count)


@njit(cache=True, nogil=True)
def pick_labor_weighted(indices, weights, nodes, slots, keys, starts, degrees, offsets, lo, hi, heap, positions):  # type: ignore[no-untyped-def]
    """Do as `pick_labor` with the random numbers scaled by the edges' weights."""
    for i in range(lo, hi):
        if i + _AHEAD < hi:
            prefetch(indices, starts[i + _AHEAD])
            prefetch(weights, starts[i + _AHEAD])
        start, at, count = starts[i], offsets[i], offsets[i + 1] - offsets[i]
        if count == 0:
            continue
        key = keys[slots[i]]
        size, copy = 0, 0
        for position in range(start, start + degrees[i]):
            copy = copy + 1 if position > start and indices[position] == indices[position - 1] else 0
            weight = weights[position]
            if weight > 0:
                edge_key = -np.log(unit(draw(fold(key, indices[position]), copy))) / weight
                size = _keep_smallest(edge_key, position, size, count, at, heap, positions)
        sort_range(positions, at, at + count)


@njit(cache=True, nogil=True)
def pick_weighted_replace(weights, nodes, slots, keys, starts, degrees, offsets, lo, hi, targets, positions):  # type: ignore[no-untyped-def]
    """Pick neighbours independently, with probability proportional to weight; `targets` float64 as `heap` above."""
    for i in range(lo, hi):
        if i + _AHEAD < hi:
            prefetch(weights, starts[i + _AHEAD])
        start, at, count = starts[i], offsets[i], offsets[i + 1] - offsets[i]
        if count == 0:
            continue
        total = 0.0
        last = start
        for position in range(start, start + degrees[i]):
            total += weights[position]
            if weights[position] > 0:
                last = position
        key = fold(keys[slots[i]], nodes[i])
        for k in range(count):
            targets[k] = unit(draw(key, k)) * total
        sort_range(targets, 0, count)
        running = np.float64(weights[start])
        position = start
        for k in range(count):
            # A target may round up to the total: stay on the last edge that has weight.
            while running <= targets[k] and position < last:
                position += 1
                running += weights[position]
            positions[at + k] = position
