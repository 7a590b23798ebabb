"""What a sampled run's process holds, phase by phase: see `process_memory`.

The largest item of a split is known once it is sampled; from it follow the buffers and, by `engine.activations`, what a
step computes. Sampling and planning are done by then: what they took is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from penstock.engine.activations import BlockSizes, step_bytes
from penstock.engine.exact import exact_peak_bytes
from penstock.engine.feed import batches_bytes, feed_peak_bytes
from penstock.process_memory import PROCESS, PRODUCER, STATE_COPIES, TOPOLOGY, WAITING, Forecast, Phase
from penstock.run import Run, make_model
from penstock.sampler.estimate import PlanSummary
from penstock.sampler.footprint import topology_bytes
from penstock.sampler.sizing import ROLLING_MARGIN, ROLLING_SHARE
from penstock.storage.budget import peak_rss_bytes
from penstock.storage.graph import Split
from penstock.storage.rows import RowFormat
from penstock.storage.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestItem:
    """The item of a trace that reads most rows: sources, destinations and edges of its blocks; the largest payload."""

    payload_bytes: int
    blocks: tuple[BlockSizes, ...]

    @staticmethod
    def from_json(value: dict[str, Any]) -> "LargestItem":
        """What `asdict` made, read back."""
        blocks = tuple((int(src), int(dst), int(edges)) for src, dst, edges in value["blocks"])
        return LargestItem(payload_bytes=value["payload_bytes"], blocks=blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSplit:
    """What is known of a split once it is planned."""

    summary: PlanSummary
    largest: LargestItem


def largest_item(trace: Trace) -> LargestItem:
    """Look through the indexes of a trace, and into one payload."""
    most, place, payload = -1, (0, 0), 0
    for window in trace.windows():
        position = int(np.argmax(window.index.num_inputs))
        payload = max(payload, *window.index.bytes)
        if window.index.num_inputs[position] > most:
            most, place = window.index.num_inputs[position], (window.index.window, position)
    item = trace.window(place[0]).item(place[1])
    blocks = tuple((block.num_src, block.num_dst, len(block.indices)) for block in item.blocks)
    return LargestItem(payload_bytes=payload, blocks=blocks)


class _Sizes:
    """Bytes of the components of a run, by what it is."""

    def __init__(self, run: Run, splits: Mapping[Split, PlannedSplit]) -> None:
        self.run, self.splits, self.model = run, splits, make_model(run)

    def weights(self) -> int:
        """Weights and what an optimizer keeps of each."""
        return STATE_COPIES * sum(p.numel() * p.element_size() for p in self.model.parameters())

    def feed(self, split: Split, host_memory: int) -> dict[str, int]:
        """Tier, ring and batches of a split's feed."""
        planned = self.splits[split]
        rolling = planned.summary.mode == "rolling"
        return feed_peak_bytes(
            host_slots=planned.summary.host_slots,
            row_bytes=planned.summary.row_bytes,
            width=self.run.graph.row_format.width,
            max_inputs=planned.summary.max_inputs,
            max_extent_bytes=int(planned.summary.max_extent_bytes * (ROLLING_MARGIN if rolling else 1)),
            payload_bytes=planned.largest.payload_bytes,
            host_memory=int(host_memory * ROLLING_SHARE) if rolling else host_memory,
            rolling=rolling,
        )

    def step(self, largest: LargestItem, *, train: bool) -> int:
        """What computing on the largest item holds on the host; gradients are of training."""
        if torch.device(self.run.config.train.device).type != "cpu":
            return 0
        meta = self.run.graph.meta
        return step_bytes(
            self.model,
            largest.blocks,
            meta.num_features,
            meta.num_classes,
            multi_label=meta.multi_label,
            train=train,
            num_weights=meta.has_edge_weights * (1 + self.run.config.sampler.weighted),
        )

    def evaluation(self) -> dict[str, int]:
        """What evaluation holds beside the open feed of training, for the split that needs most."""
        run = self.run
        if run.evaluates and run.config.evaluate.mode == "exact":
            targets = np.concatenate([run.graph.split_ids(split) for split in run.labelled_splits])
            return {"exact evaluation": exact_peak_bytes(self.model, run.graph, run.evaluation_bytes, targets)}
        known = [split for split in run.evaluated_splits if split in self.splits]
        feeds = {split: sum(self.feed(split, run.evaluation_bytes).values()) for split in known}
        steps = {split: self.step(self.splits[split].largest, train=False) for split in known}
        return {"evaluation": max((feeds[split] + steps[split] for split in known), default=0)}

    def producer(self) -> int:
        """The process that makes rolling windows: it maps the topology too, and has its share of the budget."""
        share = int(self.run.train_host_bytes * (1 - ROLLING_SHARE))
        planning = self.splits["train"].summary.planning_memory_bytes
        return PRODUCER + topology_bytes(self.run.graph) + max(share, planning)


def _prepared(run: Run) -> Phase:
    """Sampling and planning, which are done."""
    so_far = peak_rss_bytes()
    mapped = min(topology_bytes(run.graph), so_far)
    process = min(run.process_bytes, so_far - mapped)
    scratch = so_far - mapped - process
    parts = {PROCESS: process, TOPOLOGY: mapped, "sampling and planning": scratch}
    return Phase(name="prepare", parts=parts, budgeted=scratch)


def forecast_in_memory(run: Run, trace: Trace, splits: Mapping[Split, PlannedSplit]) -> Forecast:
    """Predict the process that trains on `trace` with the whole feature table in memory; `splits` are evaluated."""
    sizes, largest, meta = _Sizes(run, splits), largest_item(trace), run.graph.meta
    row_format = RowFormat(dtype=run.config.plan.row_dtype or meta.feature_dtype, width=meta.num_features)
    max_inputs = max((max(window.index.num_inputs) for window in trace.windows()), default=0)
    train = {
        PROCESS: run.process_bytes,
        "feature table": run.graph.num_nodes * row_format.row_bytes,
        "batches": batches_bytes(max_inputs, row_format.width, largest.payload_bytes),
        "weights and optimizer": sizes.weights(),
        "activations": WAITING * sizes.step(largest, train=True),
    }
    return Forecast(phases=(_prepared(run), Phase(name="train", parts=train | sizes.evaluation())))


def forecast_replicas(run: Run, replicas: Sequence[Mapping[str, Any]]) -> Forecast:
    """The driver and its replicas, which are processes beside it; of each what it predicted for itself."""
    parts = {"driver": run.untrained_bytes}
    parts["replicas"] = sum(int(memory["predicted_peak_bytes"]) for memory in replicas)
    return Forecast(phases=(Phase(name="train", parts=parts),))


def forecast_sampled(run: Run, splits: Mapping[Split, PlannedSplit], packing: int) -> Forecast:
    """Predict the process from the plans of all its splits; `packing` is what the packer holds."""
    sizes = _Sizes(run, splits)
    feed = sizes.feed("train", run.train_host_bytes)
    train = {PROCESS: run.process_bytes, **feed, "weights and optimizer": sizes.weights()}
    train |= {"activations": WAITING * sizes.step(splits["train"].largest, train=True), **sizes.evaluation()}
    if splits["train"].summary.mode == "rolling":
        train["producer"] = sizes.producer()
    return Forecast(
        phases=(
            _prepared(run),
            Phase(name="pack", parts={PROCESS: run.process_bytes, "packing": packing}, budgeted=packing),
            Phase(name="train", parts=train, budgeted=sum(feed.values())),
        )
    )
