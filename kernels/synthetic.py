"""A synthetic power-law graph with planted classes, every value a hash of (seed, what, where).

Node ids are a scattered numbering of *ranks*: rank r is the r-th most popular source, and its id is a keyed bijection
of r, so that hubs lie all over the id space. The hidden type of a node is its rank modulo C. The label of a node is
drawn independently of its rank, its sources have the type that equals its label with probability `homophily`, and
features show the type. So a node's own features say nothing of its label, those of its in-neighbours nearly everything.

Sources are drawn by inverting the distribution function of a power law over the ranks of one type: the weight of the
q-th is q^-b with b = 1 / (exponent - 1), which gives out-degrees P(d) ~ d^-exponent (Goh, Kahng, Kim, PRL 2001, the
static model). In-degrees are a Pareto draw rounded down. Letters: N nodes, E edges, F features, C classes.
"""

import numpy as np
from numba import njit

from penstock.kernels.rng import below, draw, fold, mix, unit

SALT_LABEL, SALT_DEGREE, SALT_SOURCE, SALT_NOISE, SALT_SPLIT, SALT_CENTROID = range(1, 7)
_ROUNDS = 12  # redraws by popularity before duplicates are replaced by uniform draws, which always end soon
_SMALL = 24  # insertion sort below, Numba's quicksort above
_U = np.uint64
_INVERSE_STEPS = 6  # Newton doubles the correct bits of an inverse modulo 2^64: 3, 6, ..., 96


@njit(cache=True, nogil=True)
def scatter_keys(key, num_nodes, out):  # type: ignore[no-untyped-def]
    """Fill out uint64 [6]: mask, shift, two odd multipliers and their inverses, for `scatter` over [0, N)."""
    bits = 2
    while (1 << bits) < num_nodes:
        bits += 1
    out[0], out[1] = _U((1 << bits) - 1), _U((bits + 1) // 2)
    for n in range(2):
        odd = draw(key, n) | _U(1)
        inverse = odd
        for _ in range(_INVERSE_STEPS):
            inverse *= _U(2) - odd * inverse
        out[2 + n], out[4 + n] = odd, inverse


@njit(cache=True, nogil=True, inline="always")
def scatter(rank, num_nodes, keys):  # type: ignore[no-untyped-def]
    """Map a rank to its id, a bijection of [0, N): two multiply-xorshift rounds on k bits, cycle walking above N."""
    x = _U(rank)
    while True:
        x = (x * keys[2]) & keys[0]
        x ^= x >> keys[1]
        x = (x * keys[3]) & keys[0]
        x ^= x >> keys[1]
        if x < _U(num_nodes):
            return np.int64(x)


@njit(cache=True, nogil=True, inline="always")
def unscatter(node, num_nodes, keys):  # type: ignore[no-untyped-def]
    """Undo `scatter`. The shift is at least half of the k bits, so one xorshift is its own inverse."""
    x = _U(node)
    while True:
        x ^= x >> keys[1]
        x = (x * keys[5]) & keys[0]
        x ^= x >> keys[1]
        x = (x * keys[4]) & keys[0]
        if x < _U(num_nodes):
            return np.int64(x)


@njit(cache=True, nogil=True, inline="always")
def _label(key, node, num_classes):  # type: ignore[no-untyped-def]
    return below(draw(fold(key, SALT_LABEL), node), num_classes)


@njit(cache=True, nogil=True)
def draw_labels(key, num_classes, lo, hi, out):  # type: ignore[no-untyped-def]
    """Fill out int64 [hi - lo] with the labels of nodes lo..hi-1."""
    for v in range(lo, hi):
        out[v - lo] = _label(key, v, num_classes)


@njit(cache=True, nogil=True)
def draw_splits(key, train, valid, test, lo, hi, out):  # type: ignore[no-untyped-def]
    """Fill out int8 [hi - lo] with 0 train, 1 valid, 2 test, -1 none, in the given fractions."""
    split_key = fold(key, SALT_SPLIT)
    for v in range(lo, hi):
        u = unit(draw(split_key, v))
        code = -1
        if u < train:
            code = 0
        elif u < train + valid:
            code = 1
        elif u < train + valid + test:
            code = 2
        out[v - lo] = code


@njit(cache=True, nogil=True)
def draw_degrees(key, smallest, power, largest, lo, hi, out):  # type: ignore[no-untyped-def]
    """Fill out int64 [hi - lo] with in-degrees floor(smallest * u^-power), at most `largest`."""
    degree_key = fold(key, SALT_DEGREE)
    for v in range(lo, hi):
        out[v - lo] = np.int64(min(smallest * unit(draw(degree_key, v)) ** -power, largest))


@njit(cache=True, nogil=True, inline="always")
def _source(bits, other, label, num_nodes, num_classes, homophily, power, keys):  # type: ignore[no-untyped-def]
    kind = label
    coin = unit(other)
    if coin >= homophily:  # the rest of the coin picks one of the other types
        kind = np.int64((coin - homophily) / (1.0 - homophily) * (num_classes - 1))
        kind = min(kind, num_classes - 2)
        if kind >= label:
            kind += 1
    members = (num_nodes - kind + num_classes - 1) // num_classes
    q = min(np.int64(members * unit(bits) ** power), members - 1)
    return scatter(q * num_classes + kind, num_nodes, keys)


@njit(cache=True, nogil=True, inline="always")
def _sort(values, lo, hi):  # type: ignore[no-untyped-def]
    if hi - lo > _SMALL:
        values[lo:hi].sort()
        return
    for i in range(lo + 1, hi):
        value = values[i]
        j = i
        while j > lo and values[j - 1] > value:
            values[j] = values[j - 1]
            j -= 1
        values[j] = value


@njit(cache=True, nogil=True)
def draw_sources(key, num_nodes, num_classes, homophily, power, keys, indptr, base, lo, hi, out):  # type: ignore[no-untyped-def]
    """Fill out [indptr[hi] - base] with the sources of nodes lo..hi-1: ascending, distinct, no self-loops.

    `indptr` int64 [N+1]; node v's sources go to out[indptr[v] - base:]. Node v may have at most N // 2.
    """
    source_key = fold(key, SALT_SOURCE)
    for v in range(lo, hi):
        label = _label(key, v, num_classes)
        node_key = fold(source_key, v)
        begin, end = indptr[v] - base, indptr[v + 1] - base
        done, count, rounds = begin, 0, 0
        while done < end:
            for n in range(done, end):
                source = np.int64(v)
                while source == v:
                    bits, other = draw(node_key, count), draw(node_key, count + 1)
                    count += 2
                    if rounds < _ROUNDS:
                        source = _source(bits, other, label, num_nodes, num_classes, homophily, power, keys)
                    else:
                        source = np.int64(unit(bits) * num_nodes)
                out[n] = source
            rounds += 1
            _sort(out, begin, end)
            done = begin + 1
            for n in range(begin + 1, end):  # keep the distinct ones in front
                if out[n] != out[done - 1]:
                    out[done] = out[n]
                    done += 1


@njit(cache=True, nogil=True)
def draw_centroids(key, norm, out):  # type: ignore[no-untyped-def]
    """Fill out float32 [C, F] with directions of length `norm`."""
    for c in range(out.shape[0]):
        row_key = fold(fold(key, SALT_CENTROID), c)
        total = 0.0
        for f in range(out.shape[1]):
            value = 2.0 * unit(draw(row_key, f)) - 1.0
            out[c, f] = value
            total += value * value
        scale = norm / np.sqrt(total)
        for f in range(out.shape[1]):
            out[c, f] *= scale


@njit(cache=True, nogil=True)
def draw_features(key, num_nodes, centroids, noise, keys, lo, hi, out):  # type: ignore[no-untyped-def]
    """Fill out float32 [hi - lo, F]: the centroid of the node's type plus noise of standard deviation `noise`.

    The noise is triangular, the sum of two 16-bit uniforms: two values per hash, and no transcendental function.
    """
    noise_key = fold(key, SALT_NOISE)
    num_classes, width = centroids.shape
    # 16-bit uniforms have variance (2^32 - 1) / 12
    step = np.float32(noise / np.sqrt((2.0**32 - 1.0) / 6.0))
    half = width // 2
    for v in range(lo, hi):
        kind = unscatter(v, num_nodes, keys) % num_classes
        row_key = fold(noise_key, v)
        row, centroid = out[v - lo], centroids[kind]
        for f in range(half):
            bits = draw(row_key, f)
            a = np.int32(bits & _U(0xFFFF)) + np.int32((bits >> _U(16)) & _U(0xFFFF)) - np.int32(0xFFFF)
            b = np.int32((bits >> _U(32)) & _U(0xFFFF)) + np.int32(bits >> _U(48)) - np.int32(0xFFFF)
            row[f] = centroid[f] + np.float32(a) * step
            row[f + half] = centroid[f + half] + np.float32(b) * step
        if width % 2:
            bits = mix(draw(row_key, half))
            a = np.int32(bits & _U(0xFFFF)) + np.int32((bits >> _U(16)) & _U(0xFFFF)) - np.int32(0xFFFF)
            row[width - 1] = centroid[width - 1] + np.float32(a) * step
