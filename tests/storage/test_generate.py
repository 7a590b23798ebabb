"""Synthetic graphs: what is planted, that bytes depend on the config alone, and that memory does not grow."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from penstock.kernels.synthetic import scatter, scatter_keys, unscatter
from penstock.storage.errors import DoesNotFit
from penstock.storage.generate import GenerateConfig, generate_graph, smallest_degree
from penstock.storage.graph import GraphStore


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    config = GenerateConfig(num_nodes=20_000, num_features=32, train=0.5, valid=0.1, test=0.4, seed=1)
    return generate_graph(tmp_path_factory.mktemp("planted") / "graph", config, host_memory=32 << 20)


def _probe(features: NDArray[np.float32], graph: GraphStore) -> float:
    """Test accuracy of a logistic regression."""
    torch.manual_seed(0)
    x, y = torch.from_numpy(features), torch.from_numpy(graph.labels[:].copy())
    x = (x - x.mean(0)) / x.std(0)
    train, test = (torch.from_numpy(graph.split_ids(split).astype(np.int64)) for split in ("train", "test"))
    model = torch.nn.Linear(x.shape[1], graph.meta.num_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=1e-4)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[train]), y[train]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float((model(x[test]).argmax(1) == y[test]).float().mean())


def test_labels_are_learned_from_neighbours_only(planted: GraphStore) -> None:
    own = np.array(planted.features)
    totals = np.add.reduceat(own[planted.indices], planted.indptr[:-1], axis=0)
    means = (totals / np.diff(planted.indptr)[:, None]).astype(np.float32)
    chance = 1 / planted.meta.num_classes
    assert _probe(own, planted) < chance + 0.03
    assert _probe(means, planted) > 0.9


def test_the_graph_is_simple_and_sorted(planted: GraphStore) -> None:
    planted.validate()
    indptr, indices = planted.indptr[:], planted.indices[:]
    assert indices.dtype == np.int32 and indices.min() >= 0 and indices.max() < planted.num_nodes
    dst = np.repeat(np.arange(planted.num_nodes), np.diff(indptr))
    assert (dst != indices).all()
    same = dst[1:] == dst[:-1]
    assert (indices[1:][same] > indices[:-1][same]).all()


def test_degrees_follow_a_power_law(planted: GraphStore) -> None:
    ins, outs = np.diff(planted.indptr), np.bincount(planted.indices, minlength=planted.num_nodes)
    assert abs(ins.mean() - 16) < 1
    for degrees in (ins, outs):
        # exponent 2.5: four times the degree, an eighth of the nodes beyond it
        ratio = (degrees >= 32).sum() / (degrees >= 128).sum()
        assert 4 < ratio < 20
    # hubs are not neighbours in the id space: the halves have about as many
    hubs = np.argsort(-outs)[:200]
    assert 70 < (hubs < planted.num_nodes // 2).sum() < 130


@pytest.mark.parametrize("num_nodes", [8, 9, 63, 64, 65, 1000, 4097])
def test_scattering_is_a_bijection(num_nodes: int) -> None:
    keys = np.empty(6, np.uint64)
    scatter_keys(np.uint64(5), num_nodes, keys)
    ids = [scatter(rank, num_nodes, keys) for rank in range(num_nodes)]
    assert sorted(ids) == list(range(num_nodes))
    assert [unscatter(node, num_nodes, keys) for node in ids] == list(range(num_nodes))
    assert num_nodes < 1000 or np.corrcoef(ids, np.arange(num_nodes))[0, 1] < 0.2


def test_scattering_works_beyond_32_bits() -> None:
    num_nodes, keys = 2**33 + 7, np.empty(6, np.uint64)
    scatter_keys(np.uint64(5), num_nodes, keys)
    ranks = [0, 1, 2**31, 2**32 + 1, num_nodes - 1]
    ids = [scatter(rank, num_nodes, keys) for rank in ranks]
    assert max(ids) > 2**31 and all(0 <= node < num_nodes for node in ids)
    assert [unscatter(node, num_nodes, keys) for node in ids] == ranks


def test_splits_have_the_fractions_asked_for(planted: GraphStore) -> None:
    ids = [planted.split_ids(split) for split in ("train", "valid", "test")]
    assert [round(len(part) / planted.num_nodes, 1) for part in ids] == [0.5, 0.1, 0.4]
    merged = np.concatenate(ids)
    assert len(np.unique(merged)) == len(merged) == planted.num_nodes
    assert all((np.diff(part) > 0).all() for part in ids)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_budget_does_not_change_the_bytes(
    tmp_path: Path, dtype: str, folder_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    config = GenerateConfig(num_nodes=30_000, num_features=33, seed=4, feature_dtype=dtype)  # type: ignore[arg-type]
    for memory in (5, 64):
        generate_graph(tmp_path / str(memory), config, host_memory=memory << 20)
    assert folder_bytes(tmp_path / "5") == folder_bytes(tmp_path / "64")


def test_another_seed_is_another_graph(tmp_path: Path) -> None:
    stores = [
        generate_graph(tmp_path / str(seed), GenerateConfig(num_nodes=500, seed=seed), host_memory=32 << 20)
        for seed in (1, 2)
    ]
    assert stores[0].fingerprint != stores[1].fingerprint
    assert (stores[0].labels[:] != stores[1].labels[:]).any()


def test_a_complete_graph_is_returned_and_another_refused(tmp_path: Path) -> None:
    config = GenerateConfig(num_nodes=100)
    first = generate_graph(tmp_path / "g", config, host_memory=32 << 20)
    assert generate_graph(tmp_path / "g", config, host_memory=64 << 20).fingerprint == first.fingerprint
    with pytest.raises(ValueError, match=r"config.num_nodes \(100 there, 101 asked\)"):
        generate_graph(tmp_path / "g", GenerateConfig(num_nodes=101), host_memory=32 << 20)


@pytest.mark.parametrize("average", [1.0, 7.5, 40.0])
def test_the_smallest_degree_gives_the_mean(average: float) -> None:
    smallest, largest = smallest_degree(average, 2.5, 1000), 1000
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    assert abs(np.minimum(smallest * u ** (-1 / 1.5), largest).astype(np.int64).mean() - average) < 0.01


@pytest.mark.parametrize(
    "config",
    [
        {"train": 0.9, "test": 0.2},
        {"num_nodes": 20, "num_classes": 8},
        {"num_nodes": 40, "avg_degree": 15},
        {"nodes": 5},
    ],
)
def test_impossible_configs_are_refused(config: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        GenerateConfig(**config)  # type: ignore[arg-type]


def test_a_tiny_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"use --host-memory \d+ or more"):
        generate_graph(tmp_path / "g", GenerateConfig(), host_memory=1 << 20)
    assert not (tmp_path / "g" / "manifest.json").exists()


def test_dense_small_graphs_end(tmp_path: Path) -> None:
    # nodes with half of all nodes as sources: popularity runs out of distinct ones, uniform draws fill up
    config = GenerateConfig(num_nodes=64, avg_degree=14, num_classes=2, homophily=0.9)
    store = generate_graph(tmp_path / "g", config, host_memory=32 << 20)
    assert np.diff(store.indptr).max() == 32


_CHILD = """
import sys
from pathlib import Path
from penstock.storage.budget import peak_rss_bytes, reset_peak_rss
from penstock.storage.generate import GenerateConfig, generate_graph
out = Path(sys.argv[1])
generate_graph(out / "warm", GenerateConfig(num_nodes=1000, num_features=4), host_memory=16 << 20)
reset_peak_rss()
config = GenerateConfig(num_nodes=int(sys.argv[2]), num_features=4, avg_degree=4)
generate_graph(out / "graph", config, host_memory=16 << 20)
print(peak_rss_bytes())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_graph(tmp_path: Path) -> None:
    peaks = []
    for num_nodes in (100_000, 4_000_000):
        command = [sys.executable, "-c", _CHILD, str(tmp_path / str(num_nodes)), str(num_nodes)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    # the larger graph has 190 MB
    assert peaks[1] - peaks[0] < 25 << 20


@pytest.mark.parametrize(
    ("given", "remedy", "then"),
    [
        ({"num_nodes": 20}, "num_classes=5 or fewer", {"num_classes": 5, "avg_degree": 5}),
        ({"num_nodes": 50}, "use a smaller avg_degree, or more nodes", {"avg_degree": 12.5}),
    ],
)
def test_graphs_that_are_too_small_are_refused_with_what_helps(
    given: dict[str, Any], remedy: str, then: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=remedy):
        GenerateConfig(**given)
    assert GenerateConfig(**given, **then).num_nodes == given["num_nodes"]
