"""Number the rows of pieces: who lies where in which slab, and what a piece reads from whom.

Piece w * K + c is the part w of logical chunk c. A part's slab of chunk c holds its own nodes by id, then its mirrors:
nodes of the other parts' pieces of c that some chunk of this part reads, by part and id. Memory: about 24 bytes and a
bit per part for each node.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.compact import clear_table, compact_table, fill_table
from penstock.kernels.partition import mark_readers
from penstock.sampler.chunking.windows import edge_windows
from penstock.storage.graph import GraphStore, id_dtype

_SCAN_NODES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Which nodes are in which piece: `parts`, `chunks` and `pieces` int32 [N]; `order` lists nodes by piece, then id;
    piece p's lie at `starts[p]:starts[p+1]`, with `edges[p]` in-edges, and node v is its `local[v]`-th.
    """

    num_parts: int
    num_chunks: int
    parts: NDArray[np.int32]
    chunks: NDArray[np.int32]
    pieces: NDArray[np.int32]
    order: NDArray[Any]
    starts: NDArray[np.int64]
    edges: NDArray[np.int64]
    local: NDArray[np.int32]

    def own(self, part: int, chunk: int) -> NDArray[Any]:
        """Node ids of a piece, ascending."""
        piece = part * self.num_chunks + chunk
        return self.order[self.starts[piece] : self.starts[piece + 1]]


def number_pieces(
    graph: GraphStore, parts: NDArray[np.int32], chunks: NDArray[np.int32], num_parts: int, num_chunks: int
) -> Pieces:
    """Sort nodes by piece. ValueError names a piece without nodes."""
    pieces = (parts * np.int32(num_chunks) + chunks).astype(np.int32)
    sizes = np.bincount(pieces, minlength=num_parts * num_chunks)
    if len(empty := np.flatnonzero(sizes == 0)):
        part, chunk = divmod(int(empty[0]), num_chunks)
        raise ValueError(f"chunk {chunk} has no node in part {part}; use fewer chunks or parts than {num_chunks}")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    order = np.argsort(pieces, kind="stable").astype(id_dtype(graph.num_nodes))
    local = np.empty(graph.num_nodes, np.int32)
    edges = np.zeros(len(sizes), np.int64)
    for piece in range(len(sizes)):
        local[order[starts[piece] : starts[piece + 1]]] = np.arange(sizes[piece], dtype=np.int32)
    for lo in range(0, graph.num_nodes, _SCAN_NODES):
        hi = min(lo + _SCAN_NODES, graph.num_nodes)
        degrees = np.diff(graph.indptr[lo : hi + 1])
        edges += np.bincount(pieces[lo:hi], weights=degrees, minlength=len(sizes)).astype(np.int64)
    return Pieces(
        num_parts=num_parts,
        num_chunks=num_chunks,
        parts=parts,
        chunks=chunks,
        pieces=pieces,
        order=order,
        starts=starts,
        edges=edges,
        local=local,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """Which parts read a node of another part: bit w of `bits` uint8 [N, ceil(W / 8)]; and the edges that are cut."""

    bits: NDArray[np.uint8]
    cut_edges: int
    part_cut_edges: int

    def of_part(self, part: int, nodes: NDArray[Any] | slice) -> NDArray[np.bool_]:
        """Whether a part mirrors each of some nodes."""
        return np.asarray(self.bits[nodes, part >> 3] & (1 << (part & 7))).astype(np.bool_)


def find_readers(graph: GraphStore, pieces: Pieces, num_bytes: int) -> Readers:
    """Look at every edge once, in windows of `num_bytes`."""
    bits = np.zeros((graph.num_nodes, -(-pieces.num_parts // 8)), np.uint8)
    cut = part_cut = 0
    for window in edge_windows(graph, num_bytes):
        counts = mark_readers(window.indptr, window.indices, window.first, pieces.parts, pieces.chunks, bits)
        cut, part_cut = cut + int(counts[0]), part_cut + int(counts[1])
    return Readers(bits=bits, cut_edges=cut, part_cut_edges=part_cut)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slabs:
    """A part's slabs: `rows` int32 [N], the slab row of each node that the part has, else anything; `mirrors` int64
    [K, W], mirror rows of each chunk from each part.
    """

    rows: NDArray[np.int32]
    mirrors: NDArray[np.int64]


def lay_slabs(pieces: Pieces, readers: Readers, part: int) -> Slabs:
    """Give every own and mirrored node of a part its slab row."""
    rows = pieces.local.copy()
    ids = np.flatnonzero(readers.of_part(part, slice(None)))
    keys = pieces.chunks[ids].astype(np.int64) * pieces.num_parts + pieces.parts[ids]
    mirrors = np.bincount(keys, minlength=pieces.num_chunks * pieces.num_parts).reshape(pieces.num_chunks, -1)
    ids = ids[np.argsort(keys, kind="stable")]
    first = part * pieces.num_chunks
    own_sizes = np.diff(pieces.starts[first : first + pieces.num_chunks + 1])
    chunk_sizes = mirrors.sum(axis=1)
    before = np.cumsum(chunk_sizes) - chunk_sizes
    rows[ids] = np.arange(len(ids)) + np.repeat(own_sizes - before, chunk_sizes)
    return Slabs(rows=rows, mirrors=mirrors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linked:
    """What a piece reads: `indices` int32 [E] local source ids; `halo` ids, their `slab_rows` and `offsets` [K+1]."""

    indices: NDArray[np.int32]
    halo: NDArray[Any]
    slab_rows: NDArray[np.int32]
    offsets: NDArray[np.int64]


def link_piece(
    pieces: Pieces, slabs: Slabs, own: NDArray[Any], sources: NDArray[Any], table: NDArray[np.int32]
) -> Linked:
    """Turn a piece's edge sources (node ids [E], in edge order) into local ids.

    `table` int32 [N] is -1 throughout, before and after. Halo rows go by writer chunk, then by slab row.
    """
    num_own = len(own)
    nodes = np.empty(min(num_own + len(sources), len(table)) + 1, sources.dtype)
    nodes[:num_own] = own
    local = np.empty(len(sources), np.int32)
    fill_table(nodes, 0, num_own, table)
    count = compact_table(sources, 0, len(sources), table, nodes, num_own, local)
    clear_table(nodes, 0, count, table)
    halo = nodes[num_own:count]
    order = np.lexsort((slabs.rows[halo], pieces.chunks[halo]))
    place = np.arange(count, dtype=np.int32)
    place[num_own:][order] = np.arange(num_own, count, dtype=np.int32)
    halo = halo[order]
    counts = np.bincount(pieces.chunks[halo], minlength=pieces.num_chunks)
    return Linked(
        indices=place[local],
        halo=halo,
        slab_rows=slabs.rows[halo],
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )
