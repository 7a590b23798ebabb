"""What a model trained on one graph says of another: labels as they were given, features normalised alike."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from penstock.config import RunConfig, load_config
from penstock.inference import infer
from penstock.storage.errors import DataError
from penstock.storage.graph import GraphStore
from penstock.storage.ingest import IngestOptions, ingest_npy
from penstock.training import train

MEMORY = 64 << 20
N = 120


def _graph(folder: Path, seed: int, labels: bool = True, **options: Any) -> GraphStore:
    """Three classes that features tell apart, on a scale that only normalised features can be trained on."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, N)
    arrays: dict[str, Any] = {
        "features": (rng.normal(size=(N, 4)) * 0.2 + np.eye(3, 4)[classes]) * 1e4 + 1e5,
        "src": rng.integers(0, N, 300),
        "dst": rng.integers(0, N, 300),
    }
    if labels:
        arrays |= {"labels": np.array(["ant", "bee", "fly"])[classes], "train_ids": np.arange(60)}
        arrays["val_ids"] = np.arange(60, N)
    folder.mkdir()
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    np.save(folder / "notes.npy", classes)
    return ingest_npy(folder, folder / "g", IngestOptions(remap_labels=labels, **options), host_memory=MEMORY)


def _config(graph: Path, run_dir: Path) -> RunConfig:
    flags = {"dataset": graph, "run_dir": run_dir, "sampler.fanouts": (1, 5), "sampler.batch_size": 30}
    flags |= {"model.hidden": 16, "train.epochs": 12, "train.lr": 0.05, "budgets.host_memory": "64MiB"}
    return load_config(flags=flags | {"train.threads": 1, "evaluate.mode": "exact"})


def test_predictions_are_the_labels_that_were_given(tmp_path: Path) -> None:
    trained = _graph(tmp_path / "a", 0, feature_norm="standard")
    train(_config(trained.path, tmp_path / "run"))
    summary = infer(tmp_path / "run", tmp_path / "out.parquet", host_memory=MEMORY)
    column = pq.read_table(tmp_path / "out.parquet").column("prediction")
    truth = np.array(["ant", "bee", "fly"])[np.load(tmp_path / "a" / "notes.npy")]
    assert summary["rows"] == N and (np.array(column.to_pylist()) == truth).mean() > 0.9

    unlike = _graph(tmp_path / "b", 1, labels=False)
    with pytest.raises(
        DataError, match="feature_norm=none, the model was trained on feature_norm=standard; .*norm_from"
    ):
        infer(tmp_path / "run", tmp_path / "b.parquet", dataset=unlike.path, host_memory=MEMORY)
    own = _graph(tmp_path / "c", 1, labels=False, feature_norm="standard")
    with pytest.raises(DataError, match="feature_norm=standard with other constants; ingest it with"):
        infer(tmp_path / "run", tmp_path / "b.parquet", dataset=own.path, host_memory=MEMORY)
    alike = _graph(tmp_path / "d", 1, labels=False, feature_norm_from=trained.path)  # the remedy
    infer(tmp_path / "run", tmp_path / "d.parquet", dataset=alike.path, host_memory=MEMORY)
    found = np.array(pq.read_table(tmp_path / "d.parquet").column("prediction").to_pylist())
    truth = np.array(["ant", "bee", "fly"])[np.load(tmp_path / "d" / "notes.npy")]
    assert (found == truth).mean() > 0.9


@pytest.mark.parametrize("multi", [False, True])
def test_a_hidden_split_is_predicted_and_not_scored(tmp_path: Path, multi: bool) -> None:
    rng = np.random.default_rng(0)
    flags = (rng.random((N, 3)) < 0.5).astype(np.float64)
    labels: Any = flags if multi else flags.argmax(1).astype(np.float64)
    features = flags + 0.1 * rng.normal(size=(N, 3))
    labels[90:] = np.nan  # as where a competition keeps the answers
    arrays = {"features": features, "labels": labels, "src": rng.integers(0, N, 200), "dst": rng.integers(0, N, 200)}
    arrays |= {"train_ids": np.arange(60), "val_ids": np.arange(60, 90), "test_ids": np.arange(90, N)}
    for name, values in arrays.items():
        np.save(tmp_path / f"{name}.npy", values)
    graph = ingest_npy(tmp_path, tmp_path / "g", IngestOptions(), host_memory=MEMORY)
    metrics = train(_config(graph.path, tmp_path / "run"))["metrics"]
    assert metrics["valid_num_nodes"] == 30 and not [name for name in metrics if name.startswith("test_")]
    infer(tmp_path / "run", tmp_path / "out.parquet", split="test", host_memory=MEMORY)
    assert pq.read_table(tmp_path / "out.parquet").column("id").to_pylist() == list(range(90, N))
