"""Training out of core gives the losses and weights of training in memory, bit for bit, whatever happens on the way."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.engine.checkpoint import list_checkpoints, pack_tensors
from penstock.engine.evaluate import evaluate_feed
from penstock.engine.feed import open_pack_feed
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.metrics import Metrics
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.prefetch import Feed
from penstock.engine.trainer import TrainConfig, Trainer, TrainResult, seed_step
from penstock.sampler.estimate import DiskRates
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.sampler.packer import write_packs
from penstock.sampler.plan import PlanConfig, plan_packs
from penstock.storage.budget import GIB, MIB, Budgets
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore
from penstock.storage.pack import PackSetMeta
from penstock.storage.trace import Trace

RATES = DiskRates(read_bytes_per_s=1e9, write_bytes_per_s=1e9, random_reads_per_s=1e5)
EPOCHS = 5
MODELS: dict[str, dict[str, Any]] = {
    "sage": {"norm": "batch"},
    "gcn": {"residual": True},
    "gat": {"heads": 2, "attention_dropout": 0.2},
    "gin": {"norm": "layer"},
}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """6000 nodes with rows of 1200 bytes, which are no part of a page."""
    config = GenerateConfig(
        num_nodes=6000, avg_degree=6, num_features=300, num_classes=4, train=0.1, valid=0.05, seed=5
    )
    return generate_graph(tmp_path_factory.mktemp("parity") / "graph", config, host_memory=64 * MIB)


@pytest.fixture(scope="module")
def trace(graph: GraphStore, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Two epochs, so that five epochs of training cycle it two and a half times."""
    config = SampleConfig(fanouts=(4, 4), batch_size=70, seed=3, degrees=True, window_items=4)
    folder = tmp_path_factory.mktemp("trace")
    return sample_trace(graph, folder / "trace", config, num_epochs=2, host_memory=64 * MIB, threads=2)


def pack(graph: GraphStore, trace: Trace, folder: Path, host_bytes: int, **options: Any) -> PackSetMeta:
    budgets = Budgets(device_bytes=0, host_bytes=host_bytes, disk_bytes=GIB)
    config = PlanConfig(mode="reuse", **options)
    plan = plan_packs(graph, trace, config, budgets, disk_rates=RATES, scratch=folder / "plan")
    return write_packs(plan, graph, trace, folder / "packs", host_memory=64 * MIB)


def train(
    graph: GraphStore, trace: Trace, folder: Path, kind: str, packs: Path | None = None, row_dtype: Any = None
) -> tuple[TrainResult, bytes]:
    """Train from packs, or from memory; the validation reads the training items, which is all the same here."""

    def open_feed(start: int, stop: int) -> Feed:
        if packs is None:
            return open_memory_feed(graph, trace, start_step=start, stop_step=stop, row_dtype=row_dtype, threads=1)
        return open_pack_feed(packs, graph, start_step=start, stop_step=stop, host_memory=64 * MIB, threads=2)

    def evaluate(model: torch.nn.Module) -> dict[str, Metrics]:
        with open_feed(0, 2) as feed:
            return {"valid": evaluate_feed(model, feed, 4)}

    config = ModelConfig.model_validate({"kind": kind, "num_layers": 2, "hidden": 16, **MODELS[kind]})
    seed_step(0, -1, torch.device("cpu"))
    model = build_model(config, graph.meta.num_features, graph.meta.num_classes)
    trainer = Trainer(
        model,
        TrainConfig(epochs=EPOCHS, lr=0.01, schedule="cosine", patience=3, threads=1),
        items_per_epoch=trace.meta.items_per_epoch,
        checkpoints=folder / "checkpoints",
        metrics=folder / "metrics.jsonl",
        evaluate=evaluate,
    )
    return trainer.run(open_feed), pack_tensors(model.state_dict())


@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_weights(kind: str, graph: GraphStore, trace: Trace, tmp_path: Path) -> None:
    meta = pack(graph, trace, tmp_path, 4 * MIB)
    assert 0 < meta.host_slots < graph.num_nodes // 2
    expected, weights = train(graph, trace, tmp_path / "memory", kind)
    found, packed = train(graph, trace, tmp_path / "packed", kind, tmp_path / "packs")
    assert found.losses == expected.losses and len(set(found.losses)) == len(found.losses) >= 4
    assert found.evaluations == expected.evaluations
    assert packed == weights


@pytest.mark.parametrize("policy", ["belady", "static", "none"])
@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16", "int8"])
def test_any_policy_and_row_dtype(policy: str, row_dtype: str, graph: GraphStore, trace: Trace, tmp_path: Path) -> None:
    pack(graph, trace, tmp_path, 4 * MIB, policy=policy, row_dtype=row_dtype)
    expected = train(graph, trace, tmp_path / "memory", "sage", row_dtype=row_dtype)
    found = train(graph, trace, tmp_path / "packed", "sage", tmp_path / "packs")
    assert found[0].losses == expected[0].losses and found[1] == expected[1]


CHILD = """
import sys
from pathlib import Path
import torch
from penstock.engine.feed import open_pack_feed
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.modelfile import save_model
from penstock.engine.trainer import TrainConfig, Trainer, seed_step
from penstock.storage.graph import open_graph
from penstock.storage.pack import open_packset

graph, packs, folder = open_graph(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
config = ModelConfig(kind="sage", num_layers=2, hidden=32, norm="batch")
seed_step(0, -1, torch.device("cpu"))
model = build_model(config, graph.meta.num_features, graph.meta.num_classes)
trainer = Trainer(
    model,
    TrainConfig(epochs=12, schedule="linear", checkpoint_items=5, log_every=2),
    items_per_epoch=open_packset(packs).items_per_epoch,
    checkpoints=folder / "checkpoints",
    metrics=folder / "metrics.jsonl",
)
trainer.run(
    lambda start, stop: open_pack_feed(
        packs, graph, start_step=start, stop_step=stop, host_memory=1 << 26, threads=1
    )
)
save_model(folder / "model", model, config, num_features=300, num_classes=4, fanouts=(4, 4))
"""


@pytest.mark.slow
def test_killed_training_ends_with_the_same_weights(graph: GraphStore, trace: Trace, tmp_path: Path) -> None:
    pack(graph, trace, tmp_path, 4 * MIB)
    rng = random.Random(7)

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CHILD, str(graph.path), str(tmp_path / "packs"), str(folder)]
        with open(tmp_path / "errors.txt", "ab") as errors:
            return subprocess.Popen(command, stderr=errors)

    def steps_done(folder: Path) -> int:
        return max([int(path.name[5:]) for path in list_checkpoints(folder / "checkpoints")], default=0)

    whole = start(tmp_path / "whole")
    assert whole.wait(120) == 0, (tmp_path / "errors.txt").read_text()

    cut, killed = tmp_path / "cut", []
    for _ in range(4):
        before, child = steps_done(cut), start(cut)
        while steps_done(cut) < before + 5 * rng.randint(1, 3) and child.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        child.send_signal(signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL, "it was done before the kill: train for longer"
        killed.append(steps_done(cut))
    last = start(cut)
    assert last.wait(120) == 0, (tmp_path / "errors.txt").read_text()
    assert killed == sorted(killed) and 0 < killed[0] < killed[-1] < steps_done(cut)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "whole", cut)]
    assert weights[0] == weights[1]
    assert list(_records(cut)) == list(_records(tmp_path / "whole"))


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        yield {key: value for key, value in json.loads(line).items() if not key.endswith("items_per_s")}


def test_the_oracle_can_tell_rows_apart(graph: GraphStore) -> None:
    """Were all rows alike, a feed that mixed them up would pass the tests above."""
    assert len(np.unique(np.array(graph.features), axis=0)) > 0.99 * graph.num_nodes
