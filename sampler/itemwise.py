"""Sample item by item: one thread per item, several items in flight.

The fast mode where the topology, or the part of it that is read often, fits in memory.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.seeds import hop_keys
from penstock.sampler.draws import Scratch, Topology
from penstock.sampler.footprint import items_memory, needed_bytes, num_workers, table_fits, with_later_hops
from penstock.sampler.items import TooLarge, check_edges, make_item, no_room
from penstock.sampler.numbering import HashNumbering, Numbering, TableNumbering
from penstock.sampler.seeds import item_seeds
from penstock.storage.graph import GraphStore, id_dtype
from penstock.storage.items import BlockArrays, Item, encode_item, payload_bytes
from penstock.storage.trace import TraceMeta


class ItemSampler:
    """Samples one item after the other, in memory that it owns, at most `limit` bytes. Each thread has its own."""

    def __init__(self, graph: GraphStore, meta: TraceMeta, numbering: Numbering, limit: int = 1 << 62) -> None:
        self._graph, self._meta, self._numbering, self._limit = graph, meta, numbering, limit
        self._hops: list[tuple[int, int]] = []
        self._topology = Topology(graph, meta)
        self._scratch = Scratch()
        self._nodes: NDArray[Any] = np.empty(0, id_dtype(graph.num_nodes))

    def _reserve(self, num_nodes: int, max_nodes: int) -> None:
        """Make room for `max_nodes` and the one that `compact` wants, and keep the first `num_nodes`."""
        if max_nodes >= len(self._nodes):
            nodes = np.empty(max_nodes + max_nodes // 4 + 1, self._nodes.dtype)
            nodes[:num_nodes] = self._nodes[:num_nodes]
            self._nodes = nodes

    def sample(self, index: int, seeds: NDArray[Any]) -> Item:
        """Draw item `index`; its arrays are views that hold until the next call. TooLarge beyond the limit."""
        num_nodes = len(seeds)
        self._hops.clear()
        self._reserve(0, num_nodes)
        self._nodes[:num_nodes] = seeds
        self._numbering.start(self._nodes, num_nodes)
        blocks: list[BlockArrays] = []
        for hop, fanout in enumerate(reversed(self._meta.fanouts)):
            blocks.insert(0, self._sample_hop(index, hop, fanout, num_nodes))
            num_nodes = blocks[0].num_src
        self._numbering.clear(self._nodes, num_nodes)
        return make_item(self._graph, self._meta, index, len(seeds), self._nodes[:num_nodes], blocks, self._scratch)

    def _sample_hop(self, index: int, hop: int, fanout: int, num_dst: int) -> BlockArrays:
        scratch, meta = self._scratch, self._meta
        keys = scratch.take("keys", 1, np.uint64)
        whole = np.array([meta.whole_item(index)])
        hop_keys(whole, whole // meta.whole_epoch_items, meta.seed, hop, 0, 1, keys)
        slots = scratch.zeros("slots", num_dst, np.int32)
        draws = self._topology.count(self._nodes, slots, keys, num_dst, fanout, scratch)
        num_edges = check_edges(draws.num_edges, index, hop)
        self._check_size(index, num_dst, num_edges)
        positions = self._topology.pick(draws, scratch)
        ids = scratch.take("ids", num_edges, self._topology.indices.dtype)
        self._topology.gather(positions, num_edges, ids)
        indptr = scratch.take(f"indptr{hop}", num_dst + 1, np.int32)
        indptr[: num_dst + 1] = draws.offsets[: num_dst + 1]
        values: dict[str, NDArray[np.float32]] = {}
        for name in self._topology.edge_values:
            values[name] = scratch.take(f"{name}{hop}", num_edges, np.float32)[:num_edges]
            self._topology.fill(name, draws, positions, scratch, values[name])
        max_nodes = min(num_dst + num_edges, self._graph.num_nodes)
        self._reserve(num_dst, max_nodes)
        self._numbering.reserve(self._nodes, num_dst, max_nodes)
        local = scratch.take(f"local{hop}", num_edges, np.int32)
        num_src = self._numbering.compact(ids, num_edges, self._nodes, num_dst, local)
        return BlockArrays(
            num_src=num_src,
            num_dst=num_dst,
            indptr=indptr[: num_dst + 1],
            indices=local[:num_edges],
            **values,
        )

    def _check_size(self, index: int, num_dst: int, num_edges: int) -> None:
        """TooLarge where the hop, whose edges are counted and not drawn yet, takes the item beyond the limit."""
        self._hops.append((num_dst, num_edges))
        graph, meta, table = self._graph, self._meta, isinstance(self._numbering, TableNumbering)
        if needed_bytes(graph, meta, self._hops, table=table) > self._limit:
            self._numbering.clear(self._nodes, num_dst)
            raise TooLarge(index, needed_bytes(graph, meta, with_later_hops(graph, meta, self._hops), table=False))


def make_numbering(graph: GraphStore, *, host_memory: int, threads: int) -> Numbering:
    """Choose the table where `threads` of them fit the budget."""
    if table_fits(graph.num_nodes, host_memory, threads):
        return TableNumbering(graph.num_nodes)
    return HashNumbering(id_dtype(graph.num_nodes))


def sample_itemwise(
    graph: GraphStore, meta: TraceMeta, first: int, stop: int, *, host_memory: int, threads: int
) -> Iterator[NDArray[np.uint8]]:
    """Yield the payloads of items first..stop-1 in order; each holds until the next is asked for."""
    workers = min(num_workers(graph, meta, host_memory, threads), stop - first)
    whole = items_memory(graph, host_memory, workers)
    samplers: SimpleQueue[ItemSampler] = SimpleQueue()
    buffers: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()

    def make_samplers() -> None:
        for _ in range(workers):
            numbering = make_numbering(graph, host_memory=host_memory, threads=workers)
            samplers.put(ItemSampler(graph, meta, numbering, whole // workers))

    make_samplers()
    for _ in range(workers + 1):  # one is with the consumer
        buffers.put(np.empty(0, np.uint8))

    def work(index: int) -> tuple[NDArray[np.uint8], int]:
        sampler = samplers.get_nowait()  # never more items in flight than workers
        try:
            item = sampler.sample(index, item_seeds(graph, meta, index))
            num_bytes, buffer = payload_bytes(item), buffers.get_nowait()
            if num_bytes > len(buffer):
                buffer = np.empty(num_bytes + num_bytes // 8, np.uint8)
            encode_item(item, buffer)
        finally:
            samplers.put(sampler)
        return buffer, num_bytes

    def work_alone(index: int) -> NDArray[np.uint8]:
        """Sample an item that a worker has no room for, while nobody works and none keeps memory but for payloads."""
        for _ in range(workers):
            samplers.get_nowait()
        numbering = make_numbering(graph, host_memory=host_memory, threads=workers)
        sampler = ItemSampler(graph, meta, numbering, whole if workers == 1 else whole // 2)
        try:
            item = sampler.sample(index, item_seeds(graph, meta, index))
        except TooLarge as error:
            raise no_room(error, host_memory) from None
        buffer = np.empty(payload_bytes(item), np.uint8)
        encode_item(item, buffer)
        make_samplers()
        return buffer

    item_seeds(graph, meta, first)  # the epoch's order is made once, not by every thread
    pending: deque[Future[tuple[NDArray[np.uint8], int]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="penstock-sample") as pool:
        todo = iter(range(first, stop))
        try:
            for index in todo:
                pending.append(pool.submit(work, index))
                if len(pending) == workers:
                    break
            while pending:
                try:
                    buffer, num_bytes = pending.popleft().result()
                except TooLarge as error:
                    wait(pending)
                    yield work_alone(error.index)
                    buffer, num_bytes = np.empty(0, np.uint8), 0
                if (index := next(todo, -1)) >= 0:
                    pending.append(pool.submit(work, index))
                if num_bytes:
                    yield buffer[:num_bytes]
                buffers.put(buffer)
        finally:
            pool.shutdown(cancel_futures=True)
