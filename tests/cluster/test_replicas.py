"""Replicas and feeders on a cluster of three nodes, all of them this machine: the weights of one process."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from penstock.benchmarks.accuracy import CASES, ingest_case
from penstock.config import RunConfig, load_config
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.training import train

# Ray drops a socket that it did not close when nodes are added
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
REPLICAS: dict[str, Any] = {
    "cluster.replicas": 2,
    "cluster.address": "auto",
    "cluster.replica_resources": {"trainer": 1},
}
FEEDERS: dict[str, Any] = {**REPLICAS, "cluster.feeders": 2, "cluster.feeder_resources": {"feeder": 1}}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    """A head node for feeders and the driver, and two nodes with room for one replica each."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"feeder": 2}})
    try:
        for _ in range(2):
            found.add_node(num_cpus=2, resources={"trainer": 1})
        ray.init(address=found.address, logging_level=logging.ERROR)
        yield found
    finally:
        ray.shutdown()
        found.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replicas") / "graph"
    config = GenerateConfig(num_nodes=6000, num_features=24, avg_degree=8, train=0.2, valid=0.05, test=0.05)
    generate_graph(out, config, host_memory=32 << 20)
    return out


def configure_generated(graph: Path, run: Path, **options: Any) -> RunConfig:
    """19 items per epoch, four per optimizer step; every epoch is sampled anew, as feeders do."""
    flags = {
        "dataset": str(graph),
        "run_dir": str(run),
        "sampler.fanouts": (4, 4),
        "sampler.batch_size": 64,
        "model.hidden": 16,
        "model.norm": "batch",
        "train.accumulate": 4,
        "train.epochs": 5,
        "train.lr": 0.02,
        "train.threads": 1,
        "budgets.host_memory": "64MiB",
        **options,
    }
    if not options.get("cluster.feeders"):
        flags["sampled_epochs"] = 5
    return load_config(flags=flags)


def configure_cora(graph: Path, run: Path, **options: Any) -> RunConfig:
    """The public split and the case's model, in two items per optimizer step."""
    case = CASES["cora"]
    flags = {
        "dataset": str(graph),
        "run_dir": str(run),
        "sampled_epochs": 1,
        "sampler.fanouts": case.fanouts,
        "sampler.batch_size": case.batch_size // 2,
        "train.epochs": 60,
        "train.evaluate_every": 6,
        "train.lr": case.train.lr,
        "train.weight_decay": case.train.weight_decay,
        "train.accumulate": 2,
        "train.threads": 1,
        "budgets.host_memory": "128MiB",
        **{f"model.{name}": getattr(case.model, name) for name in ("kind", "hidden", "dropout", "input_dropout")},
        **options,
    }
    return load_config(flags=flags)


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def same(result: dict[str, Any], run: Path, alone: dict[str, Any], alone_run: Path) -> None:
    for name in ("train_losses", "valid_accuracy", "test_accuracy", "test_macro_f1", "best_epoch", "steps"):
        assert result["metrics"][name] == alone["metrics"][name], name
    assert weights(run) == weights(alone_run)


def nodes(with_resource: str) -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if with_resource in node["Resources"]}  # type: ignore[no-untyped-call]


def hosts(result: dict[str, Any]) -> set[str]:
    """The first digits of the nodes' ids."""
    return {rank["host"].rsplit("/", 1)[1] for rank in result["ranks"]}


def test_cora(data_folder: Path, tmp_path: Path) -> None:
    store = ingest_case(CASES["cora"], data_folder, tmp_path).path
    alone = train(configure_cora(store, tmp_path / "alone"))
    run = tmp_path / "run"
    result = train(configure_cora(store, run, **REPLICAS))
    same(result, run, alone, tmp_path / "alone")
    assert result["metrics"]["test_accuracy"] > 0.78
    assert hosts(result) == {node[:8] for node in nodes("trainer")} and len(hosts(result)) == 2


def test_replicas_pack_on_nodes_of_their_own(graph: Path, tmp_path: Path) -> None:
    alone = train(configure_generated(graph, tmp_path / "alone"))
    packed, fed = tmp_path / "packed", tmp_path / "fed"
    result = train(configure_generated(graph, packed, **REPLICAS))
    same(result, packed, alone, tmp_path / "alone")
    assert result["metrics"]["test_accuracy"] > 0.5 and sum(rank["items"] for rank in result["ranks"]) == 5 * 19
    assert hosts(result) == {node[:8] for node in nodes("trainer")} and len(hosts(result)) == 2
    found = [
        [path.read_bytes() for path in sorted((packed / "local" / f"replica-{rank}-of-2/train/packs").glob("*.pack"))]
        for rank in range(2)
    ]
    assert all(found) and found[0] != found[1]
    assert not (packed / "train").exists()  # the driver packs nothing

    result = train(configure_generated(graph, fed, **FEEDERS))
    same(result, fed, alone, tmp_path / "alone")
    assert {feeder["where"].split()[1] for feeder in result["feeders"]} == nodes("feeder")
    assert len(result["feeders"]) == 2
    assert hosts(result) == {node[:8] for node in nodes("trainer")} and len(hosts(result)) == 2
    assert all(rank["pulled"]["pulled_windows"] > 0 for rank in result["ranks"])
    assert not list((fed / "local").rglob("*.pack"))
