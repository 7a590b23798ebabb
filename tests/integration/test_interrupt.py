"""What is left of a run that was interrupted or killed in its first seconds: it goes on, to the same weights."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import penstock

FLAGS: dict[str, Any] = {
    "budgets.host_memory": "256MiB",
    "model.hidden": 8,
    "train.epochs": 4,
    "train.threads": 1,
}
SAMPLED = {"sampler.batch_size": 32, "sampler.fanouts": (4, 4)}
MODES = {
    "packs": SAMPLED,
    "memory": {**SAMPLED, "feed": "memory"},
    "chunked": {"mode": "chunked", "chunked.chunks": 4, "model.num_layers": 2, "model.dropout": 0},
    "rolling": {**SAMPLED, "plan.mode": "rolling"},
    "replicas": {**SAMPLED, "cluster.replicas": 2},
    "ranks": {
        **{"mode": "chunked", "chunked.chunks": 4, "chunked.stages": 2, "chunked.backend": "processes"},
        **{"model.num_layers": 2, "model.dropout": 0},
    },
}
ALL_MODES = [pytest.param(name, marks=() if name == "packs" else pytest.mark.slow) for name in MODES]
KILLED = """
import json, os, signal, sys
import penstock

def kill(record):
    if record.epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)

penstock.train(penstock.load_config(flags=json.loads(sys.argv[1])), on_epoch=kill)
"""

SLOWED = """
import json, os, pathlib, signal, sys, time
import penstock

given = json.loads(sys.argv[1])

def slow(stage, done, total, unit, /, **numbers):
    if stage == "train":
        time.sleep(0.5)
        if list(pathlib.Path(given["run_dir"], "checkpoints").glob("step-*")):
            os.kill(os.getpid(), signal.SIGKILL)

penstock.train(penstock.load_config(flags=given), progress=slow)
"""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interrupt") / "graph"
    config = penstock.GenerateConfig(num_nodes=600, num_features=8, num_classes=3, avg_degree=5, train=0.4, valid=0.3)
    penstock.generate_graph(path, config, host_memory=64 << 20)
    return path


def flags(graph: Path, run: Path, mode: str, **options: Any) -> dict[str, Any]:
    return {**FLAGS, **MODES[mode], "dataset": str(graph), "run_dir": str(run), **options}


def config(graph: Path, run: Path, mode: str, **options: Any) -> penstock.RunConfig:
    return penstock.load_config(flags=flags(graph, run, mode, **options))


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def interrupt(record: penstock.EpochRecord) -> None:
    if record.epoch == 2:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_an_interrupt_leaves_a_checkpoint_and_says_stopped(graph: Path, tmp_path: Path, mode: str) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match="with a checkpoint in"):
        penstock.train(config(graph, run, mode), on_epoch=interrupt)
    left = json.loads((run / "result.json").read_text())
    assert (left["status"], left["error"]["type"]) == ("stopped", "Stopped")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    result = penstock.train(config(graph, run, mode))
    assert result["status"] == "ok" and result["resumed_from"] > 0
    penstock.train(config(graph, tmp_path / "whole", mode))
    assert weights(run) == weights(tmp_path / "whole")


@pytest.mark.slow
def test_a_second_interrupt_ends_it_at_once(graph: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def twice(record: penstock.EpochRecord) -> None:
        interrupt(record)
        interrupt(record)

    with pytest.raises(KeyboardInterrupt):
        penstock.train(config(graph, run, "packs"), on_epoch=twice)
    left = json.loads((run / "result.json").read_text())
    assert (left["status"], left["error"]["type"]) == ("stopped", "KeyboardInterrupt")
    result = penstock.train(config(graph, run, "packs"))
    assert result["status"] == "ok" and result["resumed_from"] > 0


@pytest.mark.slow
def test_a_programs_own_handler_stays_and_its_interrupt_says_stopped(graph: Path, tmp_path: Path) -> None:
    run, handled = tmp_path / "run", list[int]()

    def handle(number: int, frame: object) -> None:
        handled.append(number)
        raise KeyboardInterrupt("of the program")

    before = signal.signal(signal.SIGINT, handle)
    try:
        with pytest.raises(KeyboardInterrupt, match="of the program"):
            penstock.train(config(graph, run, "packs"), on_epoch=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert handled == [signal.SIGINT]
    assert json.loads((run / "result.json").read_text())["status"] == "stopped"
    assert penstock.train(config(graph, run, "packs"))["resumed_from"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_killed_in_its_second_epoch_goes_on_from_the_first(
    graph: Path, tmp_path: Path, mode: str
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, json.dumps(flags(graph, run, mode))]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    result = penstock.train(config(graph, run, mode))
    assert result["status"] == "ok" and result["resumed_from"] > 0
    penstock.train(config(graph, tmp_path / "whole", mode))
    assert weights(run) == weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["packs", "memory"])
def test_the_first_checkpoint_does_not_wait_for_the_end_of_an_epoch(graph: Path, tmp_path: Path, mode: str) -> None:
    """An epoch of 240 items, ten of which take half a second: the process is killed at its first checkpoint."""
    run = tmp_path / "run"
    options = {"sampler.batch_size": 1, "train.epochs": 1}
    ended = subprocess.run(
        [sys.executable, "-c", SLOWED, json.dumps(flags(graph, run, mode, **options))], capture_output=True, text=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    result = penstock.train(config(graph, run, mode, **options))
    assert 0 < result["resumed_from"] < 200
    penstock.train(config(graph, tmp_path / "whole", mode, **options))
    assert weights(run) == weights(tmp_path / "whole")
