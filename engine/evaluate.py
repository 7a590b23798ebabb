"""Metrics of a model: on sampled items from a feed, or exact over all neighbours."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from penstock.engine.exact import LayerTable, exact_tables
from penstock.engine.metrics import Counts, Metrics
from penstock.engine.minibatch import MiniBatch
from penstock.storage.graph import GraphStore, Split
from penstock.storage.npyfile import drop_pages
from penstock.storage.progress import Progress, silent

_ROWS = 1 << 16  # rows of a table that are scored together


def evaluate_feed(model: nn.Module, feed: Iterable[MiniBatch], num_classes: int) -> Metrics:
    """Score a model on every item of a feed, in evaluation mode; its mode is restored."""
    return count_feed(model, feed, num_classes).metrics()


@torch.no_grad()
def count_feed(model: nn.Module, feed: Iterable[MiniBatch], num_classes: int) -> Counts:
    """What `evaluate_feed` counts, to be added to what others count."""
    was_training = model.training
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    counts = Counts(num_classes, device)
    model.eval()
    try:
        for batch in feed:
            on_device = batch if batch.features.device.type == device.type else batch.to(device)
            counts.update(model(on_device.blocks, on_device.features), on_device.labels)
    finally:
        model.train(was_training)
    return counts


def score_table(table: LayerTable, graph: GraphStore, split: Split) -> Metrics:
    """Score a table of logits on the nodes of a split, in chunks."""
    counts, logits, ids = Counts(graph.meta.num_classes), table.open(), graph.split_ids(split)
    for lo in range(0, len(ids), _ROWS):
        part = ids[lo : lo + _ROWS]
        labels = torch.from_numpy(graph.labels[part])
        rows = torch.from_numpy(logits[table.positions(part)])
        counts.update(rows, labels.float() if labels.ndim == 2 else labels.long())
        drop_pages(logits)
    return counts.metrics()


def evaluate_exact(
    model: nn.Module,
    graph: GraphStore,
    splits: Iterable[Split],
    scratch: Path,
    *,
    host_memory: int,
    threads: int,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> dict[Split, Metrics]:
    """Score a model on splits over all in-neighbours; see `exact.exact_tables` for memory and disk."""
    splits = list(splits)
    targets = np.concatenate([graph.split_ids(split) for split in splits])
    with exact_tables(
        model,
        graph,
        scratch,
        host_memory=host_memory,
        threads=threads,
        device=device,
        targets=targets,
        progress=progress,
    ) as table:
        return {split: score_table(table, graph, split) for split in splits}
