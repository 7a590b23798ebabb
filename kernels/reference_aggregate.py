"""The aggregation kernels as plainly as NumPy allows; the order of additions is that of the kernels."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int32]
Floats: TypeAlias = NDArray[np.float32]


def scaled_sum(
    indptr: Ints,
    indices: Ints,
    x: Floats,
    src_scale: Any,
    dst_scale: Any,
    own_scale: Any,
    out: Floats,
    lo: int,
    hi: int,
) -> None:
    """See `aggregate.scaled_sum`."""
    for v in range(lo, hi):
        out[v] = 0
        for u in indices[indptr[v] : indptr[v + 1]]:
            out[v] += x[u] if src_scale is None else src_scale[u] * x[u]
        if dst_scale is not None:
            out[v] *= dst_scale[v]
        if own_scale is not None and v < len(own_scale):
            out[v] += own_scale[v] * x[v]


def weighted_sum(
    indptr: Ints, indices: Ints, edges: Any, weights: Floats, x: Floats, out: Floats, lo: int, hi: int
) -> None:
    """See `aggregate.weighted_sum`."""
    repeat = x.shape[1] // weights.shape[1]
    for v in range(lo, hi):
        out[v] = 0
        for e in range(indptr[v], indptr[v + 1]):
            weight = weights[e if edges is None else edges[e]]
            out[v] += np.repeat(weight, repeat) * x[indices[e]]


def mean_shares(indptr: Any, weights: Any, out: Any, lo: int, hi: int) -> None:
    """See `aggregate.mean_shares`."""
    for v in range(lo, hi):
        own = weights[indptr[v] : indptr[v + 1]].astype(np.float64)
        out[indptr[v] : indptr[v + 1]] = own / own.sum() if own.sum() else 0


def weighted_dot(indptr: Ints, indices: Ints, x: Floats, grad: Floats, out: Floats, lo: int, hi: int) -> None:
    """See `aggregate.weighted_dot`."""
    heads = out.shape[1]
    for v in range(lo, hi):
        for e in range(indptr[v], indptr[v + 1]):
            out[e] = (x[indices[e]] * grad[v]).reshape(heads, -1).sum(axis=1)


def max_rows(indptr: Ints, indices: Ints, x: Floats, out: Floats, argmax: Ints, lo: int, hi: int) -> None:
    """See `aggregate.max_rows`."""
    for v in range(lo, hi):
        start, stop = indptr[v], indptr[v + 1]
        out[v], argmax[v] = 0, -1
        if start < stop:
            rows = x[indices[start:stop]]
            best = np.argmax(rows, axis=0)  # the first of equals; NaN is the largest
            out[v] = np.take_along_axis(rows, best[None], axis=0)[0]
            argmax[v] = start + best


def max_rows_backward(
    indptr: Ints, indices: Ints, edges: Ints, argmax: Ints, grad: Floats, out: Floats, lo: int, hi: int
) -> None:
    """See `aggregate.max_rows_backward`."""
    for u in range(lo, hi):
        out[u] = 0
        for e in range(indptr[u], indptr[u + 1]):
            out[u] += np.where(argmax[indices[e]] == edges[e], grad[indices[e]], np.float32(0))
