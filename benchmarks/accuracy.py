"""Accuracy on real graphs: Cora with GCN and facebook with SAGE, mean of several seeds; see also `accuracy_chunked`.

From the Parquet files to the test accuracy with the engine's own parts: ingest, sample, feed, train, keep the weights
of the epoch with the best valid accuracy, score the test split once, exactly. Nothing is chosen by test accuracy.

    PENSTOCK_DATA=/path/to/datasets python -m penstock.benchmarks.accuracy [cora|facebook|...] [--seeds 5] [--json]
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.benchmarks.accuracy_chunked import CHUNKED_CASES, run_chunked_case
from penstock.benchmarks.harness import machine, record, scratch_folder
from penstock.engine.evaluate import evaluate_exact, evaluate_feed
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.minibatch import MiniBatch
from penstock.engine.models import ModelConfig, build_model, needs_degrees
from penstock.engine.trainer import TrainConfig, Trainer, seed_step
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.budget import GIB, num_threads
from penstock.storage.graph import GraphStore
from penstock.storage.ingest import IngestOptions, ingest_parquet

_MEMORY = 1 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How a graph is trained, and the test accuracy that this project promises for it."""

    graph: str
    fanouts: tuple[int, ...]
    batch_size: int
    sampled_epochs: int
    model: ModelConfig
    train: TrainConfig
    target: float


CASES = {
    "cora": Case(
        graph="cora",
        fanouts=(-1, -1),
        batch_size=140,
        sampled_epochs=1,
        model=ModelConfig(kind="gcn", num_layers=2, hidden=64, dropout=0.8, input_dropout=0.8),
        train=TrainConfig(epochs=200, lr=0.01, weight_decay=5e-4, checkpoint_minutes=None),
        target=0.805,
    ),
    "facebook": Case(
        graph="facebook",
        fanouts=(10, 10),
        batch_size=2048,
        sampled_epochs=4,
        model=ModelConfig(kind="sage", num_layers=2, hidden=64, dropout=0.5),
        train=TrainConfig(epochs=12, lr=0.01, checkpoint_minutes=None),
        target=0.93,
    ),
}


def ingest_case(case: Case, data: Path, folder: Path) -> GraphStore:
    """Make the graph store of a case; its edges list both directions already."""
    source = data / case.graph
    options = IngestOptions(self_loops="remove")
    return ingest_parquet(
        source / "nodes.parquet", source / "edges.parquet", folder / case.graph, options, host_memory=_MEMORY
    )


def _valid_batches(graph: GraphStore, case: Case, folder: Path, threads: int) -> list[MiniBatch]:
    """The valid split over all neighbours, held in memory: these graphs are small."""
    config = SampleConfig(fanouts=(-1,) * len(case.fanouts), batch_size=1024, degrees=needs_degrees(case.model))
    trace = sample_trace(
        graph, folder / "valid", config, split="valid", shuffle=False, host_memory=_MEMORY, threads=threads
    )
    with open_memory_feed(graph, trace, start_step=0, stop_step=trace.meta.num_items, threads=threads) as feed:
        return [batch.clone() for batch in feed]


def train_case(graph: GraphStore, case: Case, seed: int, folder: Path) -> dict[str, float]:
    """Train with one seed in an empty folder; returns valid and test accuracy, the best epoch, and seconds."""
    began, threads = time.perf_counter(), num_threads()
    config = SampleConfig(
        fanouts=case.fanouts, batch_size=case.batch_size, seed=seed, degrees=needs_degrees(case.model)
    )
    trace = sample_trace(
        graph, folder / "train", config, num_epochs=case.sampled_epochs, host_memory=_MEMORY, threads=threads
    )
    valid = _valid_batches(graph, case, folder, threads)
    seed_step(seed, -1, torch.device("cpu"))
    model = build_model(case.model, graph.meta.num_features, graph.meta.num_classes, len(case.fanouts))
    trainer = Trainer(
        model,
        case.train.model_copy(update={"seed": seed}),
        items_per_epoch=trace.meta.items_per_epoch,
        checkpoints=folder / "checkpoints",
        metrics=folder / "metrics.jsonl",
        evaluate=lambda trained: {"valid": evaluate_feed(trained, valid, graph.meta.num_classes)},
    )
    result = trainer.run(
        lambda start, stop: open_memory_feed(graph, trace, start_step=start, stop_step=stop, threads=threads)
    )
    found = evaluate_exact(model, graph, ["valid", "test"], folder / "exact", host_memory=_MEMORY, threads=threads)
    return {
        "valid_accuracy": found["valid"].accuracy,
        "test_accuracy": found["test"].accuracy,
        "best_epoch": result.best_epoch,
        "seconds": time.perf_counter() - began,
    }


def run_case(case: Case, graph: GraphStore, folder: Path, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield the result of every seed, then a record of their mean against the target."""
    accuracies = []
    for seed in range(seeds):
        found = train_case(graph, case, seed, folder / f"{case.graph}-{seed}")
        accuracies.append(found["test_accuracy"])
        yield {"case": case.graph, "seed": seed, **found}
    deviation = statistics.stdev(accuracies) if seeds > 1 else 0.0
    name = f"{case.graph}_{case.model.kind}"
    mean = record("accuracy", name, "share", statistics.mean(accuracies), case.target, "target", True, seeds)
    yield {**mean, "deviation": deviation}


def _run(name: str, data: Path, folder: Path, seeds: int) -> Iterator[dict[str, Any]]:
    """Run a case of either kind; graphs are ingested once."""
    chunked = CHUNKED_CASES.get(name)
    graph = ingest_case(CASES[chunked.graph if chunked else name], data, folder)
    if chunked:
        return run_chunked_case(name, chunked, graph, folder, seeds)
    return run_case(CASES[name], graph, folder, seeds)


def main() -> None:
    """Run the cases and print one line per seed and case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, *CHUNKED_CASES, []], help="default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    data = os.environ.get("PENSTOCK_DATA")
    if not data:
        parser.error("set PENSTOCK_DATA to the folder that holds cora/ and facebook/")
    with scratch_folder() as folder:
        for name in options.cases or [*CASES, *CHUNKED_CASES]:
            for line in _run(name, Path(data), folder, options.seeds):
                print(json.dumps(line) if options.json else "  ".join(f"{k} {v}" for k, v in line.items()), flush=True)
    print(json.dumps(machine()) if options.json else f"machine {machine()}")


if __name__ == "__main__":
    main()
