import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from penstock.__main__ import main
from penstock.config import RunConfig, load_config
from penstock.engine.trainstate import Stopped
from penstock.locations import local_output, upload_store
from penstock.run import open_run
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import open_graph
from penstock.storage.remote.lock import LOCK
from penstock.training import train

SETTINGS: dict[str, Any] = {
    "sampler.fanouts": (3, 3),
    "sampler.batch_size": 64,
    "model.hidden": 8,
    "train.epochs": 3,
    "train.checkpoint_items": 5,
    "train.threads": 1,
    "budgets.host_memory": "64MiB",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph store at a URI: somewhere else, and only to be read."""
    out = tmp_path_factory.mktemp("bucket") / "graph"
    config = GenerateConfig(num_nodes=3000, num_features=16, avg_degree=4, train=0.3, valid=0.05, test=0.05)
    return generate_graph(out, config, host_memory=32 << 20).path


@pytest.fixture(scope="module")
def straight(store: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Weights of the run on local disk that nothing happens to."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(load_config(flags={"dataset": str(store), "run_dir": str(run), **SETTINGS}))
    return (run / "model" / "model.safetensors").read_bytes()


def on_host(name: str, store: Path, tmp_path: Path, **more: Any) -> RunConfig:
    """The configuration of a run at a URI, on a host with a disk of its own."""
    places = {"dataset": store.as_uri(), "run_dir": (tmp_path / "bucket" / "run").as_uri()}
    return load_config(flags={**places, "remote.stage_dir": str(tmp_path / name), **SETTINGS, **more})


def weights_there(tmp_path: Path) -> bytes:
    return (tmp_path / "bucket" / "run" / "model" / "model.safetensors").read_bytes()


def stop_at(step: int) -> tuple[threading.Event, Any]:
    """An event, and a progress that sets it at a step of training."""
    stop = threading.Event()

    def progress(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train" and done >= step:
            stop.set()

    return stop, progress


def test_everything_may_be_at_uris(
    store: Path, straight: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket, host = tmp_path / "bucket", ("--stage-dir", str(tmp_path / "host"))
    config = on_host("host", store, tmp_path)
    copy = (bucket / "results" / "one.json").as_uri()
    assert train(config, result_json=copy)["status"] == "ok"
    assert weights_there(tmp_path) == straight
    run = bucket / "run"
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "machine.json", "metrics.jsonl", "result.json", "curves.png", "model", "checkpoints"),
        "report.html",
    }
    assert json.loads((bucket / "results" / "one.json").read_bytes()) == json.loads((run / "result.json").read_bytes())
    assert train(on_host("another", store, tmp_path))["finished_at"], "done already"

    out = bucket / "out" / "nodes.parquet"
    with pytest.raises(SystemExit) as ended:
        main(["infer", run.as_uri(), out.as_uri(), "--split", "test", "--quiet", *host])
    assert ended.value.code == 0
    assert pq.read_table(out).num_rows == len(open_graph(store).split_ids("test"))
    capsys.readouterr()
    for uri in (store.as_uri(), run.as_uri()):
        with pytest.raises(SystemExit) as ended:
            main(["inspect", uri, "--json", *host])
        assert ended.value.code == 0
    graph, found = map(json.loads, capsys.readouterr().out.splitlines())
    assert graph["kind"] == "graph store" and graph["num_nodes"] == 3000
    assert (found["kind"], found["status"]) == ("run", "ok") and found["checkpoints"]


def test_a_stopped_run_goes_on_with_the_same_weights_on_another_host(
    store: Path, straight: bytes, tmp_path: Path
) -> None:
    stop, progress = stop_at(17)
    with pytest.raises(Stopped):
        train(on_host("first", store, tmp_path), progress=progress, stop_requested=stop)
    result = json.loads((tmp_path / "bucket" / "run" / "result.json").read_bytes())
    assert result["status"] == "stopped"
    assert not (tmp_path / "bucket" / "run" / LOCK).exists()
    shutil.rmtree(tmp_path / "first")
    assert train(on_host("second", store, tmp_path))["resumed_from"] >= 17
    assert weights_there(tmp_path) == straight


# Trains to a step past the first checkpoints, and waits there to be killed.
DRIVER = """
import json, sys, time
from penstock.config import load_config
from penstock.training import train
def progress(stage, done, total, unit, /, **numbers):
    if stage == "train" and done >= 12:
        time.sleep(60)
train(load_config(flags=json.loads(sys.argv[1])), progress=progress)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_weights_on_another_host(
    store: Path, straight: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "bucket" / "run"
    places = {"dataset": store.as_uri(), "run_dir": run.as_uri(), "remote.stage_dir": str(tmp_path / "first")}
    words = [sys.executable, "-c", DRIVER, json.dumps({**places, **SETTINGS})]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(run.glob("checkpoints/step-*/state.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    resumed = train(on_host("second", store, tmp_path))["resumed_from"]
    assert resumed is not None and resumed > 0
    assert weights_there(tmp_path) == straight


def test_two_runs_at_one_uri_are_refused_and_so_are_two_in_one_folder(store: Path, tmp_path: Path) -> None:
    with open_run(on_host("first", store, tmp_path)):
        with pytest.raises(ValueError, match=r"in use by process \d+ on host .* since \d+ seconds \(.* UTC\); wait"):
            train(on_host("first", store, tmp_path))
        lock = tmp_path / "bucket" / "run" / LOCK
        value = json.loads(lock.read_bytes())
        done = threading.Event()

        def refresh() -> None:  # as the holder does, but every 50 ms, so that the test need not wait for it
            while not done.wait(0.05):
                temporary = lock.with_name(".refreshed")
                temporary.write_text(json.dumps({**value, "refreshed": time.time()}))
                temporary.replace(lock)

        thread = threading.Thread(target=refresh)
        thread.start()
        try:
            with pytest.raises(ValueError, match=r"run is in use by run \w+ of .* \(process .*--run-dir"):
                train(on_host("second", store, tmp_path))
        finally:
            done.set()
            thread.join()


def test_a_run_whose_lock_is_taken_over_stops_and_writes_no_more(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "bucket" / "run"

    def progress(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train" and not (run / "thief").exists():
            (run / LOCK).write_text('{"token": "other", "owner": "thief", "pid": 1, "host": "far"}')
            (run / "thief").touch()

    with pytest.raises(ValueError, match="taken over by thief"):
        train(on_host("host", store, tmp_path), progress=progress)
    assert not (run / "result.json").exists() and not (run / "model").exists()


def test_the_result_of_a_failed_run_is_at_its_uri(store: Path, tmp_path: Path) -> None:
    def progress(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train":
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        train(on_host("host", store, tmp_path), progress=progress)
    result = json.loads((tmp_path / "bucket" / "run" / "result.json").read_bytes())
    assert result["status"] == "failed" and result["error"]["message"] == "on purpose"


def test_a_uri_of_another_configuration_is_refused_unless_forced(store: Path, tmp_path: Path) -> None:
    train(on_host("first", store, tmp_path))
    other = on_host("second", store, tmp_path, **{"train.lr": 0.5})
    with pytest.raises(ValueError, match=r"bucket/run was trained with other values of train\.lr"):
        train(other)
    assert "already_done" not in train(other, force=True)
    with pytest.raises(ValueError, match=r"train\.lr"):
        train(on_host("third", store, tmp_path))
    assert train(on_host("fourth", store, tmp_path, **{"train.lr": 0.5}))["already_done"]


def test_a_run_at_a_uri_goes_on_for_more_epochs_on_another_host(store: Path, tmp_path: Path) -> None:
    train(on_host("first", store, tmp_path))
    more = {"train.epochs": on_host("first", store, tmp_path).train.epochs + 2}

    def progress(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train":
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        train(on_host("second", store, tmp_path, **more), progress=progress)
    assert json.loads((tmp_path / "bucket" / "run" / "result.json").read_bytes())["status"] == "failed"
    assert train(on_host("third", store, tmp_path, **more))["resumed_from"] > 0


def test_credentials_in_a_uri_are_refused_before_anything_is_written(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a secret under dataset") as raised:
        load_config(flags={"dataset": "s3://KEY:hunter2@bucket/graph", "run_dir": str(tmp_path / "run")})
    assert "hunter2" not in str(raised.value) and not (tmp_path / "run").exists()


def test_a_store_is_uploaded_with_its_manifest_last(store: Path, tmp_path: Path) -> None:
    there = tmp_path / "bucket" / "copy"
    seen: list[bool] = []
    upload_store(store, there.as_uri(), progress=lambda *_, **__: seen.append((there / "manifest.json").exists()))
    assert seen[-1] and not any(seen[:-1])
    open_graph(there).validate()
    upload_store(store, there.as_uri(), progress=lambda *_, **__: pytest.fail("uploaded again"))
    other = generate_graph(tmp_path / "other", GenerateConfig(num_nodes=500, num_features=8), host_memory=32 << 20)
    with pytest.raises(ValueError, match="holds another store"):
        upload_store(other.path, there.as_uri())


@pytest.mark.parametrize("name", ["", ".."])
def test_a_folder_is_no_file_to_write(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="write the URI of a file"), local_output(f"{tmp_path.as_uri()}/out/{name}"):
        pytest.fail("it was opened")


def test_a_store_is_ingested_to_a_uri(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "bucket" / "graph"
    source.mkdir()
    np.save(source / "features.npy", np.ones((4, 2), np.float32))
    np.save(source / "labels.npy", np.array([0, 1, 0, 1]))
    np.save(source / "edge_index.npy", np.array([[0, 1, 2], [1, 2, 3]]))
    np.save(source / "train_ids.npy", np.array([0, 1]))
    with pytest.raises(SystemExit) as ended:
        main(["ingest", str(source), out.as_uri(), "--stage-dir", str(tmp_path / "host"), "--quiet"])
    assert ended.value.code == 0
    graph = open_graph(out)
    graph.validate()
    assert (graph.num_nodes, graph.num_edges) == (4, 3)


def test_a_folder_left_by_a_killed_process_of_another_host_is_opened_with_a_warning(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(flags={"dataset": str(store), "run_dir": str(tmp_path / "run"), **SETTINGS})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text(json.dumps({"pid": 3, "host": "elsewhere", "since": time.time() - 720}))
    with open_run(config):
        assert "in use by process 3 on host elsewhere since 12 minutes" in caplog.text
    assert (tmp_path / "run" / ".lock").read_text() == ""
