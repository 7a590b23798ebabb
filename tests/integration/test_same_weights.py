"""Settings that only move data or divide work change no bit of the weights, with threads as they are by default.

Graphs and widths are such that torch's own products and sums would round by the number of threads.
"""

from pathlib import Path
from typing import Any

import pytest

from penstock.config import load_config
from penstock.storage.budget import MIB
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.training import train


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("same") / "graph"
    config = GenerateConfig(num_nodes=5000, num_features=64, num_classes=9, avg_degree=8, train=0.3, valid=0.05)
    generate_graph(out, config, host_memory=64 * MIB)
    return out


SAMPLED: dict[str, Any] = {
    "sampler.fanouts": (5, 5),
    "sampler.batch_size": 450,
    "model.hidden": 64,
    "train.accumulate": 2,
    "train.grad_clip": 1.0,
    "budgets.host_memory": "256MiB",
}
WHOLE: dict[str, Any] = {
    "mode": "chunked",
    "chunked.chunks": 4,
    "chunked.partition": "ldg",  # the automatic choice is made once, by the memory at hand
    "model.kind": "gcnii",
    "model.num_layers": 4,
    "model.hidden": 64,
    "train.grad_clip": 1.0,
    "budgets.host_memory": "1GiB",
}


def weights_of(graph: Path, run: Path, **options: Any) -> tuple[list[float], bytes]:
    flags = {"dataset": graph, "run_dir": run, "train.epochs": 2, "evaluate.mode": "none", **options}
    losses = train(load_config(flags=flags))["metrics"]["train_losses"]
    return losses, (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def sampled(graph: Path) -> tuple[list[float], bytes]:
    return weights_of(graph, graph.parent / "sampled", **SAMPLED)


@pytest.fixture(scope="module")
def whole(graph: Path) -> tuple[list[float], bytes]:
    return weights_of(graph, graph.parent / "whole", **WHOLE)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"train.threads": 1}, id="one thread"),
        pytest.param({"train.threads": 4}, id="four threads"),
        pytest.param({"cluster.replicas": 2}, id="two replicas", marks=pytest.mark.slow),
        pytest.param({"budgets.host_memory": "64MiB", "budgets.disk": "600MiB"}, id="less memory and disk"),
    ],
)
def test_samples(options: dict[str, Any], graph: Path, tmp_path: Path, sampled: tuple[list[float], bytes]) -> None:
    assert weights_of(graph, tmp_path / "run", **SAMPLED | options) == sampled


@pytest.mark.slow
@pytest.mark.parametrize("feeders", [1, 2])
def test_samples_from_feeders(feeders: int, graph: Path, tmp_path: Path) -> None:
    """Feeders roll, so the run without them does, too."""
    rolled = weights_of(graph, tmp_path / "rolled", **SAMPLED, **{"plan.mode": "rolling"})
    assert weights_of(graph, tmp_path / "fed", **SAMPLED, **{"cluster.feeders": feeders}) == rolled


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"train.threads": 1}, id="one thread"),
        pytest.param({"train.threads": 4}, id="four threads"),
        pytest.param({"chunked.stages": 2}, id="two stages"),
        pytest.param(
            {"chunked.stages": 4, "chunked.backend": "processes"}, id="four stages in processes", marks=pytest.mark.slow
        ),
        pytest.param({"budgets.host_memory": "200MiB"}, id="histories on disk"),
    ],
)
def test_whole_graphs(options: dict[str, Any], graph: Path, tmp_path: Path, whole: tuple[list[float], bytes]) -> None:
    assert weights_of(graph, tmp_path / "run", **WHOLE | options) == whole
