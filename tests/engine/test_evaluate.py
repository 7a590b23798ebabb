from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from penstock.engine.evaluate import evaluate_exact, evaluate_feed, score_table
from penstock.engine.exact import exact_embeddings
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.models import ModelConfig, build_model
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.budget import MIB
from penstock.storage.graph import SPLITS, GraphStore, Split, open_graph
from penstock.storage.ingest import IngestOptions, ingest_npy


@pytest.fixture
def model(tiny_graph: GraphStore) -> nn.Module:
    torch.manual_seed(2)
    config = ModelConfig(kind="gcn", num_layers=2, hidden=16)
    return build_model(config, tiny_graph.meta.num_features, tiny_graph.meta.num_classes)


@pytest.mark.parametrize("split", SPLITS)
def test_all_neighbours_sampled_equal_exact(
    split: Split, model: nn.Module, tiny_graph: GraphStore, tmp_path: Path
) -> None:
    config = SampleConfig(fanouts=(-1, -1), batch_size=17, degrees=True)
    trace = sample_trace(
        tiny_graph, tmp_path / "trace", config, split=split, shuffle=False, host_memory=64 * MIB, threads=1
    )
    with open_memory_feed(tiny_graph, trace, start_step=0, stop_step=trace.meta.num_items) as feed:
        sampled = evaluate_feed(model, feed, tiny_graph.meta.num_classes)
    exact = evaluate_exact(model, tiny_graph, [split], tmp_path / "exact", host_memory=64 * MIB, threads=1)[split]
    assert sampled.num_nodes == exact.num_nodes == len(tiny_graph.split_ids(split))
    assert sampled.accuracy == exact.accuracy and sampled.macro_f1 == exact.macro_f1
    assert sampled.loss == pytest.approx(exact.loss, rel=1e-5)


def test_accuracy_is_what_numpy_counts(model: nn.Module, tiny_graph: GraphStore, tmp_path: Path) -> None:
    table = exact_embeddings(model, tiny_graph, tmp_path, host_memory=64 * MIB, threads=1)
    ids = tiny_graph.split_ids("test")
    right = table.open()[ids].argmax(axis=1) == tiny_graph.labels[ids]
    assert score_table(table, tiny_graph, "test").accuracy == pytest.approx(right.mean())


def test_mode_is_restored_and_dropout_is_off(model: nn.Module, tiny_graph: GraphStore, tmp_path: Path) -> None:
    model.train()
    found = [
        evaluate_exact(model, tiny_graph, ["valid", "test"], tmp_path / str(n), host_memory=64 * MIB, threads=1)
        for n in range(2)
    ]
    assert found[0] == found[1] and set(found[0]) == {"valid", "test"} and model.training


def test_multi_label(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "arrays"
    source.mkdir()
    np.save(source / "features.npy", rng.standard_normal((60, 6)).astype(np.float32))
    np.save(source / "labels.npy", rng.integers(0, 2, (60, 3)).astype(np.uint8))
    np.save(source / "edge_index.npy", rng.integers(0, 60, (2, 300)))
    np.save(source / "test_ids.npy", np.arange(20, 50))
    ingest_npy(source, tmp_path / "graph", IngestOptions(), host_memory=64 * MIB)
    graph = open_graph(tmp_path / "graph")
    torch.manual_seed(0)
    model = build_model(ModelConfig(num_layers=1), 6, 3)
    table = exact_embeddings(model, graph, tmp_path / "exact", host_memory=64 * MIB, threads=1)
    found = score_table(table, graph, "test")
    expected, labels = table.open()[20:50] > 0, graph.labels[20:50] > 0
    assert found.num_nodes == 30
    assert found.accuracy == pytest.approx((expected == labels).all(axis=1).mean())
    hits = (expected & labels).sum()
    assert found.micro_f1 == pytest.approx(2 * hits / (expected.sum() + labels.sum()))
