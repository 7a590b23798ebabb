"""The transpose kernels as plainly as NumPy allows."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int32]


def count_sources(indptr: Ints, indices: Ints, counts: Ints, lo: int, hi: int) -> None:
    """See `transpose.count_sources`."""
    counts[:] = np.bincount(indices[indptr[lo] : indptr[hi]], minlength=len(counts))


def offsets_of_counts(counts: Ints, out_indptr: Ints) -> None:
    """See `transpose.offsets_of_counts`."""
    flat = np.concatenate([[0], np.cumsum(counts.T.reshape(-1))])
    out_indptr[:] = flat[:: counts.shape[0]]
    counts[:] = flat[:-1].reshape(counts.shape[1], counts.shape[0]).T


def place_edges(indptr: Ints, indices: Ints, starts: Ints, out_indices: Ints, out_edges: Any, lo: int, hi: int) -> None:
    """See `transpose.place_edges`."""
    for v in range(lo, hi):
        for e in range(indptr[v], indptr[v + 1]):
            at = starts[indices[e]]
            starts[indices[e]] += 1
            out_indices[at] = v
            if out_edges is not None:
                out_edges[at] = e
