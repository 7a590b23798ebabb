"""One hop, shared by both modes: count the picks of each destination, then pick.

Item by item and hop by hop differ in which destinations they hand over and in what order, never in what is drawn.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.compact import gather_flat
from penstock.kernels.sample import count_edges, pick_replace, pick_uniform
from penstock.kernels.sample_weighted import (
    count_weighted,
    pick_labor,
    pick_labor_weighted,
    pick_positive,
    pick_weighted,
    pick_weighted_replace,
)
from penstock.kernels.weigh import weigh_draws
from penstock.storage.errors import DataError
from penstock.storage.graph import GraphStore
from penstock.storage.trace import TraceMeta


class Scratch:
    """Named arrays that only grow, so that a steady state allocates nothing. Each thread has its own."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def take(self, name: str, length: int, dtype: Any) -> NDArray[Any]:
        """Lend at least `length` elements, with whatever was in them; the same memory as last time if it fits."""
        array = self._arrays.get(name)
        if array is None or len(array) < length or array.dtype != dtype:
            array = self._arrays[name] = np.empty(length + length // 4, dtype)
        return array

    def zeros(self, name: str, length: int, dtype: Any) -> NDArray[Any]:
        """Lend an array that is zero; the borrower leaves it zero."""
        array = self._arrays.get(name)
        if array is None or len(array) < length:
            array = self._arrays[name] = np.zeros(length + length // 4, dtype)
        return array


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """Destinations of a hop [D] and where their picks go: `offsets` int64 [D+1] into the hop's edges."""

    nodes: NDArray[Any]
    slots: NDArray[np.int32]
    keys: NDArray[np.uint64]
    num_dst: int
    fanout: int
    starts: NDArray[np.int64]
    degrees: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @property
    def num_edges(self) -> int:
        """E of the hop."""
        return int(self.offsets[self.num_dst])


class Topology:
    """The memory-mapped in-neighbours of a graph, and how to draw from them."""

    def __init__(self, graph: GraphStore, meta: TraceMeta) -> None:
        self.indptr, self.indices, self.weights = graph.indptr, graph.indices, graph.edge_weights
        self.meta = meta

    def count(
        self,
        nodes: NDArray[Any],
        slots: NDArray[np.int32],
        keys: NDArray[np.uint64],
        num_dst: int,
        fanout: int,
        scratch: Scratch,
    ) -> Hop:
        """First pass: where the neighbours of `nodes[:num_dst]` lie and how many are picked of each."""
        hop = Hop(
            nodes=nodes,
            slots=slots,
            keys=keys,
            num_dst=num_dst,
            fanout=fanout,
            starts=scratch.take("starts", num_dst, np.int64),
            degrees=scratch.take("degrees", num_dst, np.int64),
            offsets=scratch.take("offsets", num_dst + 1, np.int64),
        )
        hop.offsets[0] = 0
        out = (hop.starts, hop.degrees, hop.offsets)
        if self.meta.weighted:
            found = count_weighted(self.indptr, self.weights, nodes, 0, num_dst, fanout, self.meta.replace, *out)
            self._check_weight(int(found))
        else:
            count_edges(self.indptr, nodes, 0, num_dst, fanout, self.meta.replace, *out)
        np.cumsum(hop.offsets[: num_dst + 1], out=hop.offsets[: num_dst + 1])
        return hop

    def _check_weight(self, position: int) -> None:
        """DataError where a position is one: the weight there is negative or not finite."""
        if position < 0:
            return
        assert self.weights is not None
        node = int(np.searchsorted(self.indptr, position, side="right")) - 1
        edge = f"{int(self.indices[position])} to node {node} (position {position} of edge_weights.npy)"
        raise DataError(
            f"the edge from node {edge} has weight {float(self.weights[position]):g}; weights are finite and, to draw "
            "by them, not negative: ingest the graph again with such weights"
            f"{', or set sampler.weighted=false' if self.meta.weighted else ''}"
        )

    def pick(self, hop: Hop, scratch: Scratch) -> NDArray[np.int64]:
        """Second pass: positions in `indices` of all picks, ascending within a destination."""
        positions = scratch.take("positions", hop.num_edges, np.int64)
        around = (hop.starts, hop.degrees, hop.offsets, 0, hop.num_dst)
        who = (hop.nodes, hop.slots, hop.keys)
        if self.meta.weighted and hop.fanout < 0:
            pick_positive(self.weights, *around, positions)
        elif self.meta.method == "labor" and hop.fanout >= 0:
            heap = scratch.take("heap", hop.fanout, np.float64)
            if self.meta.weighted:
                pick_labor_weighted(self.indices, self.weights, *who, *around, heap, positions)
            else:
                pick_labor(self.indices, *who, *around, heap, positions)
        elif self.meta.weighted:
            pick = pick_weighted_replace if self.meta.replace else pick_weighted
            pick(self.weights, *who, *around, scratch.take("heap", hop.fanout, np.float64), positions)
        elif self.meta.replace and hop.fanout >= 0:
            pick_replace(*who, *around, positions)
        else:
            largest = int(hop.degrees[: hop.num_dst].max(initial=0)) if hop.fanout > 0 else 0
            pick_uniform(*who, *around, scratch.zeros("bitmap", largest // 64 + 1, np.uint64), positions)
        return positions

    def gather(self, positions: NDArray[np.int64], num_edges: int, ids: NDArray[Any]) -> None:
        """Write the neighbours at `positions[:num_edges]` to `ids`."""
        gather_flat(self.indices, positions, 0, num_edges, ids)

    @property
    def edge_values(self) -> tuple[str, ...]:
        """Names of the values that picks carry: their edges' own weights, and where they were drawn by weight what each
        counts."""
        return () if self.weights is None else ("edge_weights", "draw_weights")[: 1 + self.meta.weighted]

    def fill(
        self, name: str, hop: Hop, positions: NDArray[np.int64], scratch: Scratch, out: NDArray[np.float32]
    ) -> None:
        """Write the values of a name of `edge_values` of a hop's picks to `out`."""
        if name == "draw_weights" and hop.fanout >= 0:
            self._weigh(hop, positions, scratch, out)
        else:
            self._gather_weights(positions, hop.num_edges, out)

    def _weigh(self, hop: Hop, positions: NDArray[np.int64], scratch: Scratch, out: NDArray[np.float32]) -> None:
        weigh: Any = weigh_draws  # more arguments than Numba's types know of
        weigh(
            self.indices,
            self.weights,
            *(hop.nodes, hop.slots, hop.keys, hop.starts, hop.degrees, hop.offsets, 0, hop.num_dst),
            self.meta.method == "labor",
            self.meta.replace,
            *(scratch.take(name, hop.fanout, np.float64) for name in ("by_position", "in_order")),
            scratch.take("places", hop.fanout, np.int64),
            positions,
            out,
        )

    def _gather_weights(self, positions: NDArray[np.int64], num_edges: int, out: NDArray[np.float32]) -> None:
        """Write the edge weights at `positions[:num_edges]` to `out`; DataError where one is not finite."""
        gather_flat(self.weights, positions, 0, num_edges, out)
        if not np.isfinite(out[:num_edges].sum(dtype=np.float64)):  # finite float32 cannot overflow a float64
            self._check_weight(int(positions[np.flatnonzero(~np.isfinite(out[:num_edges]))[0]]))
