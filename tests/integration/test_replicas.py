"""Replicas in processes of this machine: the weights of one, whatever their number, and whoever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock.config import RunConfig, load_config
from penstock.engine.trainstate import Stopped
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.training import train


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replicas") / "graph"
    config = GenerateConfig(num_nodes=6000, num_features=24, avg_degree=8, train=0.2, valid=0.05, test=0.05)
    generate_graph(out, config, host_memory=32 << 20)
    return out


def configure(graph: Path, run: Path, **options: Any) -> RunConfig:
    """19 items per epoch, four per optimizer step: the last step of an epoch has three."""
    flags = {
        "dataset": str(graph),
        "run_dir": str(run),
        "sampler.fanouts": (4, 4),
        "sampler.batch_size": 64,
        "model.hidden": 16,
        "model.norm": "batch",
        "train.accumulate": 4,
        "train.epochs": 3,
        "train.threads": 1,
        "budgets.host_memory": "64MiB",
        **options,
    }
    return load_config(flags=flags)


@pytest.fixture(scope="module")
def alone(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process without replicas comes to."""
    run = tmp_path_factory.mktemp("alone") / "run"
    result = train(configure(graph, run))
    return {"metrics": result["metrics"], "weights": (run / "model" / "model.safetensors").read_bytes()}


def same(result: dict[str, Any], run: Path, alone: dict[str, Any]) -> None:
    assert result["metrics"]["train_losses"] == alone["metrics"]["train_losses"]
    assert (run / "model" / "model.safetensors").read_bytes() == alone["weights"]
    for name in ("valid_accuracy", "test_accuracy", "test_macro_f1", "best_epoch", "steps"):
        assert result["metrics"][name] == alone["metrics"][name]


@pytest.mark.parametrize(
    "options",
    [
        {"cluster.replicas": 2},
        {"cluster.replicas": 2, "plan.mode": "rolling", "evaluate.mode": "exact"},
        {"cluster.replicas": 2, "feed": "memory", "sampled_epochs": 2},
    ],
    ids=["packs", "rolling", "memory"],
)
def test_replicas_end_with_the_weights_of_one(
    graph: Path, tmp_path: Path, alone: dict[str, Any], options: dict[str, Any]
) -> None:
    if options.get("plan.mode") == "rolling":  # every epoch is sampled anew
        alone_run = tmp_path / "alone"
        result = train(configure(graph, alone_run, sampled_epochs=3, **{"evaluate.mode": "exact"}))
        alone = {"metrics": result["metrics"], "weights": (alone_run / "model" / "model.safetensors").read_bytes()}
    result = train(configure(graph, tmp_path / "run", **options))
    same(result, tmp_path / "run", alone)
    ranks, count = result["ranks"], options["cluster.replicas"]
    assert [rank["rank"] for rank in ranks] == list(range(count))
    assert sum(rank["items"] for rank in ranks) == 3 * 19 and all(rank["bytes_sent"] > 0 for rank in ranks)
    assert not list(psutil.Process().children())


def test_a_stopped_run_goes_on_with_another_number_of_replicas(
    graph: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    run, stop = tmp_path / "run", threading.Event()

    def show(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train" and done >= 20:
            stop.set()

    config = {"train.log_every": 4}
    with pytest.raises(Stopped, match="stopped at step"):
        train(configure(graph, run, **config, **{"cluster.replicas": 2}), progress=show, stop_requested=stop)
    position = json.loads(next((run / "checkpoints").glob("step-*/state.json")).read_text())["state"]["position"]
    assert 20 <= position["step"] < 57
    same(train(configure(graph, run, **config)), run, alone)  # in this process
    with pytest.raises(ValueError, match=r"train.accumulate \(4 there, 8 asked\)|other values of train.accumulate"):
        train(configure(graph, run, **{"cluster.replicas": 2, "train.accumulate": 8}))


def wait_for(found: Callable[[], Any]) -> Any:
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        value = found()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError("it did not come within 60 s")


def test_a_killed_replica_is_replaced(graph: Path, tmp_path: Path, alone: dict[str, Any]) -> None:
    run, killed = tmp_path / "run", list[int]()

    def show(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train" and done >= 20 and not killed:
            victim = psutil.Process().children()[-1]
            victim.kill()
            killed.append(victim.pid)

    options = {"cluster.replicas": 2, "train.log_every": 4, "train.checkpoint_items": 8}
    result = train(configure(graph, run, **options), progress=show)
    assert killed and result["restarts"] == 1
    same(result, run, alone)
    assert not list(psutil.Process().children())


def test_a_killed_driver_leaves_no_replica_and_is_resumed(graph: Path, tmp_path: Path, alone: dict[str, Any]) -> None:
    run = tmp_path / "run"
    config = configure(graph, run, **{"cluster.replicas": 2, "train.checkpoint_items": 4})
    words = [sys.executable, "-P", "-m", "penstock", "train", str(graph), "--run-dir", str(run), "--quiet"]
    for key, value in (
        ("sampler.fanouts", "[4,4]"),
        ("sampler.batch_size", "64"),
        ("model.hidden", "16"),
        ("model.norm", "batch"),
        ("train.accumulate", "4"),
        ("train.epochs", "3"),
        ("train.threads", "1"),
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
    same(train(config), run, alone)


def test_what_a_run_lacks_is_told(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be dealt evenly to cluster.replicas=3"):
        configure(graph, tmp_path / "run", **{"cluster.replicas": 3})
    few = configure(graph, tmp_path / "few", **{"cluster.replicas": 2, "sampler.batch_size": 2000})
    with pytest.raises(ValueError, match="none is left for replica 1 of 2; use fewer replicas"):
        train(few)
    assert json.loads((tmp_path / "few" / "result.json").read_text())["status"] == "failed"
    shutil.rmtree(tmp_path / "few")
