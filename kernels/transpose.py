"""Transpose a block, CSC to CSR, by a counting sort over edges: who reads source u, in edge order.

The destinations are cut into P parts, one per thread. Each part counts its sources, `offsets_of_counts` turns the
counts into where each part's edges of a source begin, each part places its edges. The result is that of a stable
sort by source, whatever P.

Letters: S sources, R destinations, E edges, P parts.
"""

from numba import njit
from numpy import int32, int64

from penstock.kernels.prefetch import prefetch

_AHEAD = 16  # edges


@njit(cache=True, nogil=True)
def count_sources(indptr, indices, counts, lo, hi):  # type: ignore[no-untyped-def]
    """counts[u] = edges from source u into destinations lo..hi-1; `counts` int32 [S] need not be cleared."""
    counts[:] = 0
    last = len(indices) - 1
    for e in range(int64(indptr[lo]), int64(indptr[hi])):
        prefetch(counts, indices[min(e + _AHEAD, last)])
        counts[indices[e]] += 1


@njit(cache=True, nogil=True)
def offsets_of_counts(counts, out_indptr):  # type: ignore[no-untyped-def]
    """Replace `counts` int32 [P, S] by where part p's edges of source u begin; `out_indptr` int32 [S+1] is for all."""
    parts, num_src = counts.shape
    at = int32(0)
    for u in range(num_src):
        out_indptr[u] = at
        for p in range(parts):
            count = counts[p, u]
            counts[p, u] = at
            at += count
    out_indptr[num_src] = at


@njit(cache=True, nogil=True)
def place_edges(indptr, indices, starts, out_indices, out_edges, lo, hi):  # type: ignore[no-untyped-def]
    """Write the destination of every edge into rows lo..hi-1 at its source's place.

    `starts` int32 [S], a part's row of `counts`, is consumed. `out_indices` int32 [E] gets destinations, `out_edges`
    int32 [E] the edge's position in the block; it may be None. An edge's place is asked for when its source's start has
    arrived in the cache, which was asked for twice as early.
    """
    last = len(indices) - 1
    for v in range(lo, hi):
        for e in range(int64(indptr[v]), int64(indptr[v + 1])):
            prefetch(starts, indices[min(e + 2 * _AHEAD, last)])
            soon = starts[indices[min(e + _AHEAD, last)]]
            prefetch(out_indices, soon)
            u = indices[e]
            at = starts[u]
            starts[u] = at + 1
            out_indices[at] = v
            if out_edges is not None:
                prefetch(out_edges, soon)
                out_edges[at] = e
