"""Stream the in-edges of a graph store in order of their destinations, a bounded number at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.storage.budget import MIB
from penstock.storage.graph import GraphStore
from penstock.storage.npyfile import drop_pages

_MAX_WINDOW_BYTES = 64 * MIB  # larger ones are no faster
_MIN_WINDOW_BYTES = MIB
_SCAN_NODES = 1 << 20
WINDOWS = 3  # offsets with their scratch, mapped pages, and the copy


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeWindow:
    """In-edges of nodes first..first+R-1: `indptr` int64 [R+1] from 0, `indices` [E] node ids, weights float32 [E]."""

    first: int
    indptr: NDArray[np.int64]
    indices: NDArray[Any]
    edge_weights: NDArray[np.float32] | None


def edge_bytes(graph: GraphStore, weights: bool) -> int:
    """Bytes of one edge in a window."""
    return graph.id_dtype.itemsize + 4 * weights


def least_window(graph: GraphStore, *, weights: bool = False) -> int:
    """The smallest window in bytes: one node of the largest in-degree, or 1 MiB. Reads all of `indptr`."""
    largest = 0
    for lo in range(0, graph.num_nodes, _SCAN_NODES):
        hi = min(lo + _SCAN_NODES, graph.num_nodes)
        largest = max(largest, int(np.diff(graph.indptr[lo : hi + 1]).max()))
    return max(_MIN_WINDOW_BYTES, largest * edge_bytes(graph, weights) + 16)


def choose_window(least: int, spare: int) -> int:
    """A window's bytes where `spare` of memory are left for it: up to 64 MiB."""
    return max(least, min(spare, _MAX_WINDOW_BYTES))


def edge_windows(graph: GraphStore, num_bytes: int, *, weights: bool = False) -> Iterator[EdgeWindow]:
    """Read all in-edges once, in windows of at most `num_bytes`, which take up to `WINDOWS` times that of memory."""
    lo, per_edge, table = 0, edge_bytes(graph, weights), graph.edge_weights if weights else None
    while lo < graph.num_nodes:
        # a row costs its offset, so that nodes without edges do not make a window endless
        ends = np.array(graph.indptr[lo : lo + num_bytes // 16 + 1])
        cost = (ends - ends[0]) * per_edge + 8 * np.arange(len(ends))
        rows = max(1, min(int(np.searchsorted(cost, num_bytes, side="right")) - 1, len(ends) - 1))
        start, stop = int(ends[0]), int(ends[rows])
        window = EdgeWindow(
            first=lo,
            indptr=ends[: rows + 1] - start,
            indices=np.array(graph.indices[start:stop]),
            edge_weights=np.array(table[start:stop]) if table is not None else None,
        )
        for array in (graph.indptr, graph.indices, table):
            if array is not None:
                drop_pages(array)  # they are copied, and would count as memory of ours
        yield window
        lo += rows
