"""Aggregate neighbour rows over a block: scaled sums (sum, mean, GCN and their gradients), weighted sums, maxima.

A block is CSC: `indptr` int32 [R+1], `indices` int32 [E] in [0, M). The backward pass of a sum is a sum over the
transposed block (see `transpose`), so every output row has one owner that adds in edge order: the bits depend on no
number of threads. Rows `lo..hi-1` of `out` are written whole; nobody needs to clear them. Four neighbours are added per
pass over the output row, which stays in the first-level cache, and the rows of the next ones are prefetched: with 512
bytes per row both cores then read at the speed of the memory, which is the bound of this problem.

Letters: R rows of out, M rows of x, E edges, F features, K weights per edge (heads); F is a multiple of K.
"""

from numba import njit
from numpy import float32, int32, int64

from penstock.kernels.prefetch import prefetch

AHEAD = 12  # neighbours; 4 to 32 measured alike, 0 five per cent slower
_LINE = 16  # float32 per cache line
_ZERO, _ONE = float32(0), float32(1)


@njit(cache=True, nogil=True, inline="always")
def prefetch_row(flat, indices, edge, width):  # type: ignore[no-untyped-def]
    """Ask for the row of x (flattened) that `edge`, or the last edge, points to."""
    start = int64(indices[min(edge, len(indices) - 1)]) * width
    for f in range(0, width, _LINE):
        prefetch(flat, start + f)


@njit(cache=True, nogil=True)
def _factor(scale, row):  # type: ignore[no-untyped-def]
    if scale is None:
        return _ONE
    return scale[row]


@njit(cache=True, nogil=True)
def _position(edges, e):  # type: ignore[no-untyped-def]
    if edges is None:
        return e
    return edges[e]


@njit(cache=True, nogil=True)
def scaled_sum(indptr, indices, x, src_scale, dst_scale, own_scale, out, lo, hi):  # type: ignore[no-untyped-def]
    """out[v] = dst_scale[v] * sum over in-edges (u, v) of src_scale[u] * x[u], and own_scale[v] * x[v] for v < P.

    `x` float32 [M, F], `out` float32 [R, F], `src_scale` float32 [M], `dst_scale` float32 [R], `own_scale` float32 [P],
    P <= min(M, R); a scale may be None.
    """
    width = x.shape[1]
    flat = x.reshape(-1)
    for v in range(lo, hi):
        start, stop = int64(indptr[v]), int64(indptr[v + 1])
        for e in range(start, stop):
            prefetch_row(flat, indices, e + AHEAD, width)
        for f in range(width):
            out[v, f] = _ZERO
        whole = stop - (stop - start) % 4
        for e in range(start, whole, 4):
            a, b, c, d = indices[e], indices[e + 1], indices[e + 2], indices[e + 3]
            wa, wb, wc, wd = _factor(src_scale, a), _factor(src_scale, b), _factor(src_scale, c), _factor(src_scale, d)
            for f in range(width):
                out[v, f] = out[v, f] + wa * x[a, f] + wb * x[b, f] + wc * x[c, f] + wd * x[d, f]
        for e in range(whole, stop):
            a = indices[e]
            wa = _factor(src_scale, a)
            for f in range(width):
                out[v, f] += wa * x[a, f]
        if dst_scale is not None:
            w = dst_scale[v]
            for f in range(width):
                out[v, f] *= w
        if own_scale is not None and v < len(own_scale):
            w = own_scale[v]
            for f in range(width):
                out[v, f] += w * x[v, f]


@njit(cache=True, nogil=True)
def weighted_sum(indptr, indices, edges, weights, x, out, lo, hi):  # type: ignore[no-untyped-def]
    """out[v, k] = sum over in-edges e = (u, v) of weights[edges[e], k] * x[u, k], for the K parts of a row.

    `weights` float32 [E, K]; `edges` int32 [E] (None: 0..E-1) says whose weight an edge of a transposed block has.
    """
    width, heads = x.shape[1], weights.shape[1]
    dim = width // heads
    flat = x.reshape(-1)
    for v in range(lo, hi):
        start, stop = int64(indptr[v]), int64(indptr[v + 1])
        for e in range(start, stop):
            prefetch_row(flat, indices, e + AHEAD, width)
            prefetch(weights, int64(_position(edges, min(e + AHEAD, len(indices) - 1))) * heads)
        for f in range(width):
            out[v, f] = _ZERO
        for e in range(start, stop):
            a, position = indices[e], _position(edges, e)
            for k in range(heads):
                w = weights[position, k]
                for f in range(k * dim, (k + 1) * dim):
                    out[v, f] += w * x[a, f]


@njit(cache=True, nogil=True)
def mean_shares(indptr, weights, out, lo, hi):  # type: ignore[no-untyped-def]
    """out[e] = weights[e] over the sum of the weights of e's destination, for rows lo..hi-1; 0 where they sum to 0.

    `weights`, `out` float32 [E]; sums are float64, so that large weights do not overflow and small ones do not vanish.
    """
    for v in range(lo, hi):
        total = 0.0
        for e in range(int64(indptr[v]), int64(indptr[v + 1])):
            total += weights[e]
        for e in range(int64(indptr[v]), int64(indptr[v + 1])):
            out[e] = float32(weights[e] / total) if total != 0 else _ZERO


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def weighted_dot(indptr, indices, x, grad, out, lo, hi):  # type: ignore[no-untyped-def]
    """out[e, k] = dot(x[u, k], grad[v, k]) for every in-edge e = (u, v) of rows lo..hi-1: d weighted_sum / d weights.

    `grad` float32 [R, F], `out` float32 [E, K]. Sums are reassociated over vector lanes, always in the same way.
    """
    width, heads = x.shape[1], out.shape[1]
    dim = width // heads
    flat = x.reshape(-1)
    for v in range(lo, hi):
        for e in range(int64(indptr[v]), int64(indptr[v + 1])):
            prefetch_row(flat, indices, e + AHEAD, width)
            a = indices[e]
            for k in range(heads):
                total = _ZERO
                for f in range(k * dim, (k + 1) * dim):
                    total += x[a, f] * grad[v, f]
                out[e, k] = total


@njit(cache=True, nogil=True)
def max_rows(indptr, indices, x, out, argmax, lo, hi):  # type: ignore[no-untyped-def]
    """out[v, f] = the largest x[u, f] over in-edges; `argmax` int32 [R, F] is the first edge that has it.

    A row without edges is 0 with argmax -1; NaN counts as the largest, so that it is not lost.
    """
    width = x.shape[1]
    flat = x.reshape(-1)
    for v in range(lo, hi):
        start, stop = int64(indptr[v]), int64(indptr[v + 1])
        for e in range(start, stop):
            prefetch_row(flat, indices, e + AHEAD, width)
        if start == stop:
            for f in range(width):
                out[v, f] = _ZERO
                argmax[v, f] = -1
            continue
        a = indices[start]
        for f in range(width):
            out[v, f] = x[a, f]
            argmax[v, f] = int32(start)
        for e in range(start + 1, stop):
            a, edge = indices[e], int32(e)
            for f in range(width):
                value, best = x[a, f], out[v, f]
                wins = (value > best) | ((value != value) & (best == best))
                out[v, f] = value if wins else best
                argmax[v, f] = edge if wins else argmax[v, f]


@njit(cache=True, nogil=True)
def max_rows_backward(indptr, indices, edges, argmax, grad, out, lo, hi):  # type: ignore[no-untyped-def]
    """out[u, f] = sum of grad[v, f] over the out-edges of u that won; `indptr`, `indices`, `edges` are transposed."""
    width = grad.shape[1]
    flat = grad.reshape(-1)
    for u in range(lo, hi):
        start, stop = int64(indptr[u]), int64(indptr[u + 1])
        for e in range(start, stop):
            prefetch_row(flat, indices, e + AHEAD, width)
        for f in range(width):
            out[u, f] = _ZERO
        for e in range(start, stop):
            v, edge = indices[e], edges[e]
            for f in range(width):
                out[u, f] += grad[v, f] if argmax[v, f] == edge else _ZERO
