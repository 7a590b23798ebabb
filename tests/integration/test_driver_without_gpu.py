"""Ranks elsewhere have GPUs, and the driver has none: as on Kubernetes, where the head has no GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock import chunked_training
from penstock.config import RunConfig, load_config
from penstock.engine.chunked.backend import OpenBackend, Poll
from penstock.engine.chunked.threads import open_threads
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.training import train

RAY = {"cluster.address": "local"}  # who places ranks; the stand-in below does


def ranks_elsewhere(config: RunConfig, poll: Poll) -> OpenBackend:
    return lambda specs: open_threads([replace(spec, device="cpu") for spec in specs])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this driver has a GPU")
def test_what_ranks_trained_is_scored_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GenerateConfig(num_nodes=400, num_features=8, avg_degree=5, num_classes=3)
    generate_graph(tmp_path / "graph", config, host_memory=32 << 20)
    flags = {
        "dataset": str(tmp_path / "graph"),
        "mode": "chunked",
        "chunked.chunks": 2,
        "model.kind": "gcn",
        "model.num_layers": 2,
        "model.hidden": 8,
        "train.epochs": 2,
        "train.threads": 1,
        "budgets.host_memory": "64MiB",
        "budgets.disk": "256MiB",
    }
    alone = train(load_config(flags={**flags, "run_dir": str(tmp_path / "cpu")}))
    monkeypatch.setattr(chunked_training, "find_backend", ranks_elsewhere)
    found = train(load_config(flags={**flags, "run_dir": str(tmp_path / "cuda"), "train.device": "cuda", **RAY}))
    assert found["status"] == "ok" and found["metrics"]["test_accuracy"] == alone["metrics"]["test_accuracy"]
