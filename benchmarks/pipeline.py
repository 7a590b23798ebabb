"""`penstock bench pipeline`: layers in a pipeline against one rank, against parts of the graph, and out of core.

| case | ours | peer |
|---|---|---|
| `two_stages` | two stages, one process and one thread each | one process and thread |
| `vs_graph_parallel` | two stages | two parts of the graph in one chunk: exact, mirrors exchanged at every layer |
| `bytes_vs_graph_parallel` | bytes that two parts send | bytes that two stages send, times L alpha / (S - 1) |
| `out_of_core`, `out_of_core_rss` | histories of eight times the host memory given, on disk | everything in memory |

No other system that trains in this way runs here, so the peers are our own, and tuned as we are: the same kernels,
caches, transport and allocator, one thread per rank, rows in the same order, cut by METIS as well, activations kept on
both sides wherever they fit. Graph parallel has one chunk per part, which needs no histories of the past: that is its
fastest form. Bytes are those of rows and their gradients; what it takes to sum weight gradients over parts is known
exactly (`footprint.reduce_bytes`) and left out. All models are GCN with residuals and layer norms: a layer on
features and 16 on hidden rows, which is what L counts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from penstock.benchmarks.harness import interleave, record
from penstock.benchmarks.pipeline_graph import write_pipeline_graph
from penstock.benchmarks.pipeline_sides import Setting, Side, Turn, kept_heap
from penstock.engine.chunked.footprint import reduce_bytes
from penstock.sampler.estimate import measure_disk
from penstock.storage.budget import MIB, available_memory
from penstock.storage.history import HistorySet

NUM_NODES = {"two_stages": 500_000, "vs_graph_parallel": 200_000, "out_of_core": 250_000}
CHUNKS = {"two_stages": 32, "vs_graph_parallel": 16, "out_of_core": 64}  # the best of 8, 16, 32; the fewest that fit
HIDDEN = {"two_stages": 64, "vs_graph_parallel": 64, "out_of_core": 128}
HISTORY_FACTOR = 8  # histories over the host memory given
HISTORY_SHARE = 0.25  # of the host memory given; topology, features and one chunk's activations take the rest
_ACTIVATION_BYTES = 50_000  # of a node in 16 layers of 64, kept for backward, with its histories; measured
_OVERHEAD_BYTES = 300 * MIB  # interpreter and libraries


def _recomputes(setting: Setting) -> bool:
    """Whether activations of the whole graph do not fit: then no side keeps them."""
    per_node = _ACTIVATION_BYTES * setting.layers * setting.hidden / (16 * 64)
    return setting.graph.num_nodes * per_node > 0.8 * available_memory()


def _compare(ours: Side, peer: Side, repeats: int) -> tuple[float, float, Turn, Turn]:
    """Medians of the epoch times, and each side's last turn."""
    last: dict[str, Turn] = {}

    def measure(name: str, side: Side) -> float:
        last[name] = side.turn()
        return last[name].epoch_s

    times = interleave(lambda: measure("ours", ours), lambda: measure("peer", peer), repeats)
    return *times, last["ours"], last["peer"]


def two_stages(setting: Setting, chunks: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the epoch rate of two stages over that of one; higher is better."""
    recompute = _recomputes(setting)
    ours = Side(setting=setting, chunks=chunks, stages=2, recompute=recompute)
    peer = Side(setting=setting, chunks=chunks, recompute=recompute)
    with kept_heap():
        ours_s, peer_s, ours_turn, peer_turn = _compare(ours, peer, repeats)
    _require_equal(ours_turn, peer_turn)
    found = record("pipeline", "two_stages", "epochs/s", 1 / ours_s, 1 / peer_s, "one stage", True, repeats)
    yield {**found, "target": 1.6, "recompute": recompute, "wait_s": [r.wait_s for r in ours_turn.reports]}


def vs_graph_parallel(setting: Setting, chunks: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the epoch rate over that of graph parallel, and how bytes sent compare to L alpha / (S - 1)."""
    pipeline = Side(setting=setting, chunks=chunks, stages=2)
    graph = Side(setting=setting, chunks=1, parts=2)
    with kept_heap():
        ours_s, peer_s, ours_turn, peer_turn = _compare(pipeline, graph, repeats)
    part_alpha = graph.store().meta.part_alpha
    facts = {"part_alpha": part_alpha, "alpha": pipeline.store().meta.alpha}
    name = "graph parallel, 2 parts"
    found = record("pipeline", "vs_graph_parallel", "epochs/s", 1 / ours_s, 1 / peer_s, name, True, repeats)
    yield {**found, "target": 1.2, **facts, "wait_s": [r.wait_s for r in peer_turn.reports]}
    parameters = sum(weight.nbytes for weight in peer_turn.weights.values())
    sent = peer_turn.sent_bytes - reduce_bytes(2, parameters)
    expected = setting.layers * part_alpha
    values = (sent / ours_turn.sent_bytes, expected, "L alpha / (S - 1)")
    found = record("pipeline", "bytes_vs_graph_parallel", "bytes/byte", *values, True, repeats)
    yield {**found, "target": 1.0, **facts, "sent_bytes": ours_turn.sent_bytes, "peer_sent_bytes": sent}


def out_of_core(setting: Setting, chunks: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield epoch time and peak memory with histories on disk; lower is better. RuntimeError where weights differ."""
    peer = Side(setting=setting, chunks=chunks, recompute=True)
    histories = _history_bytes(peer)
    budget = histories // HISTORY_FACTOR
    ours = Side(setting=setting, chunks=chunks, recompute=True, history_memory=int(budget * HISTORY_SHARE))
    rates = measure_disk(setting.folder)
    ours_s, peer_s, ours_turn, peer_turn = _compare(ours, peer, repeats)
    _require_equal(ours_turn, peer_turn)
    read, written = ours_turn.moved_bytes
    disk_s = read / rates.read_bytes_per_s + written / rates.write_bytes_per_s
    facts = {
        "history_bytes": histories,
        "budget_bytes": budget,
        "read_bytes": read,
        "written_bytes": written,
        "disk_s": disk_s,
        "stall_s": ours_turn.reports[0].history_stall_s,
    }
    found = record("pipeline", "out_of_core", "s/epoch", ours_s, peer_s, "everything in memory", False, repeats)
    yield {**found, "target": max(1.5, disk_s / peer_s), **facts}
    peak, limit = ours_turn.peak_rss_bytes, budget + _OVERHEAD_BYTES
    name = "host memory given, and 300 MiB"
    found = record("pipeline", "out_of_core_rss", "bytes", peak, limit, name, False, repeats)
    yield {**found, "target": 1.0, "peer_rss_bytes": peer_turn.peak_rss_bytes, **facts}


def _history_bytes(side: Side) -> int:
    """All tables of one rank, were they in memory: per layer two buffers of rows and one of gradients."""
    part, setting = side.store().part(0), side.setting

    def one(kind: Any, sizes: Any) -> int:
        return HistorySet.table_bytes(kind, sizes, setting.hidden, "float32").memory

    per_layer = one("runs", part.run_sizes) + one("messages", part.run_sizes.T)
    return setting.layers * per_layer


def _require_equal(ours: Turn, peer: Turn) -> None:
    unequal = [name for name, weight in peer.weights.items() if not torch.equal(ours.weights[name], weight)]
    if unequal:
        raise RuntimeError(f"the sides ended with different weights, so they did not compute the same: {unequal}")


def run(*, scale: float, repeats: int, folder: Path, out_of_core: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the records of all cases but `out_of_core`, or of that one alone."""
    cases = {"out_of_core": _out_of_core} if out_of_core else _CASES
    for name, case in cases.items():
        num_nodes = max(1000, int(NUM_NODES[name] * scale))
        setting = Setting(graph=write_pipeline_graph(folder, num_nodes), folder=folder, hidden=HIDDEN[name])
        yield from case(setting, CHUNKS[name], repeats)


_out_of_core = out_of_core
_CASES = {"two_stages": two_stages, "vs_graph_parallel": vs_graph_parallel}
