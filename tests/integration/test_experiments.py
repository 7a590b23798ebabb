"""Several experiments in one run folder: each has its results, all have the packs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.config import RunConfig, load_config
from penstock.inference import infer
from penstock.inspection import describe, describe_location, run_inspect
from penstock.run import open_run
from penstock.storage.budget import MIB
from penstock.storage.errors import DataError, InUse
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.training import train

SAMPLED: dict[str, Any] = {"sampler.fanouts": (3, 3), "sampler.batch_size": 20}
CHUNKED: dict[str, Any] = {"mode": "chunked", "chunked.chunks": 4, "model.num_layers": 3}
SHAPE: dict[str, Any] = {"model.hidden": 8, "train.epochs": 3, "train.threads": 1, "budgets.host_memory": "16MiB"}
SHARED = ("train", "valid", "test", "chunks", "features", "local")
Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("experiments") / "graph"
    config = GenerateConfig(num_nodes=300, num_features=8, train=0.3, valid=0.2, test=0.2)
    return generate_graph(out, config, host_memory=32 * MIB).path


@pytest.fixture
def configure(graph: Path, tmp_path: Path) -> Configure:
    """A function that makes a configuration of an experiment in `tmp_path/run`."""

    def made(experiment: str | None = None, **flags: Any) -> RunConfig:
        given = {key.replace("__", "."): value for key, value in flags.items()}
        shape = CHUNKED if given.get("mode") == "chunked" else SAMPLED
        place = {"dataset": graph, "run_dir": tmp_path / "run", "experiment": experiment}
        return load_config(flags={**place, **SHAPE, **shape, **given})

    return made


def files(*folders: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file below folders, with its time and its content."""
    found = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found if path.name != "made-of.json"}


def shared(config: RunConfig) -> dict[Path, tuple[int, bytes]]:
    return files(*(config.run_dir / name for name in SHARED))


def weights(config: RunConfig) -> bytes:
    return (config.results_dir / "model" / "model.safetensors").read_bytes()


class Steps:
    """Notes which steps did something."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        self.seen.add(stage)


CHANGES: dict[str, dict[str, Any]] = {
    "wide-and-long": {"model__hidden": 16, "train__epochs": 5},
    "short": {"train__lr": 0.1, "train__epochs": 1},
}
MODES: dict[str, dict[str, Any]] = {
    "packs": {},
    "packs of more epochs": {"sampled_epochs": 3},
    "chunks": {"mode": "chunked", "model__kind": "gcnii"},
}


@pytest.mark.parametrize(
    ("mode", "changes"),
    [("packs", ("wide-and-long",)), *(pytest.param(mode, tuple(CHANGES), marks=pytest.mark.slow) for mode in MODES)],
)
def test_another_experiment_makes_no_packs_and_keeps_the_results(
    configure: Configure, tmp_path: Path, mode: str, changes: tuple[str, ...]
) -> None:
    flags = MODES[mode]
    first = configure(**flags)
    train(first)
    packs = shared(first)
    results = files(first.run_dir / "model", first.run_dir / "checkpoints", first.run_dir)
    assert packs
    for name, change in ((name, CHANGES[name]) for name in changes):
        steps, config = Steps(), configure(name, **(flags | change))
        found = train(config, progress=steps)
        assert not steps.seen & {"sample", "plan", "pack", "cut", "partition"}, steps.seen
        assert found["status"] == "ok" and found["artefacts"]["model"] == str(config.results_dir / "model")
        assert shared(first) == packs, "nothing was sampled or packed"
        alone = configure(run_dir=tmp_path / f"alone-{name}", **(flags | change))
        assert train(alone)["metrics"]["train_losses"] == found["metrics"]["train_losses"]
        assert weights(alone) == weights(config)
    after = files(first.run_dir)
    assert {path: after[path] for path in results if path.name not in (".lock", "machine.json")} == {
        path: results[path] for path in results if path.name not in (".lock", "machine.json")
    }
    assert train(first)["already_done"] and train(configure(name, **flags, **change))["already_done"]


@pytest.mark.slow
@pytest.mark.parametrize("first", [{"sampler__degrees": True}, {"model__kind": "gcn"}])
def test_packs_with_degrees_serve_every_kind_of_model(
    configure: Configure, tmp_path: Path, first: dict[str, Any]
) -> None:
    train(configure(**first))
    packs = shared(configure())
    for kind in ("sage", "gcn", "gat", "gin"):
        train(configure(kind, model__kind=kind))
        assert shared(configure()) == packs
    alone = configure(run_dir=tmp_path / "alone")
    train(alone)
    assert weights(alone) == weights(configure("sage")), "what items hold beside changes nothing"


@pytest.mark.slow
def test_packs_without_degrees_serve_kinds_that_read_none_and_are_made_again_once(configure: Configure) -> None:
    train(configure())
    packs = shared(configure())
    train(configure("gat", model__kind="gat"))
    assert shared(configure()) == packs
    train(configure("gcn", model__kind="gcn"))
    again = shared(configure())
    assert again != packs
    train(configure("gin", model__kind="gin"))
    train(configure("sage", train__lr=0.1))
    assert shared(configure()) == again


@pytest.mark.slow
def test_in_memory_and_from_packs_experiments_share_a_folder(configure: Configure, tmp_path: Path) -> None:
    first = configure()
    train(first)
    packs = shared(first)
    held = train(configure("held", feed="memory", train__lr=0.1))
    assert {path: found for path, found in shared(first).items() if "trace" not in path.parts} == packs
    fed = train(configure("fed", train__lr=0.1))
    assert held["metrics"]["train_losses"] == fed["metrics"]["train_losses"]
    assert {path: found for path, found in shared(first).items() if "trace" not in path.parts} == packs


@pytest.mark.slow
def test_experiments_that_cycle_other_epochs_do_not_take_packs_for_theirs(configure: Configure, tmp_path: Path) -> None:
    """Four sampled epochs are not two that begin again, and all that a run in memory sampled is not to be packed."""
    train(configure("rolled", feed="memory", plan__mode="rolling", train__epochs=6))
    train(configure("short", train__epochs=1))
    assert json.loads((configure().run_dir / "train" / "made-of.json").read_text())["made_of"]["epochs"] == 1
    train(configure(sampled_epochs=4, train__epochs=4))
    for epochs in (2, 3):
        found = train(configure(f"of-{epochs}", sampled_epochs=2, train__epochs=epochs))
        alone = configure(run_dir=tmp_path / f"alone-{epochs}", sampled_epochs=2, train__epochs=epochs)
        assert train(alone)["metrics"]["train_losses"] == found["metrics"]["train_losses"]


def test_the_refusal_names_an_experiment_and_that_works(configure: Configure) -> None:
    train(configure())
    with pytest.raises(ValueError, match=r"train\.lr \(0\.003 there, 0\.1 asked\).*--experiment NAME.*--run-dir"):
        train(configure(train__lr=0.1))
    assert train(configure("NAME", train__lr=0.1))["status"] == "ok"
    with pytest.raises(ValueError, match="another --experiment NAME"):
        train(configure("NAME", train__lr=0.2))


@pytest.mark.slow
def test_force_and_resume_are_of_one_experiment(configure: Configure) -> None:
    first, other = configure(), configure("other", train__lr=0.1)
    train(first)
    train(other)
    packs, results = shared(first), files(first.run_dir / "model", first.run_dir / "checkpoints")
    train(configure("other", train__lr=0.2), force=True)
    train(configure("other", train__lr=0.3), resume=False)
    train(configure("other", train__lr=0.4), if_changed=True)
    assert shared(first) == packs and files(first.run_dir / "model", first.run_dir / "checkpoints") == results
    theirs = files(other.results_dir / "model")
    train(first, force=True)
    assert files(other.results_dir / "model") == theirs and train(configure("other", train__lr=0.4))["already_done"]


@pytest.mark.slow
def test_an_experiment_goes_on_where_it_was_killed(configure: Configure, tmp_path: Path) -> None:
    train(configure())

    def progress(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train" and done > total // 2:
            raise KeyboardInterrupt

    config = configure("killed", train__lr=0.1, train__checkpoint_items=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=progress)
    train(configure("between", train__lr=0.2))
    assert train(config)["resumed_from"] > 0
    alone = configure(run_dir=tmp_path / "alone", train__lr=0.1)
    train(alone)
    assert weights(alone) == weights(config)


def test_experiments_take_turns(configure: Configure) -> None:
    with open_run(configure("one")), pytest.raises(InUse, match="its experiments take turns"):
        train(configure("two"))


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "x" * 65])
def test_names_are_names_of_folders(configure: Configure, name: str) -> None:
    with pytest.raises(ValueError, match="experiment="):
        configure(name)


def test_infer_and_inspect_find_experiments(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = configure().run_dir
    train(configure("narrow", model__hidden=4))
    with pytest.raises(DataError, match="no trained model.*experiments narrow: name one with --experiment"):
        infer(run, tmp_path / "out.parquet")
    with pytest.raises(DataError, match="wide does not exist.*experiments narrow"):
        infer(run, tmp_path / "out.parquet", experiment="wide")
    assert infer(run, tmp_path / "out.parquet", experiment="narrow")["rows"] == 300
    found = describe(run, validate=True)
    assert list(found["experiments"]) == ["narrow"] and found["experiments"]["narrow"]["metrics"]["epochs"] == 3
    assert found["validated"] and "metrics" not in found
    assert describe(run / "experiments" / "narrow")["pack_sets"]
    train(configure())
    assert describe(run)["metrics"]["epochs"] == 3 and "narrow" in describe(run)["experiments"]
    run_inspect(run, validate=False, as_json=False)
    out = capsys.readouterr().out
    assert "experiments of" in out and "narrow" in out and "ok, epochs 3" in out
    assert load_config(run / "experiments" / "narrow" / "config.yaml").experiment == "narrow"


@pytest.mark.slow
def test_experiments_of_a_run_at_a_uri_have_a_place_each_there(
    configure: Configure, graph: Path, tmp_path: Path
) -> None:
    bucket = tmp_path / "bucket" / "run"
    places = {"run_dir": bucket.as_uri(), "remote__stage_dir": str(tmp_path / "host")}
    first = train(configure(**places))
    other = train(configure("other", train__lr=0.1, **places))
    assert json.loads((bucket / "result.json").read_text())["metrics"] == first["metrics"]
    there = bucket / "experiments" / "other"
    assert json.loads((there / "result.json").read_text())["metrics"] == other["metrics"]
    assert {"config.yaml", "model", "checkpoints", "metrics.jsonl"} <= {path.name for path in there.iterdir()}
    elsewhere = places | {"remote__stage_dir": str(tmp_path / "other-host")}
    assert train(configure("other", train__lr=0.1, **elsewhere))["already_done"]
    stage = tmp_path / "reader"
    out = tmp_path / "out.parquet"
    assert infer(bucket.as_uri(), out, experiment="other", dataset=graph, stage_dir=stage)["rows"] == 300
    found = describe_location(bucket.as_uri(), stage_dir=stage)
    assert found["experiments"]["other"]["metrics"] == other["metrics"] and found["metrics"] == first["metrics"]
    with pytest.raises(DataError, match="experiments other"):
        infer(bucket.as_uri(), out, experiment="another", stage_dir=stage)


@pytest.mark.slow
def test_packs_of_chunks_serve_another_experiment(configure: Configure, tmp_path: Path) -> None:
    config = GenerateConfig(num_nodes=4000, num_features=512, avg_degree=6, train=0.3, valid=0.05, test=0.1)
    wide = generate_graph(tmp_path / "wide", config, host_memory=32 * MIB).path
    flags: dict[str, Any] = {
        "mode": "chunked",
        "dataset": wide,
        "chunked__chunks": 40,
        "chunked__partition": "ldg",
        "chunked__history_storage": "disk",
        "model__kind": "gcn",
        "budgets__host_memory": 20 * MIB,
    }
    assert train(configure(**flags))["schedule"]["features"] == "packs"
    packs, steps = shared(configure()), Steps()
    train(configure("lr", train__lr=0.1, **flags), progress=steps)
    assert shared(configure()) == packs and "pack" not in steps.seen
    train(configure(run_dir=tmp_path / "alone", train__lr=0.1, **flags))
    assert weights(configure(run_dir=tmp_path / "alone")) == weights(configure("lr"))


@pytest.mark.slow
def test_replicas_of_another_experiment_use_the_packs_on_their_hosts(configure: Configure, tmp_path: Path) -> None:
    first = configure(cluster__replicas=2)
    train(first)
    packs = shared(first)
    config = configure("other", cluster__replicas=2, train__lr=0.1)
    train(config)
    there = shared(first)
    assert {path: there[path] for path in packs if "packs" in path.parts} == {
        path: packs[path] for path in packs if "packs" in path.parts
    }
    alone = configure(run_dir=tmp_path / "alone", train__lr=0.1, train__accumulate=2)
    train(alone)
    assert weights(alone) == weights(config)
