"""Full-graph training from the command line: what it leaves, what it survives, and that movement changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from penstock.config import load_config
from penstock.storage.budget import MIB
from penstock.storage.errors import DoesNotFit
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore
from penstock.training import train

SHAPE = ["--mode", "chunked", "--chunks", "6", "--layers", "3", "--hidden", "16", "--threads", "1", "--quiet"]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "penstock", *map(str, words)]


def penstock(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run(command(*words), capture_output=True, text=True, env=environment, timeout=300, check=False)


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chunked") / "graph"
    config = GenerateConfig(num_nodes=4000, num_features=128, avg_degree=6, train=0.3, valid=0.05, test=0.1)
    generate_graph(out, config, host_memory=64 * MIB)
    return out


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its features take much more than packing them does."""
    out = tmp_path_factory.mktemp("chunked") / "wide"
    config = GenerateConfig(num_nodes=4000, num_features=512, avg_degree=6, train=0.3, valid=0.05, test=0.1)
    generate_graph(out, config, host_memory=64 * MIB)
    return out


@pytest.fixture(scope="module")
def trained(graph: Path) -> Path:
    run = graph.parent / "run"
    words = ["--model", "gcnii", "--stages", "2", "--epochs", "12", "--lr", "0.01", "--set", "model.dropout=0"]
    done = penstock("train", graph, "--run-dir", run, *SHAPE, *words)
    assert done.returncode == 0, done.stderr
    return run


def test_train_leaves_its_files(trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    assert result["status"] == "ok" and result["config"]["mode"] == "chunked"
    losses = result["metrics"]["train_losses"]
    assert len(losses) == 12 and losses[-1] < losses[0]
    for path in result["artefacts"].values():
        assert Path(path).exists()
    assert (trained / "schedule.png").read_bytes().startswith(b"\x89PNG")
    assert [rank["stage"] for rank in result["ranks"]] == [0, 1]
    sent = sum(rank["sent_bytes"] for rank in result["ranks"])
    assert sent == 2 * 2 * 4000 * 16 * 4  # forward and backward, hidden and initial rows, of one boundary
    assert result["schedule"]["stages"] == 2 and result["chunks"]["num_chunks"] == 6
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert all(0 <= line["bubble"] < 1 and line["row_age_max"] == 1 for line in lines)
    assert lines[-1]["history_error_1"] > 0


@pytest.mark.slow
def test_a_second_run_is_done_and_another_configuration_is_refused(graph: Path, trained: Path) -> None:
    before = (trained / "result.json").read_bytes()
    words = ["--model", "gcnii", "--epochs", "12", "--lr", "0.01", "--set", "model.dropout=0"]
    done = penstock("train", graph, "--run-dir", trained, *SHAPE, *words, "--stages", "1")
    assert done.returncode == 0 and (trained / "result.json").read_bytes() == before
    done = penstock("train", graph, "--run-dir", trained, *SHAPE, *words, "--gradient-mode", "drop")
    assert done.returncode == 2 and "chunked.gradient_mode" in done.stderr


@pytest.mark.slow
def test_infer_and_inspect_know_the_run(graph: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    assert penstock("infer", trained, out, "--quiet").returncode == 0
    assert pq.read_metadata(out).num_rows == 4000
    done = penstock("inspect", trained / "chunks" / "6x1", "--validate", "--json")
    assert json.loads(done.stdout)["num_chunks"] == 6
    assert json.loads(penstock("inspect", trained, "--json").stdout)["mode"] == "chunked"


@pytest.mark.slow
def test_plan_compares_splits_and_train_takes_one(graph: Path, tmp_path: Path) -> None:
    words = ["--run-dir", tmp_path / "run", *SHAPE, "--model", "gcnii", "--devices", "2", "--epochs", "1"]
    done = penstock("plan", graph, *words, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {choice["kind"] for choice in found["choices"]} == {"pipeline", "graph"}
    assert all(choice["epoch_s"] > 0 and choice["peak_bytes"] > 0 for choice in found["choices"])
    assert penstock("train", graph, *words).returncode == 0
    chosen = json.loads((tmp_path / "run" / "chunked.json").read_text())
    assert chosen["stages"] * chosen["parts"] == 2


@pytest.mark.slow
def test_a_memory_budget_that_is_too_small_is_exit_code_4_with_the_one_that_does(graph: Path, tmp_path: Path) -> None:
    words = ["--run-dir", tmp_path / "run", *SHAPE, "--model", "gcn", "--epochs", "1", "--set", "chunked.partition=ldg"]
    done = penstock("train", graph, *words, "--host-memory", "4MiB")
    assert done.returncode == 4 and "use --host-memory " in done.stderr
    assert done.stderr.count("is too small") == 1
    enough = done.stderr.split("use --host-memory ")[1].split()[0]
    done = penstock("train", graph, *words, "--host-memory", enough, "--force")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "row_dtype", "replicas"), [("gcn", "int8", 1), ("gcnii", None, 2)])
def test_packs_and_histories_on_disk_give_the_weights_of_memory(
    wide: Path, tmp_path: Path, kind: str, row_dtype: str | None, replicas: int
) -> None:
    """gcn reads features of halos, gcnii of own rows only. Every replica has packs in the order of its own chunks."""
    flags = {
        "dataset": wide,
        "mode": "chunked",
        "chunked.chunks": 40,
        "chunked.partition": "ldg",
        "model.kind": kind,
        "model.hidden": 16,
        "plan.row_dtype": row_dtype,
        "train.epochs": 5,
        "train.threads": 1,
        "cluster.replicas": replicas,
    }
    disk = {
        "run_dir": tmp_path / "disk",
        "budgets.host_memory": 20 * MIB if kind == "gcn" else 17 * MIB,
        "chunked.history_storage": "disk",
    }
    found = train(load_config(flags={**flags, **disk}))
    assert found["schedule"]["features"] == "packs" and found["schedule"]["recompute"]
    assert found["ranks"][0]["history_read_bytes"] > 0
    assert found["schedule"]["replicas"] == replicas
    assert [rank["replica"] for rank in found["ranks"]] == list(range(replicas))
    found = train(load_config(flags={**flags, "run_dir": tmp_path / "memory", "feed": "memory"}))
    assert found["schedule"]["features"] == "memory" and found["ranks"][0]["history_read_bytes"] == 0
    assert weights(tmp_path / "disk") == weights(tmp_path / "memory")


@pytest.mark.slow
def test_memory_in_which_the_features_cannot_be_packed_is_named_with_what_does(graph: Path, tmp_path: Path) -> None:
    flags = {"dataset": graph, "run_dir": tmp_path / "run", "mode": "chunked", "model.kind": "gcn", "model.hidden": 16}
    flags |= {"chunked.chunks": 40, "chunked.partition": "ldg", "plan.row_dtype": "int8", "train.epochs": 1}
    flags |= {"chunked.history_storage": "disk", "evaluate.mode": "none"}
    with pytest.raises(DoesNotFit, match=r"packing needs .*, its share; use --host-memory \d+ or more") as error:
        train(load_config(flags={**flags, "budgets.host_memory": 7 * MIB}))
    assert train(load_config(flags={**flags, "budgets.host_memory": error.value.host_bytes}))["status"] == "ok"


@pytest.mark.parametrize(
    ("flags", "labels", "train_ids", "message"),
    [
        ({"chunked.stages": 4}, [0, 1] * 20, range(40), "stages=4 cannot share 3 units"),
        ({"chunked.chunks": 41}, [0, 1] * 20, range(40), "40 nodes cannot fill 1 parts x 41 chunks; use fewer"),
        ({"chunked.parts": 21}, [0, 1] * 20, range(40), "40 nodes cannot fill 21 parts x 2 chunks; use fewer"),
        ({"chunked.devices": 21}, [0, 1] * 20, range(40), "40 nodes cannot fill 21 parts x 2 chunks; use fewer"),
        ({}, [0, 1] * 20, [], "has no train nodes"),
        ({}, [-1, 1] * 20, range(0, 40, 2), "has no label on any train node"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_graph_is_cut(
    make_graph: Callable[..., GraphStore],
    tmp_path: Path,
    flags: dict[str, Any],
    labels: list[int],
    train_ids: Sequence[int],
    message: str,
) -> None:
    edges = np.random.default_rng(0).integers(0, 40, (120, 2))
    graph = make_graph(40, edges, labels=np.array(labels), train=np.array(train_ids, np.int64))
    needed = {"dataset": graph.path, "run_dir": tmp_path / "run", "mode": "chunked", "model.kind": "gcn"}
    with pytest.raises(ValueError, match=message):
        train(load_config(flags={**needed, "chunked.chunks": 2, **flags}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_kills_and_other_stages_leave_the_same_weights(graph: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    every_epoch = ["--set", "train.checkpoint_items=1", "--epochs", "60", "--model", "sage"]
    assert penstock("train", graph, "--run-dir", straight, *SHAPE, *every_epoch).returncode == 0
    for stages in ("1", "3", "2"):
        words = command("train", graph, "--run-dir", killed, *SHAPE, *every_epoch, "--stages", stages)
        newest = sorted((killed / "checkpoints").glob("step-*"))[-1:]
        with subprocess.Popen(words, start_new_session=True, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 120
            while sorted((killed / "checkpoints").glob("step-*"))[-1:] == newest and process.poll() is None:
                assert time.monotonic() < deadline, "no checkpoint came"
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
    done = penstock("train", graph, "--run-dir", killed, *SHAPE, *every_epoch)
    assert done.returncode == 0, done.stderr
    assert json.loads((killed / "result.json").read_text())["resumed_from"] >= 1
    assert weights(killed) == weights(straight)
    losses = [json.loads((run / "result.json").read_text())["metrics"]["train_losses"] for run in (killed, straight)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_another_number_of_stages_goes_on(graph: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", graph, "--run-dir", run, *SHAPE, "--model", "sage", "--epochs", "40"]
    with subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
            assert time.monotonic() < deadline and process.poll() is None, "no epoch came"
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert json.loads((run / "result.json").read_text())["status"] == "stopped"
    assert list((run / "checkpoints").glob("step-*/state.json"))
    done = penstock(*words, "--parts", "2")
    assert done.returncode == 2 and "chunked.parts (1 there, 2 asked)" in done.stderr, done.stderr
    done = penstock(*words, "--stages", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["resumed_from"] >= 1


@pytest.mark.slow
def test_a_users_deep_model_trains_on_the_whole_graph(graph: Path, tmp_path: Path) -> None:
    examples = str(Path(__file__).parents[2] / "examples")
    words = ["--set", "model.kind=custom", "--set", "model.module=deep_custom_model:DeepNet", "--epochs", "8"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": examples}
    shape = ["--mode", "chunked", "--chunks", "6", "--threads", "1", "--quiet"]
    line = command("train", graph, "--run-dir", tmp_path / "run", *shape, *words, "--stages", "2", "--lr", "0.01")
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    losses = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["train_losses"]
    assert losses[-1] < losses[0]
