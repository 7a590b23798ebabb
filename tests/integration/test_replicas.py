"""Replicas in processes of this machine: the weights of one, whatever their number, and whoever is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from penstock.config import RunConfig, load_config
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.transport import ThreadHub, ThreadTransport
from penstock.engine.trainstate import Stopped
from penstock.replica import ReplicaSpec, open_replica
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore
from penstock.training import train

Children = Callable[[], list[psutil.Process]]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replicas") / "graph"
    config = GenerateConfig(num_nodes=6000, num_features=24, avg_degree=8, train=0.2, valid=0.05, test=0.05)
    generate_graph(out, config, host_memory=32 << 20)
    return out


def configure(graph: Path, run: Path, **options: Any) -> RunConfig:
    """17 items per epoch, four per optimizer step: the last step of an epoch has one, of the first replica."""
    flags = {
        "dataset": str(graph),
        "run_dir": str(run),
        "sampler.fanouts": (4, 4),
        "sampler.batch_size": 72,
        "model.hidden": 16,
        "model.norm": "batch",
        "train.accumulate": 4,
        "train.epochs": 3,
        "train.threads": 1,
        "train.log_every": 4,
        "budgets.host_memory": "64MiB",
        **options,
    }
    return load_config(flags=flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to that must not depend on who trained."""

    metrics: dict[str, Any]
    records: list[dict[str, Any]]
    weights: bytes


def outcome(result: dict[str, Any], run: Path) -> Outcome:
    """Sums over the nodes of a split depend on their order, so losses of evaluations differ by rounding."""
    free = ("items_per_s", "valid_loss", "test_loss", "host_memory_bytes")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Outcome(
        metrics={key: value for key, value in result["metrics"].items() if key not in free},
        records=[{key: value for key, value in line.items() if key not in free} for line in lines],
        weights=(run / "model" / "model.safetensors").read_bytes(),
    )


@pytest.fixture(scope="module")
def alone(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What one process without replicas comes to."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return outcome(train(configure(graph, run)), run)


@pytest.mark.slow
def test_replicas_end_with_the_weights_of_one(
    make_graph: Callable[..., GraphStore], tmp_path: Path, children: Children
) -> None:
    """Of a weighted graph with several labels per node, hop by hop, in rolling windows: all that no other test has."""
    rng = np.random.default_rng(3)
    edges = np.unique(rng.integers(0, 300, (2500, 2)), axis=0)
    labels, weights = (rng.random((300, 3)) > 0.5).astype(np.uint8), rng.random(len(edges)).astype(np.float32)
    graph = make_graph(300, edges, weights=weights, labels=labels).path
    sampling = {"sampler.weighted": True, "sampler.mode": "hop", "sampler.batch_size": 18}
    options = {**sampling, "evaluate.mode": "exact"}
    # rolling samples every epoch anew
    expected = outcome(train(configure(graph, tmp_path / "a", sampled_epochs=3, **options)), tmp_path / "a")
    run = tmp_path / "b"
    result = train(configure(graph, run, **options, **{"cluster.replicas": 2, "plan.mode": "rolling"}))
    assert outcome(result, run) == expected
    assert [rank["rank"] for rank in result["ranks"]] == [0, 1]
    assert [rank["items"] for rank in result["ranks"]] == [3 * 9, 3 * 8]
    assert all(rank["bytes_sent"] > 0 for rank in result["ranks"])
    assert not children()


def test_without_a_valid_split_nothing_is_evaluated(tmp_path: Path) -> None:
    graph = tmp_path / "graph"
    generate_graph(graph, GenerateConfig(num_nodes=800, avg_degree=4, valid=0.0, test=0.1), host_memory=32 << 20)
    result = train(configure(graph, tmp_path / "run", **{"train.epochs": 1}))
    assert not {"valid_accuracy", "test_accuracy"} & set(result["metrics"])
    assert not (tmp_path / "run" / "test").exists()


def test_a_run_that_began_anew_is_not_finished(graph: Path, tmp_path: Path) -> None:
    config = configure(graph, tmp_path / "run", **{"train.epochs": 1, "evaluate.mode": "none"})
    train(config)

    def killed(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, resume=False, progress=killed)
    assert train(config)["resumed_from"] == 0


@pytest.mark.slow
def test_a_stopped_run_goes_on_on_replicas(graph: Path, tmp_path: Path, alone: Outcome, children: Children) -> None:
    run, stop, replicas = tmp_path / "run", threading.Event(), {"cluster.replicas": 2}

    def show(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train" and done >= 17:  # the end of an epoch, with its evaluation still to come
            stop.set()

    config = {"feed": "memory", "train.log_every": 1}
    with pytest.raises(Stopped, match="stopped at step 17"):
        train(configure(graph, run, **config), progress=show, stop_requested=stop)
    with pytest.raises(Stopped, match="while replicas (plan|prepare)"):
        train(configure(graph, run, **config, **replicas), stop_requested=stop)
    assert not children()
    assert json.loads((run / "result.json").read_text())["status"] == "stopped"
    found = outcome(train(configure(graph, run, **config, **replicas)), run)
    assert (found.weights, found.metrics) == (alone.weights, alone.metrics)
    assert [line["step"] for line in found.records if "loss" in line] == list(range(1, 52))
    assert not (run / "valid").exists(), "packs of the run without replicas"
    with pytest.raises(ValueError, match=r"train.accumulate \(4 there, 8 asked\)|other values of train.accumulate"):
        train(configure(graph, run, **config, **replicas, **{"train.accumulate": 8}))


def test_a_replica_may_have_nothing_left(graph: Path, tmp_path: Path) -> None:
    config = configure(graph, tmp_path / "run", **{"cluster.replicas": 2, "plan.mode": "rolling"})
    spec = ReplicaSpec(
        rank=1,
        layout=Layout(1, 2),
        scratch=config.work_dir,
        threads=1,
        device="cpu",
        timeout_s=60,
        config=config,
    )
    with open_replica(spec, ThreadTransport(ThreadHub(), 1, 20), lambda done, total: None) as replica:
        assert replica.plan(2, None) == "rolling" and replica.prepare("rolling") == 17
        replica.open_feed(50, 51)
        assert replica.report().items == 0


def wait_for(found: Callable[[], Any]) -> Any:
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        value = found()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError("it did not come within 60 s")


@pytest.mark.slow
def test_killed_replicas_are_replaced(graph: Path, tmp_path: Path, alone: Outcome, children: Children) -> None:
    """One while it packs, before the checkpoints of the run to start over are of no use, and one while it trains."""
    run, stop, seen, killed = tmp_path / "run", threading.Event(), list[int](), list[int]()

    def stop_late(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train" and done >= 40:
            stop.set()

    with pytest.raises(Stopped, match="stopped at step 42"):
        train(configure(graph, run), progress=stop_late, stop_requested=stop)

    def kill() -> None:
        victim = children()[-1]
        victim.kill()
        killed.append(victim.pid)

    def kill_early() -> None:
        wait_for(lambda: list(run.glob("local/replica-*/replica.json")))
        kill()

    def show(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train":
            seen.append(done)
            if done >= 20 and len(killed) < 2:
                kill()

    thread = threading.Thread(target=kill_early)
    thread.start()
    options = {"cluster.replicas": 2, "train.checkpoint_items": 8}
    result = train(configure(graph, run, **options), resume=False, progress=show)
    thread.join()
    assert len(killed) == result["restarts"] == 2
    assert seen[0] == 4 and result["resumed_from"] > 0
    assert outcome(result, run) == alone
    assert not children()


@pytest.mark.slow
def test_a_killed_driver_leaves_no_replica_and_is_resumed(graph: Path, tmp_path: Path, alone: Outcome) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-P", "-m", "penstock", "train", str(graph), "--run-dir", str(run), "--quiet"]
    for key, value in (
        ("sampler.fanouts", "[4,4]"),
        ("sampler.batch_size", "72"),
        ("model.hidden", "16"),
        ("model.norm", "batch"),
        ("train.accumulate", "4"),
        ("train.epochs", "3"),
        ("train.threads", "1"),
        ("train.log_every", "4"),
        ("budgets.host_memory", "64MiB"),
        ("cluster.replicas", "2"),
        ("train.checkpoint_items", "4"),
    ):
        words += ["--set", f"{key}={value}"]
    driver = subprocess.Popen(words, start_new_session=True, stderr=subprocess.PIPE)
    wait_for(lambda: list((run / "checkpoints").glob("step-*")) if run.exists() else None)
    children = psutil.Process(driver.pid).children(recursive=True)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert len(children) >= 2
    wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
    result = train(configure(graph, run))  # in this process
    assert outcome(result, run) == alone and result["resumed_from"] > 0
    assert not (run / "local").exists(), "packs of replicas"


def test_what_a_run_lacks_is_told(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^train.accumulate=4 items .* dealt evenly to cluster.replicas=3; [^{]*$"):
        configure(graph, tmp_path / "run", **{"cluster.replicas": 3})
    few = configure(graph, tmp_path / "few", **{"cluster.replicas": 2, "sampler.batch_size": 2000})
    with pytest.raises(ValueError, match="none is left for replica 1 of 2; use fewer replicas"):
        train(few)
    assert not (tmp_path / "few").exists(), "nothing was written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_gpu_that_is_not_there_is_told(graph: Path, tmp_path: Path, replicas: int) -> None:
    config = configure(graph, tmp_path / "run", **{"cluster.replicas": replicas, "train.device": "cuda"})
    with pytest.raises(ValueError, match="device=cuda, but this machine has no CUDA device; set device to cpu"):
        train(config)
