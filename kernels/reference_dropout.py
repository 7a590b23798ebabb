"""Twins of `dropout`."""

from penstock.kernels.reference_rng import draw, fold


def epoch_key(seed, epoch):  # type: ignore[no-untyped-def]
    """Make the key of an epoch."""
    return fold(fold(3, seed), epoch)


def _drop_row(x, row, key, threshold, scale, out):  # type: ignore[no-untyped-def]
    for f in range(x.shape[1]):
        bits = (draw(key, f // 4) >> (16 * (f % 4))) & 0xFFFF
        out[row, f] = x[row, f] * scale if bits >= threshold else 0


def drop_nodes(x, ids, key, layer, salt, threshold, scale, out, lo, hi):  # type: ignore[no-untyped-def]
    """Drop values of nodes."""
    root = fold(fold(key, layer), salt)
    for row in range(lo, hi):
        _drop_row(x, row, fold(root, ids[row]), threshold, scale, out)  # type: ignore[no-untyped-call]


def drop_edges(x, indptr, indices, ids, key, layer, salt, threshold, scale, out, lo, hi):  # type: ignore[no-untyped-def]
    """Drop values of edges."""
    root = fold(fold(key, layer), salt)
    for v in range(lo, hi):
        for e in range(indptr[v], indptr[v + 1]):
            _drop_row(x, e, fold(fold(root, ids[indices[e]]), ids[v]), threshold, scale, out)  # type: ignore[no-untyped-call]
