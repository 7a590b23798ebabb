"""Inferences on one run beside each other, and one after another's kill."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import penstock
from penstock.engine.modelfile import save_model
from penstock.engine.models import ModelConfig, build_model
from penstock.storage.graph import GraphStore

MEMORY = 64 << 20


@pytest.fixture(scope="module")
def graphs(make_graph: Callable[..., GraphStore]) -> list[GraphStore]:
    """Two graphs of equal shape."""
    found = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        features = rng.standard_normal((200, 6)).astype(np.float32)
        found.append(make_graph(200, rng.integers(0, 200, (900, 2)), features=features))
    return found


@pytest.fixture
def run_dir(graphs: list[GraphStore], tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config, run = ModelConfig(num_layers=3, hidden=8), tmp_path / "run"
    save_model(run / "model", build_model(config, 6, 3), config, num_features=6, num_classes=3, fanouts=(5, 5, 5))
    (run / "config.yaml").write_text(yaml.safe_dump({"dataset": str(graphs[0].path)}))
    return run


def logits(path: Path) -> Any:
    return np.array(pq.read_table(path)["logits"].to_pylist())


def infer(run_dir: Path, graph: GraphStore, out: Path, **options: Any) -> Any:
    penstock.infer(run_dir, out, dataset=graph.path, host_memory=MEMORY, threads=1, **options)
    return logits(out)


def test_one_inference_leaves_another_alone(run_dir: Path, graphs: list[GraphStore], tmp_path: Path) -> None:
    """The other one runs from start to end while this one is between its layers, and once more beside its own kind."""
    alone = [infer(run_dir, graph, tmp_path / "alone.parquet") for graph in graphs]
    beside: list[Any] = []

    def interrupt(stage: str, *_: Any, **__: Any) -> None:
        if stage == "exact layer 2" and not beside:
            beside.append(None)
            beside[:] = [infer(run_dir, graph, tmp_path / "beside.parquet") for graph in graphs[::-1]]

    np.testing.assert_array_equal(infer(run_dir, graphs[0], tmp_path / "out.parquet", progress=interrupt), alone[0])
    np.testing.assert_array_equal(beside[1], alone[0])
    np.testing.assert_array_equal(beside[0], alone[1])
    assert not [path for path in (run_dir / "exact" / "infer").iterdir() if path.is_dir()]


KILLED = """
import os, signal, sys, penstock
def die(stage, done, total, unit, **numbers):
    if stage == "exact layer 3":
        os.kill(os.getpid(), signal.SIGKILL)
penstock.infer(sys.argv[1], sys.argv[2], dataset=sys.argv[3], host_memory=int(sys.argv[4]), threads=1, progress=die)
"""


def test_a_killed_inference_is_continued_and_leaves_nothing(
    run_dir: Path, graphs: list[GraphStore], tmp_path: Path
) -> None:
    out, tables = tmp_path / "out.parquet", run_dir / "exact" / "infer"
    wanted = infer(run_dir, graphs[0], tmp_path / "alone.parquet")
    command = [sys.executable, "-c", KILLED, str(run_dir), str(out), str(graphs[0].path), str(MEMORY)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert len([path for path in tables.iterdir() if path.is_dir()]) == 1 and not out.exists()
    stages: list[str] = []
    found = infer(run_dir, graphs[0], out, progress=lambda stage, *_, **__: stages.append(stage))
    np.testing.assert_array_equal(found, wanted)
    assert "exact layer 3" in stages and "exact layer 1" not in stages
    assert not [path for path in tables.iterdir() if path.is_dir()]
