"""A graph as Citeseer is: few binary features per node, rows that are made to sum to one, the GCN of its paper."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from penstock.config import load_config
from penstock.storage.graph import GraphStore
from penstock.storage.ingest import IngestOptions, ingest_pyg
from penstock.training import train

N, F, C, EPOCHS, SEEDS = 1200, 600, 6, 40, 4


def _citeseer_like() -> Any:
    """Words of a class are likelier in its documents, documents cite their class three times in four; a few have no
    words, some cite themselves."""
    pyg = pytest.importorskip("torch_geometric.data")
    rng = np.random.default_rng(0)
    classes = rng.integers(0, C, N)
    chance = np.where(np.arange(F) % C == classes[:, None], 0.07, 0.035) * rng.uniform(0.3, 2, (N, 1))
    dst = rng.integers(0, N, 2 * N)
    near = [rng.choice(np.flatnonzero(classes == classes[node])) for node in dst]
    src = np.where(rng.random(2 * N) < 0.75, near, rng.integers(0, N, 2 * N))
    own = np.stack([np.arange(0, N, 9)] * 2)
    pairs = np.unique(np.concatenate([np.stack([src, dst]), np.stack([dst, src]), own], axis=1), axis=1)
    words = (rng.random((N, F)) < chance).astype(np.float32)
    words[::97] = 0
    order = rng.permutation(N)
    masks = {
        name: np.isin(np.arange(N), order[lo:hi])
        for name, lo, hi in (("train", 0, 120), ("val", 120, 200), ("test", 400, N))
    }
    return pyg.Data(
        x=torch.from_numpy(words),
        y=torch.from_numpy(classes),
        edge_index=torch.from_numpy(pairs),
        train_mask=torch.from_numpy(masks["train"]),
        val_mask=torch.from_numpy(masks["val"]),
        test_mask=torch.from_numpy(masks["test"]),
    )


def _of_pyg(data: Any, seed: int) -> float:
    nn = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(seed)
    model = nn.GCN(F, 16, 2, C, dropout=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=5e-4)
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        out = model(data.x, data.edge_index)
        functional.cross_entropy(out[data.train_mask], data.y[data.train_mask]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    best: NDArray[np.int64] = model(data.x, data.edge_index).argmax(1).numpy()
    return float((best == data.y.numpy())[data.test_mask.numpy()].mean())


def _ours(graph: GraphStore, folder: Path, seed: int) -> float:
    flags: dict[str, Any] = {
        "dataset": graph.path,
        "run_dir": folder,
        "sampler.fanouts": (-1, -1),
        "sampler.seed": seed,
    }
    flags |= {"sampler.batch_size": 120, "model.kind": "gcn", "model.hidden": 16, "model.dropout": 0.5}
    flags |= {
        "train.epochs": EPOCHS,
        "train.lr": 0.05,
        "train.weight_decay": 5e-4,
        "train.seed": seed,
        "train.evaluate_every": EPOCHS,
    }
    flags |= {"evaluate.mode": "exact", "budgets.host_memory": "64MiB", "train.threads": 1, "feed": "memory"}
    metrics: dict[str, float] = train(load_config(flags=flags))["metrics"]
    return metrics["test_accuracy"]


@pytest.mark.slow
def test_gcn_on_rows_that_sum_to_one_equals_that_of_pyg(tmp_path: Path) -> None:
    transforms = pytest.importorskip("torch_geometric.transforms")
    data = _citeseer_like()
    graph = ingest_pyg(data, tmp_path / "g", IngestOptions(feature_norm="row"), host_memory=64 << 20)
    np.testing.assert_allclose(np.asarray(graph.features).sum(1), (data.x.sum(1) > 0).numpy(), rtol=1e-5)
    ours = [_ours(graph, tmp_path / str(seed), seed) for seed in range(SEEDS)]
    theirs = [_of_pyg(transforms.NormalizeFeatures()(data.clone()), seed) for seed in range(SEEDS)]
    spread = max(statistics.stdev(ours), statistics.stdev(theirs), 0.005)
    assert abs(statistics.mean(ours) - statistics.mean(theirs)) <= 2 * spread, (ours, theirs)
    assert statistics.mean(ours) > 2 / C, ours
