"""Sample hop by hop: all items of a group at once, in node order.

The mode for topologies larger than memory. The destinations of all items are sorted by node id, so a hop reads the
adjacency once, front to back, instead of at random: the disk works at its sequential speed, and a neighbour list that
several items want is read once. What each (node, item) draws is keyed by both, so the items are those of `itemwise`,
byte for byte. P destinations and E edges of a hop, over all items of the group.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.compact import scatter_runs
from penstock.kernels.parallel import parallel_for, split
from penstock.kernels.seeds import hop_keys
from penstock.sampler.draws import Scratch, Topology
from penstock.sampler.footprint import item_bytes, items_memory, needed_bytes, with_later_hops
from penstock.sampler.items import TooLarge, check_edges, make_item, no_room
from penstock.sampler.itemwise import make_numbering
from penstock.sampler.numbering import Numbering
from penstock.sampler.seeds import item_seeds
from penstock.storage.graph import GraphStore, id_dtype
from penstock.storage.items import BlockArrays, encode_item, payload_bytes
from penstock.storage.trace import TraceMeta

_GROUP_FACTOR = 4  # memory of an item under way over its payload: 2.5 with ids and local ids of its last hop, and slack
_CHUNK = 1 << 16  # destinations drawn at a time by one thread: positions and ids stay in the cache

_Values = dict[str, NDArray[np.float32]]  # of edges, by name


@dataclass(slots=True)
class _Partial:
    """An item that has been sampled up to some hop; grows."""

    index: int
    num_seeds: int
    nodes: NDArray[Any]
    blocks: list[BlockArrays] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frontier:
    """Destinations of a hop of all items. `order` int64 [P] walks them by node id, then by item."""

    nodes: NDArray[Any]
    slots: NDArray[np.int32]
    keys: NDArray[np.uint64]
    order: NDArray[np.int64]
    offsets: NDArray[np.int64]
    bounds: NDArray[np.int64]


class _Group:
    """Items that advance together."""

    def __init__(
        self, graph: GraphStore, meta: TraceMeta, first: int, stop: int, numberings: list[Numbering], limit: int
    ) -> None:
        self._graph, self._meta, self._numberings, self._limit = graph, meta, numberings, limit
        self._topology = Topology(graph, meta)
        self._scratches = [Scratch() for _ in numberings]
        self._items = []
        for index in range(first, stop):
            seeds = np.asarray(item_seeds(graph, meta, index), id_dtype(graph.num_nodes))
            self._items.append(_Partial(index, len(seeds), seeds))

    def _threads(self, work: Any, total: int) -> None:
        """Call `work(worker, lo, hi)` on a range for each of our scratches."""
        ranges = split(total, len(self._scratches))
        parallel_for(lambda lo, hi: [work(n, *ranges[n]) for n in range(lo, hi)], len(ranges), len(ranges))

    def _frontier(self, hop: int) -> _Frontier:
        items = self._items
        bounds = np.cumsum([0, *(len(item.nodes) for item in items)])
        nodes = np.concatenate([item.nodes for item in items])
        # Sorting (node, place) packed into one word is several times as fast as a stable argsort.
        shift = int(len(nodes)).bit_length()
        assert self._graph.num_nodes.bit_length() + shift < 64, "a group is too large to sort in one word"
        packed = nodes.astype(np.int64) << shift
        packed |= np.arange(len(nodes))
        packed.sort()
        packed &= (1 << shift) - 1
        whole = np.array([self._meta.whole_item(item.index) for item in items])
        keys = np.empty(len(items), np.uint64)
        hop_keys(whole, whole // self._meta.whole_epoch_items, self._meta.seed, hop, 0, len(items), keys)
        return _Frontier(
            nodes=nodes,
            slots=np.repeat(np.arange(len(items), dtype=np.int32), np.diff(bounds)),
            keys=keys,
            order=packed,
            offsets=np.zeros(len(nodes) + 1, np.int64),
            bounds=bounds,
        )

    def _count(self, frontier: _Frontier, fanout: int, worker: int, lo: int, hi: int) -> None:
        """Put the counts of the destinations order[lo:hi] where their items will look for them."""
        for at in range(lo, hi, _CHUNK):
            some = frontier.order[at : min(at + _CHUNK, hi)]
            draws = self._topology.count(
                frontier.nodes[some], frontier.slots[some], frontier.keys, len(some), fanout, self._scratches[worker]
            )
            frontier.offsets[some + 1] = np.diff(draws.offsets[: len(some) + 1])

    def _pick(self, frontier: _Frontier, fanout: int, ids: Any, values: _Values, worker: int, lo: int, hi: int) -> None:
        """Draw for the destinations order[lo:hi], and put what was drawn into their items' order."""
        scratch, topology = self._scratches[worker], self._topology
        for at in range(lo, hi, _CHUNK):
            some = frontier.order[at : min(at + _CHUNK, hi)]
            draws = topology.count(
                frontier.nodes[some], frontier.slots[some], frontier.keys, len(some), fanout, scratch
            )
            positions, targets = topology.pick(draws, scratch), frontier.offsets[some]
            drawn = scratch.take("ids", draws.num_edges, ids.dtype)
            topology.gather(positions, draws.num_edges, drawn)
            scatter_runs(drawn, draws.offsets, targets, 0, len(some), ids)
            for name, out in values.items():
                found = scratch.take(name, draws.num_edges, np.float32)
                topology.fill(name, draws, positions, scratch, found)
                scatter_runs(found, draws.offsets, targets, 0, len(some), out)

    def _compact(self, frontier: _Frontier, ids: Any, values: _Values, worker: int, lo: int, hi: int) -> None:
        """Number the nodes of items lo..hi-1 and make their blocks."""
        numbering = self._numberings[worker]
        for slot in range(lo, hi):
            item = self._items[slot]
            offsets = frontier.offsets[frontier.bounds[slot] : frontier.bounds[slot + 1] + 1]
            num_dst, num_edges = len(item.nodes), int(offsets[-1] - offsets[0])
            check_edges(num_edges, item.index, len(item.blocks))
            edges = slice(int(offsets[0]), int(offsets[-1]))
            max_nodes = min(num_dst + num_edges, self._graph.num_nodes)
            nodes = self._scratches[worker].take("nodes", max_nodes + 1, item.nodes.dtype)
            nodes[:num_dst] = item.nodes
            numbering.start(nodes, num_dst)
            numbering.reserve(nodes, num_dst, max_nodes)
            local = np.empty(num_edges, np.int32)
            num_src = numbering.compact(ids[edges], num_edges, nodes, num_dst, local)
            numbering.clear(nodes, num_src)
            item.nodes = nodes[:num_src].copy()
            block = BlockArrays(
                num_src=num_src,
                num_dst=num_dst,
                indptr=(offsets - offsets[0]).astype(np.int32),
                indices=local,
                **{name: array[edges].copy() for name, array in values.items()},
            )
            item.blocks.insert(0, block)

    def _advance(self, hop: int, fanout: int) -> None:
        frontier = self._frontier(hop)
        self._threads(partial(self._count, frontier, fanout), len(frontier.nodes))
        np.cumsum(frontier.offsets, out=frontier.offsets)
        num_edges = int(frontier.offsets[-1])
        self._check_size(frontier)
        ids = np.empty(num_edges, self._topology.indices.dtype)
        values: _Values = {name: np.empty(num_edges, np.float32) for name in self._topology.edge_values}
        self._threads(partial(self._pick, frontier, fanout, ids, values), len(frontier.nodes))
        self._threads(partial(self._compact, frontier, ids, values), len(self._items))

    def _check_size(self, frontier: _Frontier) -> None:
        """TooLarge where the items, whose next edges are counted and not drawn yet, take more than the limit."""
        graph, meta = self._graph, self._meta
        edges = np.diff(frontier.offsets[frontier.bounds]).tolist()
        total, largest = 0, (0, -1)
        for item, num_edges in zip(self._items, edges, strict=True):
            done = [(block.num_dst, len(block.indices)) for block in reversed(item.blocks)]
            hops = [*done, (len(item.nodes), num_edges)]
            total += needed_bytes(graph, meta, hops, table=True)
            found = needed_bytes(graph, meta, with_later_hops(graph, meta, hops), table=False)
            largest = max(largest, (found, item.index))
        if total > self._limit:
            raise TooLarge(largest[1], largest[0])

    def payloads(self) -> Iterator[NDArray[np.uint8]]:
        """Sample all hops, then yield the payloads in order; each holds until the next is asked for."""
        for hop, fanout in enumerate(reversed(self._meta.fanouts)):
            self._advance(hop, fanout)
        scratch = self._scratches[0]
        for part in self._items:
            item = make_item(self._graph, self._meta, part.index, part.num_seeds, part.nodes, part.blocks, scratch)
            buffer = scratch.take("payload", payload_bytes(item), np.uint8)
            yield buffer[: encode_item(item, buffer)]


def sample_hopwise(
    graph: GraphStore, meta: TraceMeta, first: int, stop: int, *, host_memory: int, threads: int
) -> Iterator[NDArray[np.uint8]]:
    """Yield the payloads of items first..stop-1 in order, sampled in groups as large as the budget holds."""
    numberings = [make_numbering(graph, host_memory=host_memory, threads=threads) for _ in range(threads)]
    group_items = host_memory // 2 // item_bytes(graph, meta)
    limit = items_memory(graph, host_memory, threads)
    lo = first
    while lo < stop:
        hi = min(lo + max(1, group_items), stop)
        largest = 0
        try:
            for payload in _Group(graph, meta, lo, hi, numberings, limit).payloads():
                largest = max(largest, len(payload))
                yield payload
        except TooLarge as error:  # before the first payload
            if hi - lo == 1:
                raise no_room(error, host_memory) from None
            group_items = (hi - lo) // 2
            continue
        # The bound that the first group was sized by is several times what items take; now we have seen some.
        group_items = max(group_items, host_memory // 2 // (_GROUP_FACTOR * largest))
        lo = hi
