"""Accuracy of full-graph training on real graphs: chunks, stages and parts against our own full batch.

All sides of a case start from the same weights, and as dropout masks follow from seed, epoch, layer and node, they
also draw the same ones: what differs is what chunks know of each other. Full batch is the same executor with one chunk,
which is plain full-graph training. Every run keeps the weights of the epoch with the best valid accuracy and scores the
test split once, exactly; settings were chosen by valid accuracy alone.

    PENSTOCK_DATA=/path/to/datasets python -m penstock.benchmarks.accuracy [cora_gcn_drop|...] [--seeds 10] [--json]

| case | settings from | sides |
|---|---|---|
| `cora_gcn_drop` | GAS (Fey et al., ICML 2021) for Cora | GAS's own mode on METIS chunks |
| `cora_gcnii16` | GCNII (Chen et al., ICML 2020) for Cora, 16 layers | five gradient modes on METIS and random chunks |
| `facebook_resgcn8` | ours | a pipeline of four stages, two parts |
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.benchmarks.harness import record
from penstock.engine.chunked.config import ChunkedConfig, GradientMode
from penstock.engine.chunked.setup import make_specs
from penstock.engine.chunked.spec import FeatureSpec
from penstock.engine.chunked.threads import open_threads
from penstock.engine.chunked.trainer import ChunkedTrainer, initial_weights
from penstock.engine.evaluate import evaluate_exact
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.trainer import TrainConfig
from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.write import write_chunks
from penstock.storage.budget import GIB
from penstock.storage.chunks import ChunkStore
from penstock.storage.graph import GraphStore

_MEMORY = 4 * GIB
FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkedCase:
    """A graph, a model, and how it is trained: `sides` by name, `full` among them, and what is promised of some.

    A side in `promised` has a mean test accuracy at least `margin` below that of `full`, and at least `least`.
    """

    graph: str
    model: ModelConfig
    train: TrainConfig
    sides: Mapping[str, ChunkedConfig]
    promised: tuple[str, ...]
    margin: float
    least: float = 0.0


def _modes() -> dict[str, ChunkedConfig]:
    """Every gradient mode on local and on random chunks."""
    modes: tuple[GradientMode, ...] = ("stale", "surrogate", "gnnpipe", "drop", "mix")
    return {
        f"{mode}_{method}": ChunkedConfig(chunks=8, partition=method, gradient_mode=mode)
        for method in ("metis", "random")
        for mode in modes
    }


CHUNKED_CASES = {
    "cora_gcn_drop": ChunkedCase(
        graph="cora",
        model=ModelConfig(kind="gcn", num_layers=2, hidden=64, dropout=0.8, input_dropout=0.8),
        train=TrainConfig(epochs=200, lr=0.01, weight_decay=1e-3, checkpoint_minutes=None),
        sides={
            FULL: ChunkedConfig(chunks=1),
            "drop": ChunkedConfig(chunks=8, partition="metis", gradient_mode="drop", updates_per_epoch=4),
        },
        promised=("drop",),
        margin=0.01,
        least=0.81,
    ),
    "cora_gcnii16": ChunkedCase(
        graph="cora",
        model=ModelConfig(kind="gcnii", num_layers=16, hidden=64, dropout=0.6, input_dropout=0.6, alpha=0.1, theta=0.5),
        train=TrainConfig(epochs=200, lr=0.003, weight_decay=5e-3, checkpoint_minutes=None),
        sides={FULL: ChunkedConfig(chunks=1), **_modes()},
        promised=("stale_metis", "stale_random"),
        margin=0.01,
    ),
    "facebook_resgcn8": ChunkedCase(
        graph="facebook",
        model=ModelConfig(kind="resgcn", num_layers=8, hidden=64, dropout=0.5),
        train=TrainConfig(epochs=100, lr=0.01, checkpoint_minutes=None),
        sides={
            FULL: ChunkedConfig(chunks=1),
            "pipeline": ChunkedConfig(chunks=16, stages=4, partition="metis"),
            "graph_parallel": ChunkedConfig(chunks=1, parts=2, partition="metis"),
        },
        promised=("pipeline", "graph_parallel"),
        margin=0.005,
    ),
}


def _cut(graph: GraphStore, config: ChunkedConfig, folder: Path) -> ChunkStore:
    method = "random" if config.chunks * config.parts == 1 else config.partition
    cut = PartitionConfig(chunks=config.chunks, parts=config.parts, method=method, seed=config.partition_seed)
    return write_chunks(graph, folder / f"{method}-{config.parts}x{config.chunks}", cut, host_memory=_MEMORY, threads=1)


def train_side(
    graph: GraphStore, case: ChunkedCase, config: ChunkedConfig, seed: int, folder: Path
) -> dict[str, float]:
    """Train one side with one seed in `folder`; chunks lie beside it, for all seeds. Returns accuracies and seconds."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = build_model(case.model, graph.meta.num_features, graph.meta.num_classes)
    specs = make_specs(
        graph=graph,
        chunks=_cut(graph, config, folder.parent / f"chunks-{case.graph}"),
        scratch=folder / "scratch",
        weights=initial_weights(folder / "initial.safetensors", model),
        model=model,
        model_config=case.model,
        train=case.train.model_copy(update={"seed": seed}),
        chunked=config,
        features=[FeatureSpec(kind="memory")] * config.parts,
        recompute=False,
        history_memory=_MEMORY,
    )
    trainer = ChunkedTrainer(specs, open_threads, checkpoints=folder / "checkpoints", metrics=folder / "metrics.jsonl")
    result = trainer.run()
    model.load_state_dict(result.weights)
    found = evaluate_exact(model, graph, ["valid", "test"], folder / "exact", host_memory=_MEMORY, threads=1)
    return {
        "valid_accuracy": found["valid"].accuracy,
        "test_accuracy": found["test"].accuracy,
        "best_epoch": result.state.best_epoch,
        "last_loss": result.losses[-1],
        "seconds": time.perf_counter() - began,
    }


def run_chunked_case(
    name: str, case: ChunkedCase, graph: GraphStore, folder: Path, seeds: int
) -> Iterator[dict[str, Any]]:
    """Yield the result of every side and seed, then per side the mean, a record where something is promised of it.

    A record's peer is what was promised: the mean of `full` less the margin, or `least` where that is more.
    """
    accuracies: dict[str, list[float]] = {side: [] for side in case.sides}
    for seed in range(seeds):
        for side, config in case.sides.items():
            found = train_side(graph, case, config, seed, folder / f"{name}-{side}-{seed}")
            accuracies[side].append(found["test_accuracy"])
            yield {"case": name, "side": side, "seed": seed, **found}
    full = statistics.mean(accuracies[FULL])
    for side, values in accuracies.items():
        mean, deviation = statistics.mean(values), statistics.stdev(values) if seeds > 1 else 0.0
        summary = {"side": side, "mean": mean, "deviation": deviation, "full": full}
        if side not in case.promised:
            yield {"case": name, **summary}
            continue
        target = max(full - case.margin, case.least)
        yield {**record("accuracy", f"{name}_{side}", "share", mean, target, "target", True, seeds), **summary}
