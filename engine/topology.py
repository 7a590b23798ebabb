"""Blocks over all in-neighbours, cut so that each fits a number of bytes.

Letters: D destinations, S sources, E edges of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.engine.minibatch import Block
from penstock.storage.directio import PAGE
from penstock.storage.graph import GraphStore
from penstock.storage.npyfile import open_npy

_MAX_WINDOW = 1 << 22  # destinations whose degrees are looked at together
_MAX_EDGES = 2**31 - 1
_SCAN_ROWS, _SCAN_EDGES = 1 << 16, 1 << 20  # of the topology that are looked at together for self-loops


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkCosts:
    """Bytes that a chunk needs per source, destination and edge: ids, rows, and the layer's temporaries."""

    source: int
    destination: int
    edge: int
    num_nodes: int

    def chunk(self, num_dst: Any, num_edges: Any) -> Any:
        """Bytes of a chunk, at most: as if no source were shared, but never more than all nodes."""
        sources = np.minimum(num_dst + num_edges, self.num_nodes)
        return sources * self.source + num_dst * self.destination + num_edges * self.edge


def count_self_loops(graph: GraphStore) -> NDArray[Any] | None:
    """Edges [N] from each node to itself, in the smallest unsigned type; None where the graph has none. One scan."""
    found: NDArray[Any] = np.zeros(0, np.uint8)
    every = InEdges(graph, None)
    for first in range(0, graph.num_nodes, _SCAN_ROWS):
        starts, ends = every.bounds(first, min(first + _SCAN_ROWS, graph.num_nodes))
        for lo in range(int(starts[0]), int(ends[-1]), _SCAN_EDGES):
            hi = min(lo + _SCAN_EDGES, int(ends[-1]))
            sources = every.edges("indices", every.id_type, np.array([lo]), np.array([hi]))
            rows = first + np.searchsorted(ends, np.arange(lo, hi), side="right")
            nodes, counts = np.unique(rows[sources == rows], return_counts=True)
            if len(nodes):
                found = found if len(found) else np.zeros(graph.num_nodes, np.uint8)
                total = found[nodes] + counts  # int64; a node's edges may lie in two pieces
                found = found.astype(np.promote_types(found.dtype, np.min_scalar_type(int(total.max()))), copy=False)
                found[nodes] = total
    return found if len(found) else None


class InEdges:
    """In-edges of destinations, read and not mapped, so that they count only while a chunk holds them.

    `loops` [N], see `count_self_loops`, go along with degrees.
    """

    def __init__(self, graph: GraphStore, ids: NDArray[Any] | None, loops: NDArray[Any] | None = None) -> None:
        for name in ("indptr.npy", "indices.npy", *["edge_weights.npy"] * graph.meta.has_edge_weights):
            graph.verify(name)
        self._graph, self._ids, self._loops = graph, ids, loops
        self.id_type = graph.manifest.file("indices.npy").dtype
        self.num_dst = graph.num_nodes if ids is None else len(ids)

    def bounds(self, lo: int, hi: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and past-the-last edge of destinations lo..hi-1."""
        if self._ids is not None:
            ids = self._ids[lo:hi]
            return self._graph.indptr[ids], self._graph.indptr[ids + 1]
        offset = PAGE + 8 * lo
        indptr = np.fromfile(self._graph.path / "indptr.npy", np.int64, hi - lo + 1, offset=offset)
        return indptr[:-1], indptr[1:]

    def destinations(self, lo: int, hi: int) -> NDArray[Any]:
        """Node ids of destinations lo..hi-1."""
        return np.arange(lo, hi) if self._ids is None else self._ids[lo:hi].astype(np.int64)

    def edges(self, name: str, dtype: Any, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[Any]:
        """Values of `name`.npy of the edges between the bounds."""
        path, dtype = self._graph.path / f"{name}.npy", np.dtype(dtype)
        if self._ids is None:
            count = int(ends[-1] - starts[0])
            return np.fromfile(path, dtype, count, offset=PAGE + dtype.itemsize * int(starts[0]))
        degrees = ends - starts
        shifts = np.repeat(starts - np.concatenate([[0], np.cumsum(degrees)[:-1]]), degrees)
        return open_npy(path)[shifts + np.arange(int(degrees.sum()))]

    @cached_property
    def max_degree(self) -> int:
        """The largest in-degree of a destination."""
        most = 0
        for lo in range(0, self.num_dst, _MAX_WINDOW):
            starts, ends = self.bounds(lo, min(lo + _MAX_WINDOW, self.num_dst))
            most = max(most, int((ends - starts).max()))
        return most

    def chunks(self, costs: ChunkCosts, budget: int) -> Iterator[tuple[int, int]]:
        """Cut the destinations into ranges that fit; a single one is never cut, whatever it needs."""
        window = int(min(_MAX_WINDOW, max(1, budget // costs.destination)))
        lo = 0
        while lo < self.num_dst:
            starts, ends = self.bounds(lo, min(lo + window, self.num_dst))
            edges = np.cumsum(ends - starts)
            fitting = np.searchsorted(costs.chunk(np.arange(1, len(starts) + 1), edges), budget, side="right")
            local = np.searchsorted(edges, _MAX_EDGES)  # a block counts its edges in int32
            hi = lo + max(1, int(min(fitting, local)))
            yield lo, hi
            lo = hi

    def block(self, lo: int, hi: int, with_degrees: bool) -> tuple[Block, NDArray[Any], NDArray[Any]]:
        """The block of destinations lo..hi-1 over all in-neighbours; its destinations; its other sources, ascending."""
        starts, ends = self.bounds(lo, hi)
        dst = self.destinations(lo, hi)
        neighbours = self.edges("indices", self.id_type, starts, ends)
        unique = np.unique(neighbours)
        others = np.setdiff1d(unique, dst, assume_unique=True).astype(np.int64)
        # destinations are the first sources; the rest follow in order
        at = np.searchsorted(dst, unique)
        is_dst = np.minimum(at, len(dst) - 1)
        is_dst = dst[is_dst] == unique
        local = np.empty(len(unique), np.int32)
        local[is_dst] = at[is_dst]
        local[~is_dst] = len(dst) + np.arange(len(others))
        indices = local[np.searchsorted(unique, neighbours)]
        indptr = np.zeros(hi - lo + 1, np.int32)
        np.cumsum(ends - starts, out=indptr[1:])
        weights = None
        if self._graph.meta.has_edge_weights:
            weights = torch.from_numpy(self.edges("edge_weights", np.float32, starts, ends))
        degrees = loops = None
        if with_degrees:
            table, rest = self._graph.indptr, others
            found = np.concatenate([ends - starts, table[rest + 1] - table[rest]])
            degrees = torch.from_numpy(found.astype(np.int32))
            if self._loops is not None:
                loops = torch.from_numpy(self._loops[np.concatenate([dst, others])].astype(np.int32))
        block = Block(
            num_src=len(dst) + len(others),
            num_dst=len(dst),
            indptr=torch.from_numpy(indptr),
            indices=torch.from_numpy(indices),
            edge_weights=weights,
            src_degrees=degrees,
            src_loops=loops,
        )
        return block, dst, others
