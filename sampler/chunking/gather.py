"""Hand out the edges of one piece after the other, under a memory budget.

The edges are streamed once per group of pieces whose edges fit in memory together: the disk sees few reads, all of them
sequential, whatever the order of the nodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.partition import collect_edges
from penstock.sampler.chunking.pieces import Pieces
from penstock.sampler.chunking.windows import WINDOWS, choose_window, edge_bytes, edge_windows, least_window
from penstock.storage.errors import DoesNotFit
from penstock.storage.graph import GraphStore

# Labels, order, numbers, tables, scratch and mapped offsets, per node, and a bit per part; sorting mirrors takes more.
# On a graph of 16 million edges the measured peaks were 73 to 96 % of the budget.
_NODE_BYTES, _MIRROR_BYTES = 44, 40
MAX_LOCAL = 2**31 - 1  # offsets and local ids of a chunk are int32


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceMemory:
    """How the budget is spent: on windows of the graph, and on the edges of a group of pieces."""

    window_bytes: int
    group_bytes: int


def check_local(count: int, what: str, pieces: Pieces, piece: int) -> None:
    """Raise DoesNotFit where a piece has more edges or rows than int32 can number."""
    if count > MAX_LOCAL:
        part, chunk = divmod(piece, pieces.num_chunks)
        raise DoesNotFit(
            f"chunk {chunk} of part {part} has {count} {what}, a chunk holds {MAX_LOCAL}; use more chunks than "
            f"{pieces.num_chunks}"
        )


def plan_memory(graph: GraphStore, pieces: Pieces, host_memory: int) -> PieceMemory:
    """Divide the budget; DoesNotFit names the smallest that would do, and a piece that is too large to number."""
    largest = int(pieces.edges.argmax())
    check_local(int(pieces.edges[largest]), "in-edges", pieces, largest)
    weights = graph.meta.has_edge_weights
    per_edge = edge_bytes(graph, weights)
    per_node = _NODE_BYTES + -(-pieces.num_parts // 8) + _MIRROR_BYTES * (pieces.num_parts > 1)
    fixed = per_node * graph.num_nodes
    edges = int(pieces.edges[largest])
    rows = min(graph.num_nodes, int(np.diff(pieces.starts).max()) + edges)
    working = 8 * edges + (32 + graph.id_dtype.itemsize) * rows  # of link_piece
    least = least_window(graph, weights=weights)
    spare = host_memory - fixed - working - edges * per_edge - WINDOWS * least
    if spare < 0:
        raise DoesNotFit(
            f"chunking needs {host_memory - spare} bytes of host memory: {fixed} for {graph.num_nodes} nodes, the rest "
            f"for windows and the largest chunk of {edges} edges; --host-memory gives {host_memory}: raise it, or use "
            "more chunks",
            host_bytes=host_memory - spare,
        )
    windows = choose_window(least, least + spare // 8)
    return PieceMemory(window_bytes=windows, group_bytes=host_memory - fixed - working - WINDOWS * windows)


def _groups(pieces: Pieces, max_edges: int) -> Iterator[tuple[int, int]]:
    """Consecutive pieces lo..hi-1 whose edges are at most `max_edges`, or single ones."""
    lo, num_pieces = 0, len(pieces.edges)
    while lo < num_pieces:
        hi = lo + 1
        while hi < num_pieces and int(pieces.edges[lo : hi + 1].sum()) <= max_edges:
            hi += 1
        yield lo, hi
        lo = hi


def piece_edges(
    graph: GraphStore, pieces: Pieces, memory: PieceMemory
) -> Iterator[tuple[NDArray[Any], NDArray[np.float32] | None]]:
    """For each piece in order, the sources [E] of its in-edges, destinations ascending, and weights."""
    weighted = graph.meta.has_edge_weights
    for lo, hi in _groups(pieces, memory.group_bytes // edge_bytes(graph, weighted)):
        starts = np.concatenate([[0], np.cumsum(pieces.edges[lo:hi])])
        sources = np.empty(int(starts[-1]), graph.indices.dtype)
        weights = np.empty(len(sources), np.float32) if weighted else None
        cursors = np.full(len(pieces.edges), -1, np.int64)
        cursors[lo:hi] = starts[:-1]
        for window in edge_windows(graph, memory.window_bytes, weights=weighted):
            if weights is not None:
                same = cursors.copy()
                collect_edges(window.indptr, window.edge_weights, window.first, pieces.pieces, same, weights)
            collect_edges(window.indptr, window.indices, window.first, pieces.pieces, cursors, sources)
        for n in range(hi - lo):
            cut = slice(int(starts[n]), int(starts[n + 1]))
            yield sources[cut], None if weights is None else weights[cut]
