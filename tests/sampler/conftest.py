"""Small graph stores, made by hand so that every entry of the adjacency is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.storage.graph import GraphMeta, GraphStore, graph_manifest, id_dtype, open_graph
from penstock.storage.manifest import write_manifest
from penstock.storage.npyfile import write_npy


def write_graph(
    path: Path,
    num_nodes: int,
    edges: NDArray[np.int64],
    *,
    weights: NDArray[np.float32] | None = None,
    train: NDArray[Any] | None = None,
    wide_ids: bool = False,
    labels: NDArray[Any] | None = None,
) -> GraphStore:
    """Store a graph of `edges` int64 [E, 2] (source, destination), in any order, duplicates kept."""
    path.mkdir(parents=True)
    order = np.lexsort((edges[:, 0], edges[:, 1]))
    dtype = np.dtype(np.int64) if wide_ids else id_dtype(num_nodes)
    indptr = np.cumsum([0, *np.bincount(edges[:, 1], minlength=num_nodes)]).astype(np.int64)
    arrays: dict[str, NDArray[Any]] = {
        "indptr": indptr,
        "indices": edges[order, 0].astype(dtype),
        "features": np.zeros((num_nodes, 1), np.float32),
        "labels": np.arange(num_nodes) % 3 - 1 if labels is None else labels,
        "train_ids": np.arange(num_nodes, dtype=dtype) if train is None else train.astype(dtype),
        "valid_ids": np.arange(0, num_nodes, 2, dtype=dtype),
        "test_ids": np.zeros(0, dtype),
    }
    if weights is not None:
        arrays["edge_weights"] = weights[order]
    meta = GraphMeta(
        num_nodes=num_nodes,
        num_edges=len(edges),
        num_features=1,
        feature_dtype="float32",
        num_classes=3,
        multi_label=labels is not None and labels.ndim == 2,
        has_edge_weights=weights is not None,
        original_ids="dense",
        source="test",
    )
    files = tuple(write_npy(path / f"{name}.npy", array) for name, array in arrays.items())
    write_manifest(path, graph_manifest(meta, files))
    return open_graph(path)


@pytest.fixture(scope="session")
def make_graph(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., GraphStore]:
    """`write_graph` into a fresh folder."""

    def make(num_nodes: int, edges: Any, **options: Any) -> GraphStore:
        array = np.asarray(edges, np.int64).reshape(-1, 2)
        return write_graph(tmp_path_factory.mktemp("graph") / "g", num_nodes, array, **options)

    return make


@pytest.fixture(scope="session")
def hub_graph(make_graph: Callable[..., GraphStore]) -> GraphStore:
    """300 nodes, weighted, some weights zero; ten hubs of in-degree over 100, thirty nodes without in-edges."""
    rng = np.random.default_rng(5)
    hubs = np.stack([rng.integers(0, 300, 1500), rng.integers(0, 10, 1500)], axis=1)
    others = np.stack([rng.integers(0, 300, 2500), rng.integers(0, 270, 2500)], axis=1)
    edges = np.unique(np.concatenate([hubs, others]), axis=0)
    weights = (rng.random(len(edges)) * (rng.random(len(edges)) > 0.2)).astype(np.float32)
    return make_graph(300, edges, weights=weights)
