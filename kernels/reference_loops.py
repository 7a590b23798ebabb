"""The kernels of self-loops as plainly as NumPy allows."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def count_own(indptr: Any, indices: Any, nodes: Any, lo: int, hi: int, out: NDArray[np.int32]) -> None:
    """See `loops.count_own`."""
    for i in range(lo, hi):
        out[i] = np.count_nonzero(indices[indptr[nodes[i]] : indptr[nodes[i] + 1]] == nodes[i])


def count_in_block(indptr: Any, indices: Any, out: NDArray[np.int32], lo: int, hi: int) -> None:
    """See `loops.count_in_block`."""
    for v in range(lo, hi):
        out[v] = np.count_nonzero(indices[indptr[v] : indptr[v + 1]] == v)
