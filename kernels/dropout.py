"""Dropout whose mask is a hash of what it is for: no generator, no stored mask, the same bits on any machine.

A row belongs to a node or to an edge and a column to a feature or a head. The key of a row folds, with `rng`,
(key, layer, salt) and the node's id, or the ids of the edge's source and destination; four columns share one hash of
that key, 16 bits each. A value is kept where its 16 bits are at least `threshold`, so p is a multiple of 1/65536. Kept
values are multiplied by `scale`, others become 0. The gradient is the same function of the output's gradient.

Letters: N nodes, E edges, F columns.
"""

from numba import njit
from numpy import int64, uint64

from penstock.kernels.rng import draw, fold

_LANE = uint64(0xFFFF)
_S16, _S32, _S48 = uint64(16), uint64(32), uint64(48)
_EPOCH = uint64(3)  # 1 and 2 are the domains of `seeds`


@njit(cache=True, nogil=True)
def epoch_key(seed, epoch):  # type: ignore[no-untyped-def]
    """Key uint64 of all masks of an epoch."""
    return fold(fold(_EPOCH, seed), epoch)


@njit(cache=True, nogil=True, inline="always")
def _drop_row(x, row, key, threshold, scale, out):  # type: ignore[no-untyped-def]
    width = x.shape[1]
    zero = scale - scale  # of the type of the values
    whole = width - width % 4
    for f in range(0, whole, 4):
        bits = draw(key, f // 4)
        out[row, f] = x[row, f] * scale if (bits & _LANE) >= threshold else zero
        out[row, f + 1] = x[row, f + 1] * scale if ((bits >> _S16) & _LANE) >= threshold else zero
        out[row, f + 2] = x[row, f + 2] * scale if ((bits >> _S32) & _LANE) >= threshold else zero
        out[row, f + 3] = x[row, f + 3] * scale if (bits >> _S48) >= threshold else zero
    if whole < width:
        bits = draw(key, whole // 4)
        for f in range(whole, width):
            out[row, f] = x[row, f] * scale if (bits & _LANE) >= threshold else zero
            bits = bits >> _S16


@njit(cache=True, nogil=True)
def drop_nodes(x, ids, key, layer, salt, threshold, scale, out, lo, hi):  # type: ignore[no-untyped-def]
    """Drop values of rows lo..hi-1 of `x` float [N, F], row n of node `ids` int64 [N][n]; `scale` is of x's type."""
    root, least = fold(fold(uint64(key), layer), salt), uint64(threshold)
    for row in range(lo, hi):
        _drop_row(x, row, fold(root, ids[row]), least, scale, out)


@njit(cache=True, nogil=True)
def drop_edges(x, indptr, indices, ids, key, layer, salt, threshold, scale, out, lo, hi):  # type: ignore[no-untyped-def]
    """Drop values of `x` float [E, F], row e of edge e, for the in-edges of destinations lo..hi-1 of a block.

    `ids` int64 are those of the block's sources. Edges between the same two nodes share their mask.
    """
    root, least = fold(fold(uint64(key), layer), salt), uint64(threshold)
    for v in range(lo, hi):
        for e in range(int64(indptr[v]), int64(indptr[v + 1])):
            _drop_row(x, e, fold(fold(root, ids[indices[e]]), ids[v]), least, scale, out)
