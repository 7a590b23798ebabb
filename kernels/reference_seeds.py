"""Twins of `seeds`."""

import numpy as np

from penstock.kernels.rng import draw, fold


def hash_ids(ids, seed, epoch, lo, hi, out):  # type: ignore[no-untyped-def]
    """Hash ids for the epoch's order."""
    key = fold(fold(np.uint64(1), seed), epoch)
    out[lo:hi] = [draw(fold(key, node), 0) for node in ids[lo:hi]]


def hop_keys(items, epochs, seed, hop, lo, hi, out):  # type: ignore[no-untyped-def]
    """Make key(seed, epoch, item, hop)."""
    for i in range(lo, hi):
        out[i] = fold(fold(fold(fold(np.uint64(2), seed), epochs[i]), items[i]), hop)
