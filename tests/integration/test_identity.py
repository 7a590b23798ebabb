"""Whose a run folder is: what binds it, what may change, and that what is done is judged by content."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from penstock.config import RunConfig, load_config
from penstock.inference import infer
from penstock.run import open_run
from penstock.storage.budget import MIB
from penstock.storage.errors import DataError, DoesNotFit
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import open_graph
from penstock.training import train

SHAPE: dict[str, Any] = {
    "sampler.fanouts": (3, 3),
    "sampler.batch_size": 20,
    "model.hidden": 8,
    "train.epochs": 2,
    "train.threads": 1,
    "budgets.host_memory": "16MiB",
}
Configure = Callable[..., RunConfig]


def make(path: Path, **options: Any) -> Path:
    generate_graph(path, GenerateConfig(**{"num_nodes": 300, "num_features": 8, **options}), host_memory=32 * MIB)
    return path


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("identity") / "graph", train=0.3, valid=0.2, test=0.2)


@pytest.fixture
def configure(graph: Path, tmp_path: Path) -> Configure:
    """A function that makes a configuration of the run in `tmp_path/run`; dots in keys are written `__`."""

    def made(**flags: Any) -> RunConfig:
        given = {key.replace("__", "."): value for key, value in flags.items()}
        unread = "sampler." if given.get("mode") == "chunked" else "none"
        shape = {key: value for key, value in SHAPE.items() if not key.startswith(unread)}
        return load_config(flags={"dataset": graph, "run_dir": tmp_path / "run", **shape, **given})

    return made


def weights(config: RunConfig) -> bytes:
    return (config.run_dir / "model" / "model.safetensors").read_bytes()


def test_a_finished_run_says_so_and_names_what_it_was_made_of(configure: Configure, graph: Path) -> None:
    config, fingerprint = configure(), open_graph(graph).fingerprint
    first = train(config)
    again = train(config)
    assert again.pop("already_done") and again == first and first["graph"] == fingerprint
    assert first["identity"]["graph"] == fingerprint and first["identity"]["plan.mode"] == "reuse"
    assert json.loads((config.run_dir / "model" / "model.json").read_text())["extra"] == {"graph": fingerprint}
    assert (config.run_dir / "config.yaml").read_text().split("\n")[1] == f"# graph: {fingerprint}"
    assert load_config(config.run_dir / "config.yaml").train == config.train


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"model__kind": "gcn"}, id="sampled"),
        pytest.param({"mode": "chunked", "chunked__chunks": 4, "model__kind": "gcn"}, id="chunked"),
    ],
)
def test_another_graph_under_the_same_path_is_refused_and_trained_on_where_asked(
    configure: Configure, graph: Path, tmp_path: Path, flags: dict[str, Any]
) -> None:
    place = tmp_path / "replaced"
    shutil.copytree(graph, place)
    old = open_graph(place).fingerprint
    config = configure(dataset=place, model__num_layers=2, **flags)
    before = train(config)
    shutil.rmtree(place)
    new = open_graph(make(place, train=0.3, valid=0.2, test=0.2, seed=5)).fingerprint
    with pytest.raises(ValueError, match=rf"trained on graph {old}, and .*replaced is graph {new} now.*--if-changed"):
        train(config)
    assert json.loads((config.run_dir / "result.json").read_text())["metrics"] == before["metrics"]
    with pytest.raises(DataError, match=f"was trained on graph {old}.*--dataset"):
        infer(config.run_dir, tmp_path / "out.parquet")
    assert infer(config.run_dir, tmp_path / "out.parquet", dataset=place)["rows"] == 300
    changed = train(config, if_changed=True)
    assert changed["graph"] == new and changed["metrics"] != before["metrics"]
    assert train(config, if_changed=True)["already_done"]
    fresh = train(config.model_copy(update={"run_dir": tmp_path / "fresh"}))
    assert fresh["metrics"]["train_losses"] == changed["metrics"]["train_losses"]
    assert train(config, force=True)["metrics"]["train_losses"] == changed["metrics"]["train_losses"]


def test_the_graph_may_lie_elsewhere(
    configure: Configure, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(configure())
    moved = tmp_path / "moved"
    shutil.copytree(graph, moved)
    monkeypatch.chdir(tmp_path)
    for place in (moved, Path("moved")):
        assert train(configure(dataset=place))["already_done"]
    assert train(configure(dataset=moved.as_uri(), remote__stage_dir=str(tmp_path / "stage")))["already_done"]


MAY_CHANGE = {
    "budgets.host_memory": "32MiB",
    "budgets.disk": "1GiB",
    "train.threads": 2,
    "train.log_every": 3,
    "train.checkpoint_items": 2,
    "train.checkpoint_minutes": 5,
    "train.keep_checkpoints": 1,
    "evaluate.memory_share": 0.3,
    "sampler.mode": "hop",
    "sampler.window_items": 2,
    "plan.policy": "static",
    "plan.row_dtype": "float32",  # as stored
    "feed": "memory",
    "track.trace_steps": (0, 1),
}
MAY_NOT = {
    "train.lr": 0.5,
    "train.seed": 1,
    "train.schedule": "cosine",
    "train.patience": 3,
    "train.evaluate_every": 2,
    "sampler.fanouts": (3, 4),
    "sampler.batch_size": 21,
    "sampler.seed": 1,
    "sampled_epochs": 1,
    "plan.mode": "rolling",
    "plan.row_dtype": "float16",
    "evaluate.mode": "exact",
    "evaluate.fanouts": (2, 2),
    "model.hidden": 4,
    "cluster.feeders": 1,
}


@pytest.fixture(scope="module")
def finished(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(load_config(flags={"dataset": graph, "run_dir": run, **SHAPE}))
    return run


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_what_moves_nothing_but_bytes_may_change(configure: Configure, finished: Path, key: str) -> None:
    assert train(configure(run_dir=finished, **{key: MAY_CHANGE[key]}))["already_done"]


@pytest.mark.parametrize("key", MAY_NOT)
def test_what_changes_weights_is_refused_by_name(configure: Configure, finished: Path, key: str) -> None:
    named = "plan.mode" if key == "cluster.feeders" else key
    with pytest.raises(ValueError, match=rf"other values of .*{named} \(.* there, .* asked\).*--force"):
        train(configure(run_dir=finished, **{key: MAY_NOT[key]}))


def test_more_epochs_go_on_to_the_weights_of_a_run_that_had_them_at_once(configure: Configure, tmp_path: Path) -> None:
    for epochs in (1, 2, 5):  # the first has packs of one epoch, the others of two
        result = train(configure(train__epochs=epochs))
        assert result["metrics"]["epochs"] == epochs and (epochs == 1) == (result["resumed_from"] == 0)
    straight = configure(run_dir=tmp_path / "straight", train__epochs=5)
    assert train(straight)["metrics"]["train_losses"] == result["metrics"]["train_losses"]
    assert weights(configure()) == weights(straight)
    with pytest.raises(ValueError, match=r"has 5 epochs behind it, train\.epochs=4 asks for fewer"):
        train(configure(train__epochs=4))
    assert train(configure(train__epochs=4), if_changed=True)["metrics"]["epochs"] == 4


def test_a_schedule_that_knows_its_end_says_why_it_cannot_go_on(configure: Configure) -> None:
    train(configure(train__schedule="linear"))
    with pytest.raises(ValueError, match=r"train\.epochs \(2 there, 3 asked\) \(with this train\.schedule the rate"):
        train(configure(train__schedule="linear", train__epochs=3))


def test_more_epochs_that_were_killed_are_not_finished(configure: Configure) -> None:
    train(configure())

    class Killed(BaseException):
        pass

    def progress(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train":
            raise Killed

    with pytest.raises(Killed):
        train(configure(train__epochs=4), progress=progress)
    assert not (configure().run_dir / "result.json").exists()
    assert train(configure(train__epochs=4))["metrics"]["epochs"] == 4


def test_plans_bind_nobody(configure: Configure) -> None:
    """Look at a plan as often as you like, then train; what was sampled for the same is kept."""
    from penstock.run_verbs import run_plan

    for flags in ({}, {"train__epochs": 1}, {"sampler__fanouts": (2, 5)}, {"budgets__host_memory": "8MiB"}, {}):
        run_plan(configure(**flags), force=False, as_json=True, quiet=True)
    trace = configure().run_dir / "train" / "trace"
    sampled = {path: path.stat().st_mtime_ns for path in trace.iterdir()}
    run_plan(configure(budgets__host_memory="24MiB"), force=False, as_json=True, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in trace.iterdir()} == sampled
    assert train(configure(train__epochs=3))["metrics"]["epochs"] == 3


@pytest.mark.slow
def test_packs_of_other_budgets_are_used_where_they_fit_and_made_again_where_not(
    configure: Configure, tmp_path: Path
) -> None:
    place = make(tmp_path / "wide", num_nodes=20_000, num_features=256, train=0.02, valid=0.005)
    straight = train(configure(run_dir=tmp_path / "straight", dataset=place, train__epochs=4))
    train(configure(dataset=place, budgets__host_memory="24MiB"))
    packs = configure().run_dir / "train" / "packs"

    def made() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in packs.iterdir()}

    first = made()
    train(configure(dataset=place, budgets__host_memory="64MiB", train__epochs=3))
    assert made() == first, "they fit"
    again = train(configure(dataset=place, budgets__host_memory="6MiB", train__epochs=4))
    assert made() != first and again["metrics"]["train_losses"] == straight["metrics"]["train_losses"]
    assert weights(configure()) == weights(configure(run_dir=tmp_path / "straight"))


@pytest.mark.slow
@pytest.mark.parametrize("there", ["reuse", "rolling"])
def test_the_pack_mode_that_auto_chose_is_kept(configure: Configure, tmp_path: Path, there: str) -> None:
    """More epochs than are sampled, so the modes train on other items."""
    sampled = {"sampled_epochs": 1} if there == "reuse" else {}  # rolling windows have no use for it
    config = configure(plan__mode=there, train__epochs=4, **sampled)
    train(config.model_copy(update={"train": config.train.model_copy(update={"epochs": 2})}))
    (config.run_dir / "machine.json").unlink()  # as on another host
    shutil.rmtree(config.run_dir / "train")
    tight = {"budgets__disk": "40KiB"} if there == "reuse" else {}
    auto = configure(sampled_epochs=1, train__epochs=4, **tight)
    if there == "reuse":
        with pytest.raises(DoesNotFit, match="use --disk"):
            train(auto)
        auto = configure(sampled_epochs=1, train__epochs=4)
    kept = train(auto)
    assert kept["identity"]["plan.mode"] == there
    straight = config.model_copy(update={"run_dir": tmp_path / "straight"})
    assert train(straight)["metrics"]["train_losses"] == kept["metrics"]["train_losses"]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        pytest.param({}, {}, id="packs"),
        pytest.param({"feed": "memory"}, {}, id="memory"),
        pytest.param({"plan__mode": "rolling"}, {"sampled_epochs": 3}, id="auto that was rolling"),
    ],
)
def test_what_a_run_writes_down_of_itself_is_accepted(
    configure: Configure, flags: dict[str, Any], kept: dict[str, Any]
) -> None:
    """Also where `auto` was settled by what is there."""
    train(configure(**flags))
    auto = {key: value for key, value in flags.items() if key != "plan__mode"}
    train(configure(train__epochs=3, **auto, **kept))
    assert train(load_config(configure().run_dir / "config.yaml"))["already_done"]


def test_memory_trains_on_the_items_of_the_mode(configure: Configure, tmp_path: Path) -> None:
    straight = train(configure(run_dir=tmp_path / "straight", plan__mode="rolling", train__epochs=4))
    whole = train(configure(run_dir=tmp_path / "whole", plan__mode="rolling", feed="memory", train__epochs=4))
    assert whole["metrics"]["train_losses"] == straight["metrics"]["train_losses"]
    train(configure(plan__mode="rolling", train__epochs=2))
    held = train(configure(feed="memory", train__epochs=4))
    assert held["metrics"]["train_losses"] == straight["metrics"]["train_losses"]
    assert held["identity"]["plan.mode"] == "rolling"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model__kind": "custom", "model__module": "nowhere:Net", "model__hidden": None}, "no module 'nowhere'"),
        ({"train__device": "cuda:99"}, "device=cuda:99"),
        ({"sampler__weighted": True}, "no edge weights"),
    ],
)
def test_a_first_try_that_cannot_work_writes_nothing(configure: Configure, flags: dict[str, Any], message: str) -> None:
    config = configure(**flags)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not config.run_dir.exists()
    assert train(configure())["status"] == "ok"


def test_a_budget_that_was_too_small_binds_nobody(configure: Configure) -> None:
    with pytest.raises(DoesNotFit) as error:
        train(configure(budgets__host_memory="1KiB"))
    assert error.value.host_bytes is not None
    result = train(configure(budgets__host_memory=error.value.host_bytes))
    assert result["status"] == "ok"


def test_without_resume_another_experiment_uses_the_packs(configure: Configure) -> None:
    first = train(configure())
    packs = {p: p.stat().st_mtime_ns for p in (configure().run_dir / "train" / "packs").iterdir()}
    other = train(configure(train__lr=0.1, model__hidden=4), resume=False)
    assert other["metrics"]["train_losses"] != first["metrics"]["train_losses"]
    assert {p: p.stat().st_mtime_ns for p in (configure().run_dir / "train" / "packs").iterdir()} == packs
    assert yaml.safe_load((configure().run_dir / "config.yaml").read_text())["train"]["lr"] == 0.1


def test_a_graph_without_anything_to_train_on_is_refused_at_once(
    configure: Configure, make_graph: Callable[..., Any], tmp_path: Path
) -> None:
    edges = np.random.default_rng(0).integers(0, 50, (200, 2))
    blank = make_graph(50, edges, labels=np.full(50, -1))
    empty = make_graph(50, edges, train=np.zeros(0, np.int64))
    unscored = make(tmp_path / "unscored", train=0.3, valid=0.0)
    chunked = {"mode": "chunked", "chunked__chunks": 2, "model__num_layers": 2}
    for flags in ({}, chunked):
        for store, message in ((blank, "no label on any train node"), (empty, "no train nodes")):
            with pytest.raises(DataError, match=message):
                train(configure(dataset=store.path, **flags))
        with pytest.raises(ValueError, match="patience=1 needs an evaluation"):
            train(configure(dataset=unscored, train__patience=1, **flags))
    assert not (tmp_path / "run").exists()


def test_the_ranks_that_were_chosen_for_devices_are_kept(configure: Configure) -> None:
    flags: dict[str, Any] = {"mode": "chunked", "chunked__chunks": 4, "model__kind": "gcnii", "model__num_layers": 3}
    first = train(configure(**flags, chunked__devices=2, model__dropout=0))
    parts = first["identity"]["chunked.parts"]
    assert first["identity"]["chunked.partition"] in ("metis", "ldg")
    shutil.rmtree(configure().run_dir / "chunks")
    (configure().run_dir / "chunked.json").unlink()
    again = train(configure(**flags, chunked__devices=2, model__dropout=0, train__epochs=3))
    assert again["identity"] == first["identity"] and again["schedule"]["parts"] == parts
    with pytest.raises(ValueError, match=r"chunked\.parts \(.* there, .* asked\)"):
        train(configure(**flags, chunked__parts=3 - parts, model__dropout=0, train__epochs=3))


def test_plan_alone_does_not_open_a_run_of_something_else(configure: Configure) -> None:
    train(configure())
    with pytest.raises(ValueError, match=r"train\.lr"), open_run(configure(train__lr=1.0)):
        pass
