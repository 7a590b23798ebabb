"""A record per epoch for who called `penstock.train`, in every mode of training."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock.epochs import EpochWatch
from penstock.live import epoch_line

FLAGS: dict[str, Any] = {
    "budgets.host_memory": "256MiB",
    "model.hidden": 8,
    "train.epochs": 3,
    "train.threads": 1,
}
SAMPLED = {"sampler.batch_size": 32, "sampler.fanouts": (4, 4)}
CHUNKED = {"mode": "chunked", "chunked.chunks": 4, "model.num_layers": 2, "model.dropout": 0}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("epochs") / "graph"
    config = penstock.GenerateConfig(num_nodes=600, num_features=8, num_classes=3, avg_degree=5, train=0.4, valid=0.3)
    penstock.generate_graph(path, config, host_memory=64 << 20)
    return path


def train(graph: Path, run: Path, **options: Any) -> list[penstock.EpochRecord]:
    flags = {**FLAGS, "dataset": graph, "run_dir": run, **options}
    told: list[penstock.EpochRecord] = []
    penstock.train(penstock.load_config(flags=flags), on_epoch=told.append)
    return told


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(SAMPLED, id="packs"),
        pytest.param({**SAMPLED, "feed": "memory"}, id="memory", marks=pytest.mark.slow),
        pytest.param(CHUNKED, id="chunked"),
        pytest.param({**SAMPLED, "cluster.replicas": 2}, id="replicas", marks=pytest.mark.slow),
    ],
)
def test_every_epoch_is_told_once(graph: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    told = train(graph, tmp_path / "run", **options)
    assert [record.epoch for record in told] == [1, 2, 3]
    result = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert [record.loss for record in told] == result["train_losses"]
    assert all(record.epochs == 3 and record.metric == "micro_f1" for record in told)
    scores = [record.valid.micro_f1 for record in told if record.valid is not None]
    assert len(scores) == 3
    assert told[-1].best == max(scores) and told[-1].best_epoch == result["best_epoch"]
    assert all(record.items_per_s is not None and record.items_per_s > 0 for record in told)
    assert all(record.epoch_s > 0 for record in told)
    assert told[0].left_s == pytest.approx(2 * told[0].epoch_s) and told[-1].left_s == 0


def test_an_epoch_that_was_trained_before_says_nothing_of_the_time_left() -> None:
    told: list[penstock.EpochRecord] = []
    watch = EpochWatch(penstock.TrainConfig(epochs=3), (told.append,))
    watch.take({"epoch": 1, "train_loss": 1.0})
    watch.take({"epoch": 2, "train_loss": 0.5, "items_per_s": 4.0})
    assert told[0].left_s is None and "left" not in epoch_line(told[0])
    assert told[1].left_s == told[1].epoch_s and "left" in epoch_line(told[1])


@pytest.mark.slow
@pytest.mark.parametrize("options", [SAMPLED, CHUNKED], ids=["sampled", "chunked"])
def test_an_evaluation_of_the_last_epoch_alone_is_told_with_it(
    graph: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    told = train(graph, tmp_path / "run", **{**options, "train.evaluate_every": 2})
    assert [(record.epoch, record.valid is not None) for record in told] == [(1, False), (2, True), (3, True)]
    assert told[0].best is None and told[0].best_epoch is None


@pytest.mark.slow
def test_a_run_that_goes_on_tells_what_is_left_of_it(graph: Path, tmp_path: Path) -> None:
    config = penstock.load_config(flags={**FLAGS, **SAMPLED, "dataset": graph, "run_dir": tmp_path / "run"})
    stop, told = threading.Event(), list[penstock.EpochRecord]()

    def stop_after_the_first(record: penstock.EpochRecord) -> None:
        told.append(record)
        stop.set()

    with pytest.raises(RuntimeError, match="stopped at step"):
        penstock.train(config, on_epoch=stop_after_the_first, stop_requested=stop)
    penstock.train(config, on_epoch=told.append)
    assert [record.epoch for record in told] == [1, 2, 3]
    assert told[-1].best == max(record.valid.micro_f1 for record in told if record.valid is not None)


def test_an_error_of_the_callback_ends_the_run_as_its_own(graph: Path, tmp_path: Path) -> None:
    class Mine(Exception):
        pass

    def fail(record: penstock.EpochRecord) -> None:
        raise Mine("of the callback")

    config = penstock.load_config(flags={**FLAGS, **SAMPLED, "dataset": graph, "run_dir": tmp_path / "run"})
    with pytest.raises(Mine):
        penstock.train(config, on_epoch=fail)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
