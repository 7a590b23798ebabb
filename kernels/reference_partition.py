"""Twins of `partition`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def _counts(sources: NDArray[Any], groups: NDArray[Any], group: int, labels: NDArray[Any], num_bins: int) -> Any:
    """Neighbours per bin: those placed, and of the group."""
    ours = sources[(groups[sources] == group) & (labels[sources] >= 0)]
    return np.bincount(labels[ours], minlength=num_bins)


def _best(scores: NDArray[Any], sizes: NDArray[Any], capacity: int) -> int:
    """Highest score with room, then emptiest, then lowest; -1 if all are full."""
    open_bins = [b for b in range(len(sizes)) if sizes[b] < capacity]
    return min(open_bins, key=lambda b: (-scores[b], sizes[b], b), default=-1)


def stream_nodes(indptr, indices, first, groups, capacity, alpha, fennel, labels, sizes, counts):  # type: ignore[no-untyped-def]
    """Place nodes one by one."""
    for row in range(len(indptr) - 1):
        group = groups[first + row]
        counts[:] = _counts(indices[indptr[row] : indptr[row + 1]], groups, group, labels, len(counts))
        if fennel:
            scores = counts - 1.5 * alpha[group] * np.sqrt(sizes[group])
        else:
            scores = counts * (1 - sizes[group] / capacity[group])
        label = _best(scores, sizes[group], capacity[group])
        labels[first + row] = label
        sizes[group, label] += 1


def settle_nodes(indptr, indices, first, groups, capacity, labels, sizes, counts):  # type: ignore[no-untyped-def]
    """Move nodes out of bins that are too full."""
    for row in range(len(indptr) - 1):
        group, old = groups[first + row], labels[first + row]
        if sizes[group, old] > capacity[group]:
            counts[:] = _counts(indices[indptr[row] : indptr[row + 1]], groups, group, labels, len(counts))
            label = _best(counts, sizes[group], capacity[group])
            labels[first + row] = label
            sizes[group, old] -= 1
            sizes[group, label] += 1


def mark_readers(indptr, indices, first, parts, chunks, readers):  # type: ignore[no-untyped-def]
    """Set a bit per part that reads a node from elsewhere, count cut edges."""
    nodes = first + np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    far = parts[indices] != parts[nodes]
    into = parts[nodes[far]]
    np.bitwise_or.at(readers, (indices[far], into // 8), (1 << into % 8).astype(np.uint8))
    return int((chunks[indices] != chunks[nodes]).sum()), int(far.sum())


def collect_edges(indptr, values, first, pieces, cursors, out):  # type: ignore[no-untyped-def]
    """Append values to their pieces."""
    for row in range(len(indptr) - 1):
        piece, run = pieces[first + row], values[indptr[row] : indptr[row + 1]]
        if cursors[piece] >= 0:
            out[cursors[piece] : cursors[piece] + len(run)] = run
            cursors[piece] += len(run)
