"""The attention kernels as plainly as NumPy allows."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int32]
Floats: TypeAlias = NDArray[np.float32]


def edge_softmax(
    indptr: Ints, indices: Ints, src_scores: Floats, dst_scores: Floats, slope: float, out: Floats, lo: int, hi: int
) -> None:
    """See `attention.edge_softmax`."""
    for v in range(lo, hi):
        span = slice(indptr[v], indptr[v + 1])
        raw = src_scores[indices[span]] + dst_scores[v]
        if len(raw):
            score = np.where(raw > 0, raw, raw * np.float32(slope))
            value = np.exp(score - score.max(axis=0))
            out[span] = value / value.sum(axis=0)


def edge_softmax_backward(
    indptr: Ints, indices: Ints, src_scores: Floats, dst_scores: Floats, slope: float, alpha: Floats, grad: Floats,
    grad_edges: Floats, grad_dst: Floats, lo: int, hi: int,
) -> None:  # fmt: skip
    """See `attention.edge_softmax_backward`."""
    for v in range(lo, hi):
        span = slice(indptr[v], indptr[v + 1])
        raw = src_scores[indices[span]] + dst_scores[v]
        value = alpha[span] * (grad[span] - (alpha[span] * grad[span]).sum(axis=0))
        grad_edges[span] = np.where(raw > 0, value, value * np.float32(slope))
        grad_dst[v] = grad_edges[span].sum(axis=0)


def edge_sum(indptr: Ints, edges: Any, values: Floats, out: Floats, lo: int, hi: int) -> None:
    """See `attention.edge_sum`."""
    for r in range(lo, hi):
        span = slice(indptr[r], indptr[r + 1])
        out[r] = values[span if edges is None else edges[span]].sum(axis=0)
