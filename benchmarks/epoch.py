"""`penstock bench epoch`: an epoch of training out of core against the same epoch with everything in memory.

Both sides train the same SAGE (3 layers, hidden 128, Adam) on the same items in order. Ours reads packs past the
page cache, with a host tier of a tenth of the features; the peer gathers from a table in memory with the same kernels,
threads and prefetching. A turn is one epoch, timed after a few items that fill the pipeline.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from penstock.benchmarks.feed import TIER_SHARE, plan_for_tier
from penstock.benchmarks.harness import interleave, open_bench_graph, record
from penstock.engine.feed import open_pack_feed
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.metrics import node_loss
from penstock.engine.minibatch import MiniBatch
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.prefetch import Feed
from penstock.engine.trainer import seed_step
from penstock.sampler.estimate import measure_disk
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.sampler.packer import write_packs
from penstock.storage.budget import GIB, num_threads
from penstock.storage.generate import GenerateConfig
from penstock.storage.graph import GraphStore

NUM_NODES, NUM_FEATURES, NUM_ITEMS = 2_000_000, 128, 40
BATCH_SIZE, HIDDEN = 256, 128
FANOUTS = (10, 10, 10)
_WARM_ITEMS = 3


class _Side:
    """A model and its optimizer, trained by one of the feeds."""

    def __init__(self, open_feed: Callable[[int], Feed], graph: GraphStore, items: int, device: str) -> None:
        self._open_feed, self._items, self._device = open_feed, items, device
        torch.manual_seed(0)
        config = ModelConfig(num_layers=len(FANOUTS), hidden=HIDDEN)
        self.model: nn.Module = build_model(config, NUM_FEATURES, graph.meta.num_classes).to(device)
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)

    def _train(self, batch: MiniBatch) -> None:
        seed_step(0, batch.step, torch.device(self._device))  # as the trainer does: dropout depends on the step alone
        loss = node_loss(self.model(batch.blocks, batch.features), batch.labels)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def epoch_s(self) -> float:
        """Seconds of one epoch in the steady state."""
        with self._open_feed(_WARM_ITEMS + self._items) as feed:
            for batch in islice(feed, _WARM_ITEMS):
                self._train(batch)
            started = perf_counter()
            for batch in feed:
                self._train(batch)
            if self._device != "cpu":
                torch.cuda.synchronize()
            return perf_counter() - started


def run(*, scale: float, repeats: int, folder: Path, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """Yield the record of `time_vs_memory`; lower is better."""
    num_nodes, batch_size = int(NUM_NODES * scale), max(16, int(BATCH_SIZE * min(1.0, scale)))
    train = min(0.9, NUM_ITEMS * batch_size / num_nodes)
    graph = open_bench_graph(folder, GenerateConfig(num_nodes=num_nodes, num_features=NUM_FEATURES, train=train))
    threads = num_threads()
    config = SampleConfig(fanouts=FANOUTS, batch_size=batch_size)
    trace = sample_trace(graph, folder / "trace", config, host_memory=4 * GIB, threads=threads)
    slots = int(num_nodes * TIER_SHARE)
    plan = plan_for_tier(graph, trace, "belady", slots, measure_disk(folder), folder / "plan")
    write_packs(plan, graph, trace, folder / "packs", host_memory=GIB)

    def open_packs(stop: int) -> Feed:
        packs, memory = folder / "packs", plan.summary.host_needed_bytes if plan.summary else GIB
        return open_pack_feed(
            packs, graph, start_step=0, stop_step=stop, host_memory=memory, device=device, threads=threads
        )

    def open_memory(stop: int) -> Feed:
        return open_memory_feed(graph, trace, start_step=0, stop_step=stop, device=device, threads=threads)

    items = trace.meta.num_items
    ours, peer = (_Side(opened, graph, items, device) for opened in (open_packs, open_memory))
    values = interleave(ours.epoch_s, peer.epoch_s, repeats)
    yield record("epoch", "time_vs_memory", "s/epoch", *values, "features in memory", False, repeats)
    equal = all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), peer.model.parameters(), strict=True))
    if device == "cpu" and not equal:
        raise RuntimeError("the two sides ended with different weights, so they did not train on the same batches")
