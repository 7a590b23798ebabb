"""`penstock bench sample`: sampled edges per second and core against DGL's sampler.

Both sides draw the same batches of seeds on one thread and deliver blocks in memory; ours include the labels and the
encoded payload, but no file. The topology is memory-mapped on our side and in the page cache, in DGL's arrays on DGL's.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.benchmarks.harness import interleave, open_bench_graph, record, scratch_folder
from penstock.sampler.hopwise import sample_hopwise
from penstock.sampler.itemwise import ItemSampler, make_numbering, sample_itemwise
from penstock.sampler.neighbors import SampleConfig, make_trace_meta
from penstock.sampler.seeds import item_seeds
from penstock.storage.budget import GIB, num_threads
from penstock.storage.generate import GenerateConfig
from penstock.storage.graph import GraphStore
from penstock.storage.items import encode_item, payload_bytes
from penstock.storage.trace import TraceMeta

FANOUTS = (10, 15, 20)
BATCH_SIZE = 1024
_ROUND_ITEMS = 4  # items per timed call
_STREAM_ITEMS = 16  # items per timed call where several are sampled together


def _batches(graph: GraphStore, meta: TraceMeta) -> list[NDArray[Any]]:
    return [np.array(item_seeds(graph, meta, item)) for item in range(min(_STREAM_ITEMS, meta.items_per_epoch))]


def _our_sampler(graph: GraphStore, meta: TraceMeta) -> Callable[[int], int]:
    """One item per call, on the calling thread, encoded into a reused buffer; returns its edges."""
    sampler = ItemSampler(graph, meta, make_numbering(graph, host_memory=4 * GIB, threads=1))
    buffer = np.empty(0, np.uint8)

    def sample(index: int) -> int:
        nonlocal buffer
        item = sampler.sample(index, item_seeds(graph, meta, index))
        if payload_bytes(item) > len(buffer):
            buffer = np.empty(2 * payload_bytes(item), np.uint8)
        encode_item(item, buffer)
        return sum(len(block.indices) for block in item.blocks)

    return sample


def _rate(sample: Callable[[int], int], num_items: int) -> Callable[[], float]:
    """Make a function that tells edges per second over the next few items: others each time, so none are in a cache."""
    items = cycle(range(num_items))

    def rate() -> float:
        some = list(islice(items, _ROUND_ITEMS))
        start = perf_counter()
        edges = sum(sample(index) for index in some)
        return edges / (perf_counter() - start)

    return rate


def _against_dgl(graph: GraphStore, method: str, case: str, repeats: int) -> dict[str, Any]:
    # DGL is an optional dependency, wanted only here.
    from penstock.benchmarks.peers.dgl_sampler import best_dgl_sampler

    config = SampleConfig(fanouts=FANOUTS, batch_size=BATCH_SIZE, method=method)  # type: ignore[arg-type]
    meta = make_trace_meta(graph, config)
    batches = _batches(graph, meta)
    ours = _our_sampler(graph, meta)
    name, peer = best_dgl_sampler(graph, FANOUTS, method, batches)
    values = interleave(_rate(ours, len(batches)), _rate(lambda n: peer(batches[n]), len(batches)), repeats)
    return record("sample", case, "edges/s/core", *values, name, True, repeats)


def _stream_rate(sample: Any, graph: GraphStore, meta: TraceMeta, threads: int) -> float:
    """Items per second of a mode, encoded and not written."""
    stop = min(_STREAM_ITEMS, meta.num_items)
    start = perf_counter()
    count = sum(1 for _ in sample(graph, meta, 0, stop, host_memory=4 * GIB, threads=threads))
    return count / (perf_counter() - start)


def _among_ourselves(graph: GraphStore, repeats: int) -> Iterator[dict[str, Any]]:
    meta = make_trace_meta(graph, SampleConfig(fanouts=FANOUTS, batch_size=BATCH_SIZE))
    threads = min(2, num_threads())
    one = lambda: _stream_rate(sample_itemwise, graph, meta, 1)  # noqa: E731
    values = interleave(lambda: _stream_rate(sample_itemwise, graph, meta, threads), one, repeats)
    yield record("sample", f"items_{threads}_threads", "items/s", *values, "item mode, 1 thread", True, repeats)
    values = interleave(lambda: _stream_rate(sample_hopwise, graph, meta, 1), one, repeats)
    yield record("sample", "items_hop_mode", "items/s", *values, "item mode, 1 thread", True, repeats)


def _inputs(graph: GraphStore, method: str) -> float:
    config = SampleConfig(fanouts=FANOUTS, batch_size=BATCH_SIZE, method=method)  # type: ignore[arg-type]
    meta = make_trace_meta(graph, config)
    sampler = ItemSampler(graph, meta, make_numbering(graph, host_memory=4 * GIB, threads=1))
    return float(len(sampler.sample(0, item_seeds(graph, meta, 0)).input_ids))


def run(scale: float = 1.0, repeats: int = 7, folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """Yield a record per case; `folder` keeps the graph for the next run."""
    config = GenerateConfig(
        num_nodes=max(10_000, int(4_000_000 * scale)), avg_degree=16, num_features=1, num_classes=4, train=0.1
    )
    with ExitStack() as stack:
        graph = open_bench_graph(folder or stack.enter_context(scratch_folder()), config)
        yield _against_dgl(graph, "uniform", "edges_per_core", repeats)
        yield _against_dgl(graph, "labor", "labor_edges_per_core", repeats)
        yield from _among_ourselves(graph, repeats)
        labor, uniform = _inputs(graph, "labor"), _inputs(graph, "uniform")
        yield record("sample", "labor_inputs", "nodes/item", labor, uniform, "uniform", False, 1)
