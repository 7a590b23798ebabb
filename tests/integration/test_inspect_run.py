"""What `penstock inspect RUN` says: before, while and after a run trains."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from penstock.config import RunConfig, load_config
from penstock.engine.trainer import Stopped
from penstock.epochs import EpochRecord
from penstock.inspection import describe, run_inspect
from penstock.status import Status
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.training import train


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspected") / "graph"
    config = GenerateConfig(num_nodes=600, num_features=8, train=0.3, valid=0.1, test=0.1)
    generate_graph(out, config, host_memory=64 << 20)
    return out


def configure(graph: Path, run: Path, **given: Any) -> RunConfig:
    flags = {
        "dataset": str(graph),
        "run_dir": str(run),
        "budgets.host_memory": "8MiB",
        "sampler.fanouts": (3, 3),
        "sampler.batch_size": 32,
        "model.hidden": 8,
        "train.epochs": 4,
        "train.threads": 1,
    }
    return load_config(None, (), flags | given)


def said(path: Path, capsys: pytest.CaptureFixture[str], validate: bool = False) -> list[str]:
    run_inspect(path, validate=validate, as_json=False)
    return capsys.readouterr().out.splitlines()


def row(lines: list[str], name: str) -> str:
    (found,) = [line.split(name, 1)[1].strip() for line in lines if line.startswith(f"  {name}  ")]
    return found


def test_a_run_is_read_while_it_runs(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, seen = tmp_path / "run", list[tuple[EpochRecord, dict[str, Any], list[str]]]()

    def look(record: EpochRecord) -> None:
        seen.append((record, describe(run), said(run, capsys)))

    train(configure(graph, run), on_epoch=look)
    assert len(seen) == 4
    for record, value, lines in seen:
        assert value["status"] == "running" and str(os.getpid()) in value["holder"]
        assert [entry["epoch"] for entry in value["epochs"]] == list(range(1, record.epoch + 1))
        assert value["epochs"][-1]["train_loss"] == record.loss
        assert value["now"]["stage"]["total"] > 0 and json.dumps(value)
        assert row(lines, "status").startswith("running: process ")
        assert row(lines, "epochs").startswith(f"{record.epoch} of 4")
        assert row(lines, "best epoch") == str(record.best_epoch)
        assert row(lines, "plan").startswith("reuse, policy belady")
    after = said(run, capsys)
    assert row(after, "status") == "finished" and row(after, "epochs") == "4 of 4"
    names = [line.strip().split("  ")[0] for line in after]
    assert names.index("valid accuracy") < names.index("test accuracy")
    assert not (run / "status.json").exists()


def test_epochs_are_a_table(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(configure(graph, tmp_path / "run"))
    lines = said(tmp_path / "run", capsys)
    at = lines.index("epochs (* is the best)")
    assert lines[at + 1].split() == ["epoch", "loss", "valid", "loss", "valid", "accuracy", "items/s"]
    cells = [line.replace(" *", "").split() for line in lines[at + 2 :]]
    assert [line[:2] for line in cells] == [[str(e["epoch"]), f"{e['train_loss']:.4f}"] for e in result["epochs"]]
    assert [float(line[4].replace(",", "")) for line in cells] == pytest.approx(
        [e["items_per_s"] for e in result["epochs"]], rel=1e-3
    )
    (best,) = [line for line in lines if line.split()[1:2] == ["*"]]
    assert best.split()[0] == str(result["metrics"]["best_epoch"])


def test_only_what_was_read_is_called_validated(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(configure(graph, tmp_path / "run", **{"train.epochs": 1}))
    for path in (graph, tmp_path / "run", tmp_path / "run" / "train" / "packs"):
        assert "validated" not in describe(path) and not [n for n in said(path, capsys) if n.startswith("  validated")]
        assert describe(path, validate=True)["validated"] is True
        assert row(said(path, capsys, validate=True), "validated")


def test_a_run_that_does_not_run_says_why(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, stop = tmp_path / "run", threading.Event()
    with pytest.raises(Stopped):
        train(configure(graph, run), on_epoch=lambda record: stop.set(), stop_requested=stop)
    lines = said(run, capsys)
    assert row(lines, "status").startswith("stopped: stopped at step ") and row(lines, "epochs") == "1 of 4"
    (run / "result.json").unlink()  # as a kill would leave it, its text in the lock and its last status
    (run / ".lock").write_text(json.dumps({"pid": 1, "host": os.uname().nodename, "since": 0}))
    (run / "status.json").write_text("{}")
    lines = said(run, capsys)
    assert row(lines, "status").startswith("cut off") and not [line for line in lines if line.startswith("  now ")]
    for path in (run / "checkpoints").iterdir():
        path.rename(path.with_name(f"not-{path.name}"))
    assert row(said(run, capsys), "status") == "not trained yet"


def test_early_stopping_says_where_and_what_was_best(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"train.epochs": 60, "train.patience": 2, "train.lr": 0.5}
    result = train(configure(graph, tmp_path / "run", **given))
    metrics = result["metrics"]
    assert metrics["stopped_early"]
    lines = said(tmp_path / "run", capsys)
    without = f"{metrics['epochs']} of 60: stopped early, {metrics['epochs'] - metrics['best_epoch']} epochs without"
    assert row(lines, "epochs").startswith(without) and row(lines, "best epoch") == str(metrics["best_epoch"])


def test_a_status_is_there_from_the_beginning_and_goes_with_its_process(tmp_path: Path) -> None:
    def there() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / "status.json").read_text())
        return found

    status = Status(tmp_path)
    assert there()["stage"] is None
    status("sample train", 0, 5, "items")
    assert there()["stage"]["name"] == "sample train"
    status("train", 3, 10, "items", items_per_s=2.5)
    assert (there()["stage"]["done"], there()["stage"]["rate"]) == (3, 2.5)
    status.close()
    assert not list(tmp_path.iterdir())
    gone = Status(tmp_path / "no such folder")  # as on a full disk: nothing to see, and nothing fails
    gone("train", 1, 2, "items")
    gone.close()
