"""Real graphs, from Parquet to the test accuracy. `benchmarks/accuracy.py` does the same with more seeds."""

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.benchmarks.accuracy import CASES, ingest_case, train_case


@pytest.mark.slow
def test_cora(data_folder: Path, tmp_path: Path) -> None:
    case = CASES["cora"]
    graph = ingest_case(case, data_folder, tmp_path)
    assert (graph.num_nodes, graph.num_edges) == (2708, 10556)
    accuracies = [train_case(graph, case, seed, tmp_path / str(seed))["test_accuracy"] for seed in range(3)]
    assert statistics.mean(accuracies) >= case.target, accuracies


@pytest.mark.slow
def test_facebook(data_folder: Path, tmp_path: Path) -> None:
    case = CASES["facebook"]
    case = replace(case, train=case.train.model_copy(update={"epochs": 6}))
    graph = ingest_case(case, data_folder, tmp_path)
    assert (graph.num_nodes, graph.num_edges) == (22470, 341646)
    found = train_case(graph, case, 0, tmp_path / "0")
    assert found["test_accuracy"] >= case.target, found
