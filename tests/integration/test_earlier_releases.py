"""Runs of an earlier release: what is of no use any more is refused or made again, and the remedies work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.config import load_config
from penstock.inference import infer
from penstock.inspection import describe
from penstock.run import open_run
from penstock.storage.errors import DataError, FormatError
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import read_json, write_json
from penstock.training import train


def _graph(make_graph: Callable[..., GraphStore], with_loops: bool) -> GraphStore:
    rng = np.random.default_rng(0)
    edges = rng.integers(0, 80, (300, 2))
    edges = edges[edges[:, 0] != edges[:, 1]]
    loops = np.repeat(np.arange(0, 80, 4), 2).reshape(-1, 2)
    return make_graph(
        80,
        np.concatenate([edges, loops]) if with_loops else edges,
        features=rng.standard_normal((80, 4)).astype(np.float32),
        labels=rng.integers(0, 3, 80),
        train=np.arange(40),
    )


def _age(run: Path) -> None:
    """Take out of a run what the releases before checksums, identities and self-loops did not write."""

    def without(path: Path, *keys: str, **others: Any) -> None:
        write_json(path, {k: v for k, v in read_json(path).items() if k not in keys} | others)

    without(run / "model" / "model.json", "outputs")
    without(run / "result.json", "identity", "graph")
    for path in [*run.rglob("packset.json"), *run.rglob("packs/manifest.json")]:
        without(path, version=1)
    for path in run.rglob("made-of.json"):
        path.unlink()


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("gcnii", "resgcn", "dagnn")]


@pytest.mark.parametrize("kind", ["gcn", *SLOW])
def test_a_model_that_counted_self_loops_twice_is_not_taken_for_one_that_counts_them_once(
    make_graph: Callable[..., GraphStore], tmp_path: Path, kind: str
) -> None:
    graph = _graph(make_graph, with_loops=True)
    shape = {"sampler.fanouts": (3, 3), "sampler.batch_size": 20, "model.hidden": 8, "train.epochs": 1}
    config = load_config(flags={"dataset": graph.path, "run_dir": tmp_path / "run", "model.kind": kind, **shape})
    train(config)
    _age(config.run_dir)
    with pytest.raises(DataError, match="counted edges from a node to itself twice, which .* has; train again"):
        infer(config.run_dir, tmp_path / "out.parquet")
    infer(config.run_dir, tmp_path / "other.parquet", dataset=_graph(make_graph, with_loops=False).path)
    train(config, force=True)
    assert infer(config.run_dir, tmp_path / "out.parquet")["rows"] == 80


def test_an_old_run_is_described_refused_and_trained_again(
    make_graph: Callable[..., GraphStore], tmp_path: Path
) -> None:
    graph = _graph(make_graph, with_loops=True)
    shape = {"sampler.fanouts": (3, 3), "sampler.batch_size": 20, "model.hidden": 8, "train.epochs": 1}
    config = load_config(flags={"dataset": graph.path, "run_dir": tmp_path / "run", **shape})
    train(config)
    _age(config.run_dir)
    (config.run_dir / "exact").mkdir()
    np.save(config.run_dir / "exact" / "layer-1.npy", np.zeros(3))
    write_json(config.run_dir / "exact" / "layer-1.json", {"key": {}, "bytes": 152, "xxh3": "0"})
    found = describe(config.run_dir)
    assert found["status"] == "ok" and "version 1, this release reads [2]" in found["pack_sets"]["train/packs"]
    with pytest.raises(FormatError, match="has 3 parts that are damaged, or of another release:\n.*layer-1.npy is not"):
        describe(config.run_dir, validate=True)
    with pytest.raises(ValueError, match="another version wrote it; .*--force .*--if-changed"), open_run(config):
        pass
    assert infer(config.run_dir, tmp_path / "out.parquet")["rows"] == 80  # of SAGE, all releases say the same
    assert train(config, if_changed=True)["status"] == "ok"
    (config.run_dir / "exact" / "layer-1.json").unlink()
    assert describe(config.run_dir, validate=True)["validated"]
