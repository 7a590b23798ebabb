"""Edges to CSC: stable distribution by key bits, merging of duplicates, row ends.

Ingest sorts 64-bit keys: destination above, source below. Distribution by some bits of the key is all that an external
sort needs: by the top bits it cuts the edges into files that fit in memory, by digits from the lowest up it is a radix
sort (Knuth, TAOCP 3, section 5.2.5), and both keep the input order of equal keys. No index is 32 bits wide.
"""

import numpy as np
from numba import njit

from penstock.kernels.rng import mix


@njit(cache=True, nogil=True)
def count_buckets(keys, shift, mask, counts):  # type: ignore[no-untyped-def]
    """Add to counts int64 [mask + 1] how many of keys uint64 [M] have each value of (key >> shift) & mask."""
    for n in range(keys.shape[0]):
        counts[np.int64((keys[n] >> np.uint64(shift)) & np.uint64(mask))] += 1


@njit(cache=True, nogil=True)
def scatter_by_bucket(keys, values, shift, mask, starts, out):  # type: ignore[no-untyped-def]
    """Write values [M] to out in the order of their keys' buckets, input order within one.

    `starts` int64 [mask + 1], where each bucket begins in `out`; on return, where it ends.
    """
    for n in range(keys.shape[0]):
        bucket = np.int64((keys[n] >> np.uint64(shift)) & np.uint64(mask))
        out[starts[bucket]] = values[n]
        starts[bucket] += 1


@njit(cache=True, nogil=True)
def unique_sorted(keys):  # type: ignore[no-untyped-def]
    """Move the distinct ones of sorted keys to the front, in place; returns how many."""
    if keys.shape[0] == 0:
        return 0
    done = 1
    for n in range(1, keys.shape[0]):
        if keys[n] != keys[done - 1]:
            keys[done] = keys[n]
            done += 1
    return done


@njit(cache=True, nogil=True)
def merge_sorted(keys, weights):  # type: ignore[no-untyped-def]
    """Like `unique_sorted`, and weights float32 [M] of equal keys are added up, in float64 and in order."""
    if keys.shape[0] == 0:
        return 0
    done = 0
    total = np.float64(weights[0])
    for n in range(1, keys.shape[0]):
        if keys[n] == keys[done]:
            total += np.float64(weights[n])
        else:
            weights[done] = np.float32(total)
            done += 1
            keys[done] = keys[n]
            total = np.float64(weights[n])
    weights[done] = np.float32(total)
    return done + 1


@njit(cache=True, nogil=True)
def row_ends(keys, bits, first_row, start, base, out):  # type: ignore[no-untyped-def]
    """Fill out int64 [R]: base + the number of sorted keys whose row, key >> bits, is at most first_row + r.

    `start` is a number of keys known to lie before `first_row`; returns the number for the last row.
    """
    at = np.int64(start)
    for r in range(out.shape[0]):
        row = np.uint64(first_row + r)
        while at < keys.shape[0] and (keys[at] >> np.uint64(bits)) <= row:
            at += 1
        out[r] = np.int64(base) + at
    return at


@njit(cache=True, nogil=True)
def join_sorted(keys, queries, start, out):  # type: ignore[no-untyped-def]
    """Fill out int64 [M]: the position of each of sorted queries uint64 [M] in sorted distinct keys, -1 if absent.

    `start` is a number of keys known to be smaller than the first query; returns it for queries to come.
    """
    at = np.int64(start)
    size = keys.shape[0]
    for m in range(queries.shape[0]):
        query = queries[m]
        # gallop: queries may be far apart or dense, and both must be cheap
        step = 1
        while at + step < size and keys[at + step] < query:
            at += step
            step *= 2
        low, high = at, min(at + step, size)
        while low < high:
            middle = (low + high) // 2
            if keys[middle] < query:
                low = middle + 1
            else:
                high = middle
        at = low
        out[m] = at if at < size and keys[at] == query else -1
    return at


@njit(cache=True, nogil=True)
def mix_keys(ids, out):  # type: ignore[no-untyped-def]
    """Fill out uint64 [M] with evenly spread keys of ids int64 [M], a bijection."""
    for m in range(ids.shape[0]):
        out[m] = mix(np.uint64(ids[m]))
