import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from penstock.engine.checkpoint import list_checkpoints, pack_tensors, read_latest
from penstock.engine.evaluate import evaluate_feed
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.metrics import Metrics
from penstock.engine.minibatch import MiniBatch
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.trainer import OpenFeed, Stopped, TrainConfig, Trainer, TrainResult, seed_step
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.budget import MIB
from penstock.storage.errors import DoesNotFit
from penstock.storage.graph import GraphStore, Split
from penstock.storage.trace import Trace

ITEMS = 5  # per epoch: 161 to 200 train nodes in batches of 40
Change = Callable[[MiniBatch], MiniBatch]


@pytest.fixture(scope="module")
def traces(tiny_graph: GraphStore, tmp_path_factory: pytest.TempPathFactory) -> dict[Split, Trace]:
    """Two epochs of the train split, one of valid."""
    folder = tmp_path_factory.mktemp("traces")
    config = SampleConfig(fanouts=(4, 4), batch_size=40, seed=3, degrees=True)

    def sample(split: Split, epochs: int) -> Trace:
        shuffle = split == "train"
        return sample_trace(
            tiny_graph,
            folder / split,
            config,
            split=split,
            shuffle=shuffle,
            num_epochs=epochs,
            host_memory=64 * MIB,
            threads=1,
        )

    return {"train": sample("train", 2), "valid": sample("valid", 1)}


class Job:
    """One training run over the tiny graph in a folder of its own; every call of `run` is a new process, as it were."""

    def __init__(self, graph: GraphStore, traces: dict[Split, Trace], folder: Path, **options: Any) -> None:
        self.graph, self.traces, self.folder = graph, traces, folder
        model = {key: options.pop(key) for key in ("kind", "norm") if key in options}
        self.model_config = ModelConfig(num_layers=2, hidden=8, dropout=0.5, **{"kind": "sage", **model})
        self.config = TrainConfig.model_validate({"epochs": 6, "lr": 0.01, "log_every": 3, "threads": 1, **options})
        assert traces["train"].meta.items_per_epoch == ITEMS
        self.stop = threading.Event()
        self.model: nn.Module = nn.Identity()
        self.change: Change = lambda batch: batch

    def evaluate(self, model: nn.Module) -> dict[str, Metrics]:
        trace = self.traces["valid"]
        with open_memory_feed(self.graph, trace, start_step=0, stop_step=trace.meta.num_items, threads=1) as feed:
            return {"valid": evaluate_feed(model, feed, self.graph.meta.num_classes)}

    def open_feed(self, stop_at: int | None = None) -> OpenFeed:
        @contextmanager
        def opened(start: int, stop: int) -> Iterator[Iterator[MiniBatch]]:
            with open_memory_feed(
                self.graph, self.traces["train"], start_step=start, stop_step=stop, threads=1
            ) as feed:
                yield self._watched(iter(feed), stop_at)

        return opened

    def _watched(self, feed: Iterator[MiniBatch], stop_at: int | None) -> Iterator[MiniBatch]:
        for batch in feed:
            if batch.step == stop_at:
                self.stop.set()
            yield self.change(batch)

    def trainer(self, **options: Any) -> Trainer:
        self.stop.clear()
        torch.manual_seed(0)
        self.model = build_model(self.model_config, self.graph.meta.num_features, self.graph.meta.num_classes)
        return Trainer(
            self.model,
            self.config,
            **{
                "items_per_epoch": ITEMS,
                "checkpoints": self.folder / "checkpoints",
                "metrics": self.folder / "metrics.jsonl",
                "evaluate": self.evaluate,
                "stop_requested": self.stop,
                **options,
            },
        )

    def run(self, stop_at: int | None = None, **options: Any) -> TrainResult:
        return self.trainer(**options).run(self.open_feed(stop_at))

    def run_with_stops(self, *steps: int) -> TrainResult:
        for step in steps:
            with pytest.raises(Stopped, match=f"at step {step + 1} of"):
                self.run(step)
        return self.run()

    def weights(self) -> bytes:
        return pack_tensors(self.model.state_dict())

    def lines(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.endswith("items_per_s")} for line in lines]


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "cosine", "warmup_steps": 3, "norm": "batch"},
        {"optimizer": "adamw", "schedule": "linear", "grad_clip": 0.5, "weight_decay": 0.01, "kind": "gcn"},
        {"optimizer": "sgd", "momentum": 0.9, "schedule": "step", "decay_epochs": 2, "lr": 0.1},
        {"optimizer": "rmsprop", "kind": "gat", "evaluate_every": 0},
        {"optimizer": "adagrad", "kind": "gin", "evaluate_every": 4, "precision": "bfloat16"},
    ],
    ids=lambda options: options.get("optimizer", "adam"),
)
def test_resumed_equals_uninterrupted(
    options: dict[str, Any], tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path
) -> None:
    whole = Job(tiny_graph, traces, tmp_path / "whole", **options)
    cut = Job(tiny_graph, traces, tmp_path / "cut", **options)
    expected = whole.run()
    found = cut.run_with_stops(0, 6, 9, 10, 27)  # first, within an epoch, last of an epoch, first of one, late
    assert cut.weights() == whole.weights()
    assert found.losses == expected.losses and len(found.losses) == 6
    assert found.evaluations == expected.evaluations
    assert (found.best_epoch, found.best) == (expected.best_epoch, expected.best)
    assert cut.lines() == whole.lines()
    assert (found.resumed_from, found.steps) == (28, 30)
    last = [read_latest(job.folder / "checkpoints") for job in (whole, cut)]
    assert (
        last[0]
        and last[1]
        and last[0].state["position"]
        == {
            **last[1].state["position"],
            "metrics_bytes": last[0].state["position"]["metrics_bytes"],  # rates take more or fewer digits
        }
    )


def test_groups_of_items_resume_where_a_group_ends(
    tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path
) -> None:
    options = {"accumulate": 2, "norm": "batch", "schedule": "cosine", "warmup_steps": 4, "patience": 4}
    whole = Job(tiny_graph, traces, tmp_path / "whole", **options)
    cut = Job(tiny_graph, traces, tmp_path / "cut", **options, checkpoint_items=3, keep_checkpoints=99)
    expected = whole.run()
    for step, group_end in ((0, 2), (4, 5), (5, 7), (23, 24)):  # a whole group, and the odd one at the end of an epoch
        with pytest.raises(Stopped, match=f"at step {group_end} of"):
            cut.run(step)
    found = cut.run()
    assert cut.weights() == whole.weights() and cut.lines() == whole.lines()
    assert (found.losses, found.evaluations) == (expected.losses, expected.evaluations)
    assert [line["step"] for line in cut.lines() if "lr" in line] == list(range(3, 31, 3))
    saved = sorted(path.name for path in (cut.folder / "checkpoints").iterdir())
    due = {4, 7, 9, 12, 15, 19, 22, 24, 27, 30}  # ends of groups that pass a multiple of three, or end there
    stopped, first = {2, 5, 7, 24}, {25}  # and where the first epoch of a process ends
    assert saved == [f"step-{step:09d}" for step in sorted(stopped | first | due)]


def test_dropout_depends_on_seed_and_step_alone(
    tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path
) -> None:
    losses = [Job(tiny_graph, traces, tmp_path / str(n), seed=seed).run().losses for n, seed in enumerate((1, 1, 2))]
    assert losses[0] == losses[1] != losses[2]
    draws = []
    for seed, step in ((1, -1), (1, 0), (1, 1), (2, 0), (1, 0)):
        seed_step(seed, step, torch.device("cpu"))
        draws.append(float(torch.rand(())))
    assert draws[1] == draws[4] and len(set(draws)) == 4


def test_learns_and_reports(tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path) -> None:
    job = Job(tiny_graph, traces, tmp_path, epochs=30, lr=0.02)
    seen: list[tuple[int, float]] = []

    def record(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        assert (stage, total, unit) == ("train", 150, "items")
        seen.append((done, numbers["loss"]))

    found = job.run(progress=record)
    assert found.losses[-1] < 0.8 * found.losses[0]
    assert found.best["valid"]["accuracy"] == max(e["valid"]["accuracy"] for e in found.evaluations) > 0.4
    logged, ends = set(range(3, 151, 3)), set(range(5, 151, 5))
    assert [done for done, _ in seen] == sorted([*logged, *ends]), "where both are due, both are told"
    epochs = [line for line in job.lines() if "valid_accuracy" in line]
    assert [line["epoch"] for line in epochs] == list(range(1, 31))
    assert [line["train_loss"] for line in epochs] == list(found.losses)
    assert found.times["compute"] > 0 and found.items_per_s > 0 and found.seeds_per_s > found.items_per_s
    assert set(found.times) == {"start", "compute", "stall", "reduce", "evaluate", "checkpoint", "record"}


def test_the_rate_of_a_record_is_that_of_its_epoch(
    tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path
) -> None:
    job = Job(tiny_graph, traces, tmp_path, epochs=3, log_every=1)
    shown: list[float] = []

    def record(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        shown.append(numbers["items_per_s"])

    found = job.run(progress=record)
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["items_per_s"] for line in lines] == shown
    by_step = {(line["step"], line["items_per_s"]) for line in lines}
    assert len(by_step) == 15, "the step and the epoch that end together have one rate"
    ends = [line["items_per_s"] for line in lines if "train_loss" in line]
    assert found.items_per_s == pytest.approx(15 / sum(5 / rate for rate in ends))


def test_epoch_loss_does_not_depend_on_logging(
    tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path
) -> None:
    often, never = (Job(tiny_graph, traces, tmp_path / str(n), log_every=n) for n in (1, 1000))
    assert often.run().losses == never.run().losses
    assert len(often.lines()) == 36 and len(never.lines()) == 6


def test_result_has_the_best_weights(tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path) -> None:
    job = Job(tiny_graph, traces, tmp_path, epochs=8)
    scores, kept = iter([0.3, 0.6, 0.6, 0.5, 0.6, 0.2, 0.1, 0.0]), []

    def evaluate(model: nn.Module) -> dict[str, Metrics]:
        assert not model.training
        kept.append(pack_tensors(model.state_dict()))
        score = next(scores)
        loss = 0.5 if len(kept) == 3 else 1.0  # the third ties with the second, at a lower loss
        return {"valid": Metrics(accuracy=score, micro_f1=score, macro_f1=0, loss=loss, num_nodes=1)}

    found = job.run(evaluate=evaluate)
    assert found.best_epoch == 3 and job.weights() == kept[2] != kept[-1]


@pytest.mark.parametrize("stops", [(), (1, 12, 17)])
def test_early_stopping(
    stops: tuple[int, ...], tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path
) -> None:
    job = Job(tiny_graph, traces, tmp_path, epochs=50, patience=2, metric="loss")
    by_epoch = {1: 0.9, 2: 0.5, 3: 0.6}
    epochs_seen: list[int] = []

    def evaluate(model: nn.Module) -> dict[str, Metrics]:
        epochs_seen.append(len(epochs_seen) + 1)
        loss = by_epoch.get(epochs_seen[-1], 0.7)
        return {"valid": Metrics(accuracy=0, micro_f1=0, macro_f1=0, loss=loss, num_nodes=1)}

    for step in stops:
        with pytest.raises(Stopped):
            job.run(step, evaluate=evaluate)
    found = job.run(evaluate=evaluate)
    assert found.stopped_early and (found.epochs, found.best_epoch, found.steps) == (4, 2, 20)
    again = job.run(evaluate=evaluate)  # a finished run has nothing left to do
    assert (again.epochs, again.resumed_from, again.losses) == (4, 20, found.losses) and len(epochs_seen) == 4


def test_stop_during_a_long_evaluation_repeats_only_that(
    tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path
) -> None:
    whole, cut = Job(tiny_graph, traces, tmp_path / "a"), Job(tiny_graph, traces, tmp_path / "b", checkpoint_items=1)
    expected = whole.run()

    def killed(model: nn.Module) -> dict[str, Metrics]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.run(evaluate=killed)
    found = cut.run()
    assert found.resumed_from == ITEMS
    assert found.evaluations == expected.evaluations and cut.weights() == whole.weights()


def test_starting_over(tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path) -> None:
    job = Job(tiny_graph, traces, tmp_path)
    first = job.run()
    second = job.trainer().run(job.open_feed(), resume=False)
    assert second.resumed_from == 0 and second.losses == first.losses
    assert len([line for line in job.lines() if "train_loss" in line]) == 6


def test_keeps_n_checkpoints(tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path) -> None:
    job = Job(tiny_graph, traces, tmp_path, checkpoint_items=4, keep_checkpoints=3)
    job.run()
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-000000030", "step-000000028", "step-000000024"]


def test_other_configuration_is_refused(tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        Job(tiny_graph, traces, tmp_path, lr=0.01).run(2, identity={"graph": "a"})
    with pytest.raises(ValueError, match=r"graph \('a' there, 'b' asked\), lr \(0.01 there, 0.02 asked\)"):
        Job(tiny_graph, traces, tmp_path, lr=0.02).run(identity={"graph": "b"})
    Job(tiny_graph, traces, tmp_path, lr=0.01, log_every=7, keep_checkpoints=1).run(identity={"graph": "a"})


@pytest.mark.parametrize(
    "options",
    [{"schedule": "step", "decay_epochs": 2}, {"evaluate_every": 4}, {"patience": 1, "lr": 0.3}],
    ids=["schedule", "undue evaluation", "patience"],
)
def test_more_epochs_end_as_if_they_had_been_asked_for_at_once(
    tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path, options: dict[str, Any]
) -> None:
    straight = Job(tiny_graph, traces, tmp_path / "straight", epochs=6, **options)
    whole = straight.run()
    for epochs in (1, 3, 6):
        job = Job(tiny_graph, traces, tmp_path / "more", epochs=epochs, **options)
        found = job.run()
    assert job.weights() == straight.weights() and job.lines() == straight.lines()
    assert (found.losses, found.evaluations) == (whole.losses, whole.evaluations)
    if not whole.stopped_early:
        with pytest.raises(ValueError, match="epochs=5 asks for fewer"):
            Job(tiny_graph, traces, tmp_path / "more", epochs=5, **options).run()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_rate_that_knows_its_end_cannot_have_another(
    tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path, schedule: str
) -> None:
    Job(tiny_graph, traces, tmp_path, epochs=1, schedule=schedule).run()
    with pytest.raises(ValueError, match=r"epochs \(1 there, 2 asked\)"):
        Job(tiny_graph, traces, tmp_path, epochs=2, schedule=schedule).run()


def test_not_finite_loss_names_the_step_and_keeps_the_checkpoint(
    tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path
) -> None:
    job = Job(tiny_graph, traces, tmp_path, checkpoint_items=4, log_every=100)
    job.change = lambda batch: replace(batch, features=batch.features * (float("nan") if batch.step == 13 else 1.0))
    with pytest.raises(ValueError, match=r"loss is nan at step 13 \(item 3\).*step 12 is kept"):
        job.run()
    latest = read_latest(tmp_path / "checkpoints")
    assert latest is not None and latest.step == 12
    assert all(bool(tensor.isfinite().all()) for tensor in latest.tensors["model"].values())


def test_errors_of_the_feed_reach_the_caller(
    tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path
) -> None:
    job = Job(tiny_graph, traces, tmp_path)

    def broken(batch: MiniBatch) -> MiniBatch:
        if batch.step == 7:
            raise OSError("the disk is gone")
        return batch

    job.change = broken
    with pytest.raises(OSError, match="gone"):
        job.run()

    @contextmanager
    def short(start: int, stop: int) -> Iterator[Iterator[MiniBatch]]:
        with job.open_feed()(start, 12) as feed:
            yield iter(feed)

    job.change = lambda batch: batch
    with pytest.raises(RuntimeError, match="ended at step 12 of 30"):
        job.trainer().run(short, resume=False)


def test_multi_label(tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path) -> None:
    def several(batch: MiniBatch) -> MiniBatch:
        once = functional.one_hot(batch.labels, 4).float()
        return replace(batch, labels=(once + once.roll(1, dims=1)).clamp(max=1))

    def evaluate(model: nn.Module) -> dict[str, Metrics]:
        with open_memory_feed(tiny_graph, traces["valid"], start_step=0, stop_step=2, threads=1) as feed:
            return {"valid": evaluate_feed(model, map(several, feed), 4)}

    job = Job(tiny_graph, traces, tmp_path, epochs=40, lr=0.02)
    job.change = several
    found = job.run(evaluate=evaluate)
    assert found.losses[-1] < 0.9 * found.losses[0]
    assert found.best["valid"]["micro_f1"] > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"precision": "float16"}, "CUDA"), ({"patience": 3, "evaluate_every": 0}, "evaluate_every")],
)
def test_impossible_combinations(
    options: dict[str, Any], message: str, tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Job(tiny_graph, traces, tmp_path, **options).trainer()


def test_full_disk_keeps_the_last_checkpoint(
    tiny_graph: GraphStore, traces: dict[Split, Trace], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small tmpfs here")
    try:
        job = Job(tiny_graph, traces, disk, checkpoint_items=1, keep_checkpoints=1000)
        with pytest.raises(DoesNotFit, match="disk is full"):
            job.run()
        latest = read_latest(disk / "checkpoints")
        assert latest is not None and 1 <= latest.step < 30
        moved = Job(tiny_graph, traces, tmp_path / "roomy", checkpoint_items=1, keep_checkpoints=1000)
        shutil.copytree(disk, tmp_path / "roomy")
        whole = Job(tiny_graph, traces, tmp_path / "whole")
        assert moved.run().losses == whole.run().losses and moved.weights() == whole.weights()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
