"""Twins of `seeds`."""

from penstock.kernels.reference_rng import draw, fold


def hash_ids(ids, seed, epoch, lo, hi, out):  # type: ignore[no-untyped-def]
    """Hash ids for the epoch's order."""
    key = fold(fold(1, seed), epoch)
    for i in range(lo, hi):
        out[i] = draw(fold(key, ids[i]), 0)


def hop_keys(items, epochs, seed, hop, lo, hi, out):  # type: ignore[no-untyped-def]
    """Make key(seed, epoch, item, hop)."""
    for i in range(lo, hi):
        out[i] = fold(fold(fold(fold(2, seed), epochs[i]), items[i]), hop)
