"""Dropout whose mask is a hash of what it is for: no generator, no stored mask, the same bits on any machine.

A row belongs to a node or to an edge and a column to a feature or a head. The key of a row folds, with `rng`,
(key, layer, salt) and the node's id, or the ids of the edge's source and destination; four columns share one hash of
that key, 16 bits each. A value is kept where its 16 bits are at least `threshold`, so p is a multiple of 1/65536. Kept
values are multiplied by `scale`, others become 0. The gradient is the same function of the output's gradient.

Letters: N nodes, E edges, F columns.
"""

import numpy as np
from numba import njit
from numpy import int64, uint16, uint64

from penstock.kernels.rng import draw, fold

_EPOCH = uint64(3)  # 1 and 2 are the domains of `seeds`


@njit(cache=True, nogil=True)
def epoch_key(seed, epoch):  # type: ignore[no-untyped-def]
    """Key uint64 of all masks of an epoch."""
    return fold(fold(_EPOCH, seed), epoch)


@njit(cache=True, nogil=True, inline="always")
def _drop_row(x, row, key, threshold, scale, words, lanes, out):  # type: ignore[no-untyped-def]
    """Two passes over a row, since compilers make vector code of each; `lanes` is a view of `words`, little-endian."""
    for word in range(len(words)):
        words[word] = draw(key, word)
    zero = scale - scale  # of the type of the values
    for f in range(x.shape[1]):
        out[row, f] = x[row, f] * scale if lanes[f] >= threshold else zero


@njit(cache=True, nogil=True)
def drop_nodes(x, ids, key, layer, salt, threshold, scale, out, lo, hi):  # type: ignore[no-untyped-def]
    """Drop values of rows lo..hi-1 of `x` float [N, F], row n of node `ids` int64 [N][n]; `scale` is of x's type."""
    root, least = fold(fold(uint64(key), layer), salt), uint16(threshold)
    words = np.empty((x.shape[1] + 3) // 4, np.uint64)
    lanes = words.view(np.uint16)
    for row in range(lo, hi):
        _drop_row(x, row, fold(root, ids[row]), least, scale, words, lanes, out)


@njit(cache=True, nogil=True)
def drop_edges(x, indptr, indices, ids, key, layer, salt, threshold, scale, out, lo, hi):  # type: ignore[no-untyped-def]
    """Drop values of `x` float [E, F], row e of edge e, for the in-edges of destinations lo..hi-1 of a block.

    `ids` int64 are those of the block's sources. Edges between the same two nodes share their mask.
    """
    root, least = fold(fold(uint64(key), layer), salt), uint16(threshold)
    words = np.empty((x.shape[1] + 3) // 4, np.uint64)
    lanes = words.view(np.uint16)
    for v in range(lo, hi):
        for e in range(int64(indptr[v]), int64(indptr[v + 1])):
            _drop_row(x, e, fold(fold(root, ids[indices[e]]), ids[v]), least, scale, words, lanes, out)
