"""What a person in Python meets: text for paths and sizes, things that say what they are, progress where one looks."""

import inspect
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import penstock

FLAGS: dict[str, Any] = {
    "dataset": "small.graph",
    "run_dir": "run",
    "budgets.host_memory": "64MiB",
    "budgets.disk": "1GiB",
    "sampler.batch_size": 50,
    "sampler.fanouts": (3, 3),
    "train.epochs": 2,
    "train.threads": 1,
}
TERMINAL = """
import sys, penstock
config = penstock.load_config(flags={"dataset": sys.argv[1], "run_dir": sys.argv[2], "train.epochs": 1})
penstock.train(config, on_epoch=lambda record: print("told", record.epoch))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("python")
    config = penstock.GenerateConfig(num_nodes=500, num_features=8, num_classes=3, train=0.4, valid=0.2, test=0.2)
    penstock.generate_graph(str(path / "small.graph"), config, host_memory="64MiB")
    return path


def test_paths_and_sizes_are_text_and_things_say_what_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    graph = penstock.open_graph("small.graph")
    assert repr(graph).startswith("GraphStore('small.graph': 500 nodes, ")
    assert all(f"{split} {graph.num_seeds(split)}" in repr(graph) for split in ("train", "valid", "test"))
    result = penstock.train(penstock.load_config(flags=FLAGS), result_json="copy.json")
    assert capfd.readouterr() == ("", "")  # nobody watches: this is no terminal
    accuracy = result["metrics"]["test_accuracy"]
    assert repr(result).startswith("run run: ok\n") and f"test accuracy   {accuracy:.4f}" in repr(result)
    assert isinstance(result, dict) and (folder / "copy.json").is_file()
    assert "test accuracy" in repr(penstock.train(penstock.load_config(flags=FLAGS), progress=False))
    for place in ("run", "run/model"):
        assert penstock.load_model(place).num_classes == 3
    assert penstock.infer("run", "out.parquet", host_memory="64MiB")["rows"] == 500
    sampling = penstock.SampleConfig(fanouts=(3, 3), batch_size=50)
    trace = penstock.sample_trace(graph, "trace", sampling, host_memory="64MiB")
    items = trace.meta.num_items
    assert repr(trace) == f"Trace('trace': 1 epochs of {items} items of train, fanouts [3, 3], uniform, seed 0)"
    budgets = penstock.Budgets(device_bytes=0, host_bytes=64 << 20, disk_bytes=1 << 30)
    plan = penstock.plan_packs(graph, penstock.open_trace("trace"), penstock.PlanConfig(), budgets, scratch="scratch")
    assert repr(plan).startswith(f"Plan(reuse, belady: {items} items in 1 windows, 0 device and ")
    meta = penstock.write_packs(plan, graph, trace, "packs", host_memory="64MiB")
    with (
        penstock.open_pack_feed("packs", graph, stop_step=meta.num_items, host_memory="64MiB") as feed,
        penstock.open_memory_feed(graph, trace) as same,
    ):
        batch = next(feed)
        assert repr(batch).startswith("MiniBatch(step 0: 50 seeds, features ") and "50 destinations" in repr(batch)
        assert len(same) == items and next(same).input_ids.equal(batch.input_ids)


def test_progress_is_shown_where_it_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)

    def config(run: str) -> penstock.RunConfig:
        return penstock.load_config(flags={**FLAGS, "run_dir": run})

    penstock.train(config("two"), progress=True)
    out, shown = capfd.readouterr()
    assert out == "" and "epoch 2" in shown
    told = set()

    def tell(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        told.add(stage)

    penstock.train(config("three"), progress=tell)
    assert {"sample train", "plan train", "pack train", "train"} <= told
    with penstock.show_progress() as show:
        show("mine", 1, 1, "items")
    assert "mine" in capfd.readouterr().err


@pytest.mark.slow
def test_a_terminal_shows_progress_and_leaves_what_a_program_prints(folder: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", TERMINAL, str(folder / "small.graph"), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += (piece := os.read(ours, 1 << 16))
            except OSError:  # the other end is closed
                break
            if not piece:
                break
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(ours)
    assert printed == b"told 1\n" and process.returncode == 0
    assert b"train" in seen and b"told" not in seen


def test_a_notebook_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    from penstock.watching import is_watched

    assert not is_watched()
    interactive.InteractiveShell.instance()
    try:
        assert is_watched()
    finally:
        interactive.InteractiveShell.clear_instance()


def test_what_is_no_configuration_is_told_where_one_comes_from() -> None:
    with pytest.raises(TypeError, match=r"train takes what penstock\.load_config\(\.\.\.\) returns, not a str"):
        penstock.train("runs/papers")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["train", "infer", "open_feed", "ingest_parquet", "load_config", "write_nodes"])
def test_help_stands_alone(name: str) -> None:
    """A text that says what is done, with an example, all arguments, what comes back and what is raised."""
    function = getattr(penstock, name)
    text = inspect.getdoc(function) or ""
    missing = [argument for argument in inspect.signature(function).parameters if argument not in text]
    assert f"penstock.{name}(" in text
    assert "aises" in text or "rror where" in text
    assert missing in ([], ["progress"], ["file"])
