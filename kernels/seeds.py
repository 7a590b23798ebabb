"""Keys of items and hashes that order the seeds of an epoch; see `rng`.

The first fold separates the two uses of one seed, so that no order shares a stream with a draw.
"""

import numpy as np
from numba import njit

from penstock.kernels.rng import draw, fold

_ORDER, _SAMPLE = np.uint64(1), np.uint64(2)


@njit(cache=True, nogil=True)
def hash_ids(ids, seed, epoch, lo, hi, out):  # type: ignore[no-untyped-def]
    """Hash ids for the epoch's order into `out` uint64."""
    key = fold(fold(_ORDER, seed), epoch)
    for i in range(lo, hi):
        out[i] = draw(fold(key, ids[i]), 0)


@njit(cache=True, nogil=True)
def hop_keys(items, epochs, seed, hop, lo, hi, out):  # type: ignore[no-untyped-def]
    """Write key(seed, epoch, item, hop) of every item to `out` uint64."""
    root = fold(_SAMPLE, seed)
    for i in range(lo, hi):
        out[i] = fold(fold(fold(root, epochs[i]), items[i]), hop)
