"""Count edges that lead from a node to itself.

Letters: N nodes, E edges, M ids in a request, R rows of a block.
"""

from numba import njit
from numpy import int32, int64

from penstock.kernels.prefetch import prefetch

_AHEAD = 16  # nodes, as in `sample.count_edges`


@njit(cache=True, nogil=True)
def count_own(indptr, indices, nodes, lo, hi, out):  # type: ignore[no-untyped-def]
    """out[i] int32 = edges from nodes[i] to itself, for i in lo..hi-1; the in-neighbours of a node are ascending."""
    for i in range(lo, hi):
        if i + _AHEAD < hi:
            prefetch(indptr, nodes[i + _AHEAD])
        node = nodes[i]
        low, stop = int64(indptr[node]), int64(indptr[node + 1])
        high = stop
        while low < high:
            middle = (low + high) // 2
            if indices[middle] < node:
                low = middle + 1
            else:
                high = middle
        count = int32(0)
        while low < stop and indices[low] == node:
            count += int32(1)
            low += 1
        out[i] = count


@njit(cache=True, nogil=True)
def count_in_block(indptr, indices, out, lo, hi):  # type: ignore[no-untyped-def]
    """out[v] int32 = edges of a block from source v to destination v, for rows lo..hi-1; in-neighbours in any order."""
    for v in range(lo, hi):
        count = int32(0)
        for e in range(int64(indptr[v]), int64(indptr[v + 1])):
            count += int32(indices[e] == v)
        out[v] = count
