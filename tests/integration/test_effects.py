"""No key is ignored: what has no effect is refused by name, and what is accepted is read by a real run."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from penstock.config import RunConfig, load_config
from penstock.effects import EFFECTS
from penstock.storage.graph import GraphStore
from penstock.training import train

NEEDED = {"dataset": "graph", "run_dir": "run"}
SMALL = ["model.hidden=8", "train.epochs=2", "budgets.host_memory=64MiB"]
# Keys that only say where things are or who runs: read before a run, by another process, or on Ray.
ELSEWHERE = {
    "run_dir": "where the run is",
    "mode": "which way to go",
    "remote.dataset": "made from a URI",
    "remote.run_dir": "made from a URI",
    "remote.stage_dir": "tests/integration/test_locations.py",
    "cluster.": "tests/integration/test_replicas.py and tests/cluster",
    "track.": "tests/integration/test_tracking.py and test_timeline.py",
    "sampler.fanouts": "through layer_fanouts",
    "sampler.num_neighbors": "through layer_fanouts",
    "model.module": "tests/engine/test_models.py",
    "model.kwargs": "tests/engine/test_models.py",
    "train.precision": "tests/engine/test_trainer.py",
}


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Names of the sections of a RunConfig, with their models; the first is the configuration itself."""
    yield "", RunConfig
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield f"{name}.", field.annotation


def schema() -> dict[str, Any]:
    """Every key with the type of its value."""
    return {
        prefix + name: field.annotation
        for prefix, model in sections()
        for name, field in model.model_fields.items()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    }


def other_value(kind: Any, rng: random.Random) -> Any:
    """Some value of a type; None where this test makes none up."""
    if get_origin(kind) is Literal:
        return rng.choice(get_args(kind))
    if kind in (bool, int, float):
        return {bool: rng.random() < 0.5, int: rng.randint(1, 6), float: rng.choice((0.1, 0.25, 0.75))}[kind]
    kinds = [part for part in get_args(kind) if part is not type(None)]
    return other_value(kinds[0], rng) if len(kinds) == 1 and get_origin(kind) is not tuple else None


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Collect the keys that are read as attributes of a configuration's sections."""
    found: set[str] = set()

    def watch(prefix: str, model: type[BaseModel]) -> Callable[[Any, str], Any]:
        fields, read = set(model.model_fields), model.__getattribute__

        def getattribute(self: Any, name: str) -> Any:
            if name in fields:
                found.add(prefix + name)
            return read(self, name)

        return getattribute

    with monkeypatch.context() as patch:
        for prefix, model in sections():
            patch.setattr(model, "__getattribute__", watch(prefix, model))
        yield found


def has_effect(config: RunConfig, key: str) -> bool:
    """What the table says."""
    return all(row.when(config) for row in EFFECTS if row.covers(key))


RUNS = {
    "sampled": ["train.optimizer=sgd", "train.schedule=step", "train.patience=5", "model.norm=batch"],
    "hop by hop": ["sampler.mode=hop", "model.kind=gat", "model.hidden=8", "train.warmup_steps=1"],
    "rolling": ["plan.mode=rolling", "model.residual=true", "model.kind=gin"],
    "in memory": ["feed=memory", "model.kind=gcnii", "evaluate.mode=exact"],
    "chunked": ["mode=chunked", "chunked.chunks=4", "model.kind=resgcn", "train.optimizer=rmsprop"],
    "chunked, disk": [
        *("mode=chunked", "chunked.chunks=4", "model.kind=gcnii", "chunked.push=ema", "chunked.gradient_mode=mix"),
        *("chunked.history_storage=disk", "chunked.stages=2", "chunked.partition=random", "evaluate.mode=none"),
    ],
}


@pytest.fixture(scope="module")
def reads(
    tiny_graph: GraphStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[RunConfig, set[str]]]]:
    """Of every run its configuration and the keys that it read."""
    found, folder = {}, tmp_path_factory.mktemp("effects")
    for number, (name, overrides) in enumerate(RUNS.items()):
        flags = {"dataset": tiny_graph.path, "run_dir": folder / str(number)}
        config = load_config(None, [*SMALL, *overrides], flags)
        with pytest.MonkeyPatch.context() as patch, recorded(patch) as read:
            train(config)
        found[name] = config, read
    yield found


@pytest.mark.parametrize("name", RUNS)
def test_what_the_table_lets_through_is_read(reads: dict[str, tuple[RunConfig, set[str]]], name: str) -> None:
    """A key without effect that no row of the table refuses would be ignored without a word."""
    config, read = reads[name]
    ignored = {
        key
        for key in schema()
        if has_effect(config, key) and key not in read and not {key, key.partition(".")[0] + "."} & set(ELSEWHERE)
    }
    assert not ignored


def test_every_row_refuses_its_keys_by_name() -> None:
    """Where a row does not hold, any other value than the default is refused; also the default, if it is given."""
    for name, overrides in RUNS.items():
        config = load_config(None, overrides, NEEDED)
        for key in schema():
            if has_effect(config, key) or key in ("dataset", "run_dir", "mode", "sampler.num_neighbors"):
                continue
            section, _, last = key.rpartition(".")
            value = getattr(getattr(config, section) if section else config, last)
            with pytest.raises(ValueError, match=".") as error:
                load_config(
                    None, overrides, {**NEEDED, key: "/stage" if value is None and "dir" in key else value or 1}
                )
            assert key in str(error.value) or last in str(error.value), (name, key, str(error.value))


def test_random_configurations_are_refused_by_name_or_have_an_effect() -> None:
    """Two hundred of each mode, one to three keys drawn from the schema: none is dropped on the way."""
    rng, accepted, refused = random.Random(11), 0, 0
    keys = [key for key in schema() if key not in ("mode", "dataset", "run_dir", "remote.dataset", "remote.run_dir")]
    for mode in ("sampled", "chunked"):
        for _ in range(200):
            given = {key: other_value(schema()[key], rng) for key in rng.sample(keys, rng.randint(1, 3))}
            given = {key: value for key, value in given.items() if value is not None}
            try:
                config = load_config(None, [], {**NEEDED, "mode": mode, **given})
            except ValueError as error:
                assert any(key.rpartition(".")[2] in str(error) for key in given), (given, str(error))
                refused += 1
                continue
            accepted += 1
            for key, value in given.items():
                assert has_effect(config, key), (mode, key)
                section, _, last = key.rpartition(".")
                assert getattr(getattr(config, section) if section else config, last) == value, (mode, key)
    assert accepted > 50 and refused > 50
