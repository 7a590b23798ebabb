"""Attention over the in-edges of a block, as in GAT (Velickovic et al., ICLR 2018, equations 1 to 3).

The score of edge (u, v) and head k is leaky_relu(src_scores[u, k] + dst_scores[v, k]); its weight is the softmax of
that over the in-edges of v. Scores of edges are not stored: they are two adds away.

Letters: R destinations, S sources, E edges, K heads.
"""

import math

from numba import njit
from numpy import float32, int64

from penstock.kernels.prefetch import prefetch

_AHEAD = 16  # edges
_ZERO = float32(0)


@njit(cache=True, nogil=True)
def edge_softmax(indptr, indices, src_scores, dst_scores, slope, out, lo, hi):  # type: ignore[no-untyped-def]
    """Write attention weights `out` float32 [E, K] of the in-edges of rows lo..hi-1.

    `src_scores` float32 [S, K], `dst_scores` float32 [R, K], `slope` float32 of the negative side.
    """
    heads, last = out.shape[1], len(indices) - 1
    for v in range(lo, hi):
        start, stop = int64(indptr[v]), int64(indptr[v + 1])
        for e in range(start, stop):
            prefetch(src_scores, int64(indices[min(e + _AHEAD, last)]) * heads)
            for k in range(heads):
                raw = src_scores[indices[e], k] + dst_scores[v, k]
                out[e, k] = raw if raw > _ZERO else raw * slope
        for k in range(heads if stop > start else 0):
            top = out[start, k]
            for e in range(start + 1, stop):
                top = max(top, out[e, k])
            total = _ZERO
            for e in range(start, stop):
                value = math.exp(out[e, k] - top)
                out[e, k] = value
                total += value
            for e in range(start, stop):
                out[e, k] /= total


@njit(cache=True, nogil=True)
def edge_softmax_backward(  # type: ignore[no-untyped-def]
    indptr, indices, src_scores, dst_scores, slope, alpha, grad, grad_edges, grad_dst, lo, hi
):
    """From `alpha` and its gradient `grad`, both float32 [E, K], get those of raw scores and of `dst_scores`.

    `grad_edges` float32 [E, K] may be `grad` itself; summed over out-edges it is the gradient of `src_scores`.
    `grad_dst` float32 [R, K].
    """
    heads = alpha.shape[1]
    for v in range(lo, hi):
        start, stop = int64(indptr[v]), int64(indptr[v + 1])
        for k in range(heads):
            inner = _ZERO
            for e in range(start, stop):
                inner += alpha[e, k] * grad[e, k]
            total = _ZERO
            for e in range(start, stop):
                raw = src_scores[indices[e], k] + dst_scores[v, k]
                value = alpha[e, k] * (grad[e, k] - inner)
                value = value if raw > _ZERO else value * slope
                grad_edges[e, k] = value
                total += value
            grad_dst[v, k] = total


@njit(cache=True, nogil=True)
def edge_sum(indptr, edges, values, out, lo, hi):  # type: ignore[no-untyped-def]
    """out[r, k] = sum over e in row r of values[edges[e], k]; `values` float32 [E, K], `edges` int32 [E] or None."""
    heads = values.shape[1]
    for r in range(lo, hi):
        for k in range(heads):
            out[r, k] = _ZERO
        for e in range(int64(indptr[r]), int64(indptr[r + 1])):
            position = e if edges is None else edges[e]
            for k in range(heads):
                out[r, k] += values[position, k]
