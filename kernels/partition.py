"""Cut a graph into bins by streaming its nodes, and sort its edges into pieces.

`stream_nodes` places one node after the other by a score of each bin of the node's group: LDG (Stanton and Kliot, KDD
2012, section 3) takes n_b (1 - s_b / C), Fennel (Tsourakakis et al., WSDM 2014, section 4, gamma = 1.5) takes
n_b - 1.5 a sqrt(s_b), with n_b in-neighbours in bin b, s_b nodes in it and C its capacity, which no bin exceeds.
Further passes see the labels of the pass before (Nishimura and Ugander, KDD 2013). Ties go to the emptier bin, then to
the lower one. We see in-edges only, as the store has no others: on a graph with both directions that is all.

A window of the graph is `indptr` int64 [R+1] from 0, `indices` [E] node ids, and `first`, the node of row 0.
Letters: N nodes, R rows of a window, E its edges, G groups, K bins per group. Bin b of group g has label b.
"""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True, inline="always")
def _count(indptr, indices, row, groups, group, labels, counts):  # type: ignore[no-untyped-def]
    """Count a node's in-neighbours per bin of its group; unplaced ones have label -1."""
    counts[:] = 0
    for e in range(indptr[row], indptr[row + 1]):
        source = indices[e]
        if groups[source] == group and labels[source] >= 0:
            counts[labels[source]] += 1


@njit(cache=True, nogil=True, inline="always")
def _choose(counts, sizes, capacity, alpha, fennel):  # type: ignore[no-untyped-def]
    """The bin of the highest score among those with room; -1 where all are full."""
    best = -1
    best_score = 0.0
    for b in range(counts.shape[0]):
        if sizes[b] >= capacity:
            continue
        if fennel:
            score = counts[b] - 1.5 * alpha * np.sqrt(np.float64(sizes[b]))
        else:
            score = counts[b] * (1.0 - sizes[b] / capacity)
        if best < 0 or score > best_score or (score == best_score and sizes[b] < sizes[best]):
            best = b
            best_score = score
    return best


@njit(cache=True, nogil=True)
def stream_nodes(indptr, indices, first, groups, capacity, alpha, fennel, labels, sizes, counts):  # type: ignore[no-untyped-def]
    """Place the nodes of a window, in order.

    `groups` int32 [N], `capacity` int64 [G], `alpha` float64 [G] (Fennel's), `labels` int32 [N] (-1 for not yet placed;
    overwritten), `sizes` int64 [G, K] of this pass, `counts` int64 [K] is scratch.
    """
    for row in range(indptr.shape[0] - 1):
        node = first + row
        group = groups[node]
        _count(indptr, indices, row, groups, group, labels, counts)
        label = _choose(counts, sizes[group], capacity[group], alpha[group], fennel)
        labels[node] = label
        sizes[group, label] += 1


@njit(cache=True, nogil=True)
def settle_nodes(indptr, indices, first, groups, capacity, labels, sizes, counts):  # type: ignore[no-untyped-def]
    """Move nodes of a window out of bins above their capacity, to the bin with room of most in-neighbours."""
    for row in range(indptr.shape[0] - 1):
        node = first + row
        group = groups[node]
        old = labels[node]
        if sizes[group, old] > capacity[group]:
            _count(indptr, indices, row, groups, group, labels, counts)
            label = _choose(counts, sizes[group], capacity[group], 0.0, True)
            labels[node] = label
            sizes[group, old] -= 1
            sizes[group, label] += 1


@njit(cache=True, nogil=True)
def mark_readers(indptr, indices, first, parts, chunks, readers):  # type: ignore[no-untyped-def]
    """Set bit w of `readers` uint8 [N, ceil(W / 8)] of sources with an edge into part w from elsewhere; count cuts.

    Returns how many edges of the window lie between chunks and how many between parts.
    """
    cut = 0
    part_cut = 0
    for row in range(indptr.shape[0] - 1):
        part = parts[first + row]
        chunk = chunks[first + row]
        for e in range(indptr[row], indptr[row + 1]):
            source = indices[e]
            cut += chunks[source] != chunk
            if parts[source] != part:
                part_cut += 1
                readers[source, part >> 3] |= np.uint8(1 << (part & 7))
    return cut, part_cut


@njit(cache=True, nogil=True)
def collect_edges(indptr, values, first, pieces, cursors, out):  # type: ignore[no-untyped-def]
    """Append each row's values [E] to its piece in `out`, at `cursors` int64 [pieces], which advance; -1 skips one."""
    for row in range(indptr.shape[0] - 1):
        at = cursors[pieces[first + row]]
        if at >= 0:
            for e in range(indptr[row], indptr[row + 1]):
                out[at] = values[e]
                at += 1
            cursors[pieces[first + row]] = at
