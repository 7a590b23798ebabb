"""Trackers with their real libraries, and what becomes of a run when one of them fails."""

import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from event_files import events, scalars

from penstock.config import RunConfig, load_config
from penstock.engine.metrics import MetricsWriter
from penstock.engine.trainer import Stopped
from penstock.storage.errors import MissingDependency
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.tracking import tracker as tracker_module
from penstock.tracking.tracker import Ledger, Status, Tracker, Trackers, open_trackers
from penstock.training import train

CONFIG = {"train.lr": 0.01, "model.kind": "sage", "note": "x" * 9000, "model.kwargs.api_token": "not to be seen"}
RECORDS: list[dict[str, Any]] = [
    {"step": 10, "epoch": 1.0, "loss": 2.0, "lr": 0.1},
    {"step": 10, "epoch": 1, "train_loss": 2.1, "valid_accuracy": 0.5, "text": "x", "flag": True, "none": None},
    {"step": 20, "epoch": 2.0, "loss": 1.0, "lr": 0.1},
    {"step": 30, "epoch": 3.0, "loss": 0.5, "lr": 0.1},
]


class Recorder:
    """A tracker that fails where it is told to."""

    def __init__(self, fails_at: int | None = None, waits_for: threading.Event | None = None) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.kept: list[str] = []
        self.status: Status | None = None
        self._fails_at, self._waits_for = fails_at, waits_for

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._waits_for is not None:
            self._waits_for.wait(30)
        if step == self._fails_at:
            raise ConnectionError("no answer from https://me:secret-word@service/")
        self.seen.append((step, dict(numbers)))

    def artefacts(self, paths: Sequence[Path]) -> None:
        self.kept += [path.name for path in paths]

    def end(self, status: Status) -> None:
        self.status = status


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """The recorder stands where a library's tracker would."""
    found = Recorder(fails_at=20)
    put_in_place(monkeypatch, found)
    yield found


def put_in_place(monkeypatch: pytest.MonkeyPatch, found: Tracker) -> None:
    monkeypatch.setattr(tracker_module, "_find_opener", lambda name: lambda run_dir, config: found)


def write_all(trackers: Trackers, path: Path, records: Sequence[dict[str, Any]]) -> None:
    with MetricsWriter(path, listeners=(trackers.observe,)) as writer:
        for record in records:
            writer.write(record)


def test_records_arrive_in_order_and_a_failure_costs_its_record_only(
    recorder: Recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "result.json").write_text("{}")
    with caplog.at_level(logging.WARNING), open_trackers(("wandb",), tmp_path, CONFIG) as trackers:
        write_all(trackers, tmp_path / "metrics.jsonl", RECORDS)
        trackers.artefacts([tmp_path / "result.json", tmp_path / "missing"])
    assert [step for step, _ in recorder.seen] == [10, 10, 30]
    assert recorder.seen[1] == (10, {"epoch": 1.0, "train_loss": 2.1, "valid_accuracy": 0.5})
    assert recorder.kept == ["result.json"] and recorder.status == "ok"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(RECORDS)
    first, last = caplog.messages
    assert "ConnectionError" in first and "secret-word" not in first and "training goes on" in first
    assert "lost 1 records" in last


@pytest.mark.parametrize(("error", "status"), [(Stopped("later"), "stopped"), (ValueError("bad"), "failed")])
def test_trackers_learn_how_a_run_ended(recorder: Recorder, tmp_path: Path, error: Exception, status: str) -> None:
    with pytest.raises(type(error)), open_trackers(("mlflow",), tmp_path, CONFIG):
        raise error
    assert recorder.status == status


def test_a_service_that_hangs_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()
    put_in_place(monkeypatch, Recorder(waits_for=answers))
    monkeypatch.setattr(tracker_module, "_QUEUED", 3)
    monkeypatch.setattr(tracker_module, "_GRACE_S", 0.2)
    with caplog.at_level(logging.WARNING), open_trackers(("mlflow",), tmp_path, {}) as trackers:
        for step in range(20):
            trackers.observe({"step": step, "loss": 1.0})
    answers.set()
    assert "more than 3 records behind" in caplog.messages[0] and "mlflow lost" in caplog.messages[-1]


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(tracker_module._MODULES, "wandb", "no_such_library")
    with (
        pytest.raises(MissingDependency, match=r"pip install 'wandb>=0.17'"),
        open_trackers(("wandb",), tmp_path, {}),
    ):
        pass


def test_a_ledger_knows_what_was_sent(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "tracking" / "x.json")
    assert ledger.run_id is None and ledger.fresh(0, {"loss": 1.0}) == {"loss": 1.0}
    ledger.note("run", 10, {"loss": 1.0})
    again = Ledger(tmp_path / "tracking" / "x.json")
    assert again.run_id == "run"
    assert again.fresh(10, {"loss": 1.0, "train_loss": 2.0}) == {"train_loss": 2.0}
    assert again.fresh(11, {"loss": 1.0}) == {"loss": 1.0}
    other = Ledger(tmp_path / "tracking" / "x.json", "other")
    assert other.run_id == "other" and other.fresh(10, {"loss": 1.0}) == {"loss": 1.0}


def test_tensorboard_shows_every_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed: pip install tensorboardX")
    with open_trackers(("tensorboard",), tmp_path, CONFIG) as trackers:
        write_all(trackers, tmp_path / "metrics.jsonl", RECORDS)
    again = [{"step": 20, "epoch": 2.0, "loss": 1.25, "lr": 0.1}, {"step": 40, "epoch": 4.0, "loss": 0.25, "lr": 0.1}]
    with open_trackers(("tensorboard",), tmp_path, CONFIG) as trackers:  # it went on from a checkpoint at step 15
        write_all(trackers, tmp_path / "metrics.jsonl", again)
    found = events(tmp_path / "tensorboard")
    shown = scalars(found)
    assert shown["loss"] == [(10, 2.0), (20, 1.25), (40, 0.25)]
    assert shown["train_loss"] == [(10, 2.1)] and shown["valid_accuracy"] == [(10, 0.5)]
    text = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"model.kind: sage" in text and b"not to be seen" not in text


def test_tensorboard_falls_back_within_a_process(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed: pip install tensorboardX")
    with open_trackers(("tensorboard",), tmp_path, {}) as trackers:
        write_all(trackers, tmp_path / "a.jsonl", [{"step": step, "loss": float(step)} for step in (1, 2, 3)])
        write_all(trackers, tmp_path / "b.jsonl", [{"step": step, "loss": step + 0.5} for step in (2, 3, 4)])
    assert scalars(events(tmp_path / "tensorboard"))["loss"] == [(1, 1.0), (2, 2.5), (3, 3.5), (4, 4.5)]


def test_a_run_and_its_continuation_are_on_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed: pip install tensorboardX")
    graph, run = tmp_path / "graph", tmp_path / "run"
    generate_graph(graph, GenerateConfig(num_nodes=600, num_features=8, train=0.3, valid=0.1), host_memory=64 << 20)
    flags = {
        "dataset": str(graph),
        "run_dir": str(run),
        "feed": "memory",
        "sampler.fanouts": (3, 3),
        "sampler.batch_size": 32,
        "model.hidden": 8,
        "train.epochs": 6,
        "train.threads": 1,
        "train.log_every": 2,
        "train.checkpoint_items": 7,
        "track.trackers": ("tensorboard",),
    }
    config, stop = load_config(None, (), flags), threading.Event()

    def stop_in_the_middle(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train" and done >= 20:
            stop.set()

    with pytest.raises(Stopped):
        train(config, progress=stop_in_the_middle, stop_requested=stop)
    train(config)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shown = scalars(events(run / "tensorboard"))
    assert len(list((run / "tensorboard").iterdir())) == 2
    for name in ("loss", "train_loss", "valid_accuracy"):
        wanted = [(line["step"], line[name]) for line in lines if name in line]
        assert [step for step, _ in shown[name]] == [step for step, _ in wanted]
        assert [value for _, value in shown[name]] == pytest.approx([value for _, value in wanted], rel=1e-5)


def small_run(tmp_path: Path, **given: Any) -> RunConfig:
    generate_graph(
        tmp_path / "graph",
        GenerateConfig(num_nodes=600, num_features=8, train=0.3, valid=0.1, test=0.1),
        host_memory=64 << 20,
    )
    flags = {
        "dataset": str(tmp_path / "graph"),
        "run_dir": str(tmp_path / "run"),
        "model.hidden": 8,
        "train.epochs": 2,
        "train.threads": 1,
        "track.trackers": ("tensorboard",),
    }
    return load_config(None, (), flags | given)


SAMPLED = {"budgets.host_memory": "8MiB", "sampler.fanouts": (3, 3), "sampler.batch_size": 32}
CHUNKED = {"mode": "chunked", "chunked.chunks": 4, "chunked.stages": 2, "model.num_layers": 3}


@pytest.mark.parametrize(
    "given", [pytest.param(SAMPLED, id="sampled"), pytest.param(CHUNKED, id="chunked", marks=pytest.mark.slow)]
)
def test_trackers_get_what_a_run_came_to(given: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed: pip install tensorboardX")
    result = train(small_run(tmp_path, **given))
    shown = {tag: points[-1][1] for tag, points in scalars(events(tmp_path / "run" / "tensorboard")).items()}
    wanted = {
        **{key: result["metrics"][key] for key in ("test_accuracy", "valid_accuracy", "best_epoch")},
        **result["throughput"],
        **result["timings"],
        **result["stalls"],
        **{f"hit_rate_{tier}": share for tier, share in result.get("hit_rates", {}).items()},
    }
    found = {key: shown[f"result/{key}"] for key in wanted}
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert "result/test_accuracy" in shown and ("result/hit_rate_host" in shown) == (given is SAMPLED)


@pytest.mark.parametrize(
    "given", [pytest.param(SAMPLED, id="sampled"), pytest.param(CHUNKED, id="chunked", marks=pytest.mark.slow)]
)
def test_trackers_get_the_model_the_pictures_and_the_keys_that_are_read(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, configs = Recorder(), list[Mapping[str, Any]]()

    def open_it(run_dir: Path, config: Mapping[str, Any]) -> Tracker:
        configs.append(config)
        return found

    monkeypatch.setattr(tracker_module, "_find_opener", lambda name: open_it)
    train(small_run(tmp_path, **given))
    pictures = {"curves.png", "report.html"} | ({"schedule.png"} if given is CHUNKED else set())
    files = {"config.yaml", "result.json", "metrics.jsonl", "model.json", "model.safetensors"}
    assert set(found.kept) == files | pictures and found.status == "ok"
    (config,) = configs
    assert {"train.lr", "model.hidden", "dataset"} <= set(config)
    other = "chunked." if given is SAMPLED else "sampler."
    assert not [key for key in config if key.startswith(other)] and "train.momentum" not in config


def test_mlflow_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    if int(mlflow.__version__.split(".")[0]) < 3:
        pytest.skip("this MLflow takes folders as they are")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    with caplog.at_level(logging.WARNING, "penstock"), open_trackers(("mlflow",), tmp_path, {}) as trackers:
        trackers.observe({"step": 1, "loss": 1.0})
    assert "MLFLOW_ALLOW_FILE_STORE=true is set; set it, or set MLFLOW_TRACKING_URI" in caplog.messages[0]
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the remedy
    with open_trackers(("mlflow",), tmp_path, {}) as trackers:
        trackers.observe({"step": 1, "loss": 1.0})
    assert json.loads((tmp_path / "tracking" / "mlflow.json").read_text())["last"] == {"loss": 1}


def test_mlflow_gets_every_step_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow's own server is not in mlflow-skinny
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "trials")
    run = tmp_path / "run-1"
    run.mkdir()
    (run / "config.yaml").write_text("mode: sampled\n")
    config = {**CONFIG, **{f"many.{n}": n for n in range(150)}}
    with pytest.raises(Stopped), open_trackers(("mlflow",), run, config) as trackers:
        write_all(trackers, run / "metrics.jsonl", RECORDS[:3])
        raise Stopped("later")
    run_id = json.loads((run / "tracking" / "mlflow.json").read_text())["run_id"]
    client = mlflow.MlflowClient()
    assert client.get_run(run_id).info.status == "KILLED"
    with open_trackers(("mlflow",), run, {**config, "train.lr": 0.02}) as trackers:
        write_all(trackers, run / "metrics.jsonl", RECORDS)
        (run / "model").mkdir()
        (run / "model" / "model.json").write_text("{}")
        trackers.artefacts([run / "config.yaml", run / "model" / "model.json"])
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED" and found.info.run_name == "run-1"
    assert client.get_experiment(found.info.experiment_id).name == "trials"
    history = [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "loss")]
    assert history == [(10, 2.0), (20, 1.0), (30, 0.5)]
    assert len(found.data.params) == len(config) and found.data.params["train.lr"] == "0.01"
    assert found.data.params["model.kwargs.api_token"] == "***"
    assert [file.path for file in client.list_artifacts(run_id)] == ["config.yaml", "model"]
    assert [file.path for file in client.list_artifacts(run_id, "model")] == ["model/model.json"]

    given = client.create_run(found.info.experiment_id).info.run_id  # as a platform's step would
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    with open_trackers(("mlflow",), run, config) as trackers:
        write_all(trackers, run / "metrics.jsonl", RECORDS)
    assert [metric.step for metric in client.get_metric_history(given, "loss")] == [10, 20, 30]
    assert client.get_run(given).info.status == "RUNNING"


def test_wandb_keeps_an_offline_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with open_trackers(("wandb",), tmp_path, CONFIG) as trackers:
        write_all(trackers, tmp_path / "metrics.jsonl", RECORDS)
    state = json.loads((tmp_path / "tracking" / "wandb.json").read_text())
    assert state["last"]["loss"] == 30 and state["last"]["train_loss"] == 10
    (stored,) = (tmp_path / "wandb").glob(f"offline-run-*-{state['run_id']}")
    assert list(stored.glob("*.wandb")) and wandb.run is None
