from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from penstock.engine.exact import exact_embeddings
from penstock.engine.infer import infer_feed_to_parquet, infer_to_parquet
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.modelfile import load_model, save_model
from penstock.engine.models import ModelConfig, build_model
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.budget import MIB
from penstock.storage.errors import FormatError
from penstock.storage.graph import GraphStore
from penstock.storage.ingest import IngestOptions, ingest_parquet

CONFIG = ModelConfig(kind="sage", num_layers=2, hidden=16, norm="batch")


@pytest.fixture
def model(tiny_graph: GraphStore) -> nn.Module:
    torch.manual_seed(2)
    return build_model(CONFIG, tiny_graph.meta.num_features, tiny_graph.meta.num_classes).eval()


def _column(table: pa.Table, name: str) -> np.ndarray[Any, Any]:
    return np.array(table.column(name).to_pylist())


def test_all_nodes(model: nn.Module, tiny_graph: GraphStore, tmp_path: Path) -> None:
    out = tmp_path / "out" / "nodes.parquet"
    assert infer_to_parquet(model, tiny_graph, out, tmp_path / "s", host_memory=64 * MIB, threads=1) == 400
    table = pq.read_table(out)
    assert table.column_names == ["id", "embedding", "logits", "prediction"]
    expected = {n: exact_embeddings(model, tiny_graph, tmp_path / str(n), host_memory=64 * MIB, threads=1, num_layers=n)
                for n in (1, 2)}  # fmt: skip
    assert _column(table, "id").tolist() == list(range(400))
    assert np.array_equal(_column(table, "embedding"), expected[1].open())
    assert np.array_equal(_column(table, "logits"), expected[2].open())
    assert np.array_equal(_column(table, "prediction"), expected[2].open().argmax(axis=1))


def test_some_nodes_and_another_layer(model: nn.Module, tiny_graph: GraphStore, tmp_path: Path) -> None:
    memory = {"host_memory": 64 * MIB, "threads": 1}
    whole, part = tmp_path / "whole.parquet", tmp_path / "part.parquet"
    infer_to_parquet(model, tiny_graph, whole, tmp_path / "s", **memory)  # type: ignore[arg-type]
    nodes = np.array([5, 17, 300])
    assert infer_to_parquet(model, tiny_graph, part, tmp_path / "s", nodes=nodes, embedding_layer=2, **memory) == 3  # type: ignore[arg-type]
    found, all_nodes = pq.read_table(part), pq.read_table(whole)
    assert _column(found, "id").tolist() == nodes.tolist()
    np.testing.assert_allclose(_column(found, "logits"), _column(all_nodes, "logits")[nodes], rtol=1e-4, atol=1e-5)
    assert np.array_equal(_column(found, "embedding"), _column(found, "logits"))
    with pytest.raises(ValueError, match=r"embedding_layer=3.*1\.\.2"):
        infer_to_parquet(model, tiny_graph, part, tmp_path / "s", embedding_layer=3, **memory)  # type: ignore[arg-type]


def test_from_a_feed(model: nn.Module, tiny_graph: GraphStore, tmp_path: Path) -> None:
    config = SampleConfig(fanouts=(-1, -1), batch_size=33)
    options = {"split": "test", "shuffle": False, "host_memory": 64 * MIB, "threads": 1}
    trace = sample_trace(tiny_graph, tmp_path / "trace", config, **options)  # type: ignore[arg-type]
    ids = tiny_graph.split_ids("test")
    exact, sampled = tmp_path / "exact.parquet", tmp_path / "sampled.parquet"
    infer_to_parquet(model, tiny_graph, exact, tmp_path / "s", host_memory=64 * MIB, threads=1, nodes=ids)
    with open_memory_feed(tiny_graph, trace, start_step=0, stop_step=trace.meta.num_items) as feed:
        assert infer_feed_to_parquet(model, tiny_graph, sampled, feed) == len(ids)
    one, other = pq.read_table(exact), pq.read_table(sampled)
    assert _column(one, "id").tolist() == _column(other, "id").tolist() == ids.tolist()
    for name in ("embedding", "logits"):  # with all neighbours both are the same, but for the order of rounding
        np.testing.assert_allclose(_column(one, name), _column(other, name), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no items"):
        infer_feed_to_parquet(model, tiny_graph, sampled, [])


def test_original_string_ids(tmp_path: Path) -> None:
    names = [f"user-{n}" for n in range(30)]
    rng = np.random.default_rng(0)
    features = pa.FixedSizeListArray.from_arrays(pa.array(rng.random(30 * 4, np.float32)), 4)
    nodes = pa.table({"id": names, "feature": features, "label": rng.integers(0, 3, 30), "split": ["train"] * 30})
    edges = pa.table({"src": rng.choice(names, 90), "dst": rng.choice(names, 90)})
    pq.write_table(nodes, tmp_path / "nodes.parquet")
    pq.write_table(edges, tmp_path / "edges.parquet")
    graph = ingest_parquet(
        tmp_path / "nodes.parquet", tmp_path / "edges.parquet", tmp_path / "g", IngestOptions(), host_memory=64 * MIB
    )
    model = build_model(CONFIG, 4, graph.meta.num_classes)
    infer_to_parquet(model, graph, tmp_path / "out.parquet", tmp_path / "s", host_memory=64 * MIB, threads=1)
    assert sorted(_column(pq.read_table(tmp_path / "out.parquet"), "id").tolist()) == sorted(names)


def test_model_folder_round_trip(model: nn.Module, tiny_graph: GraphStore, tmp_path: Path) -> None:
    save_model(
        tmp_path,
        model,
        CONFIG,
        num_features=20,
        num_classes=4,
        fanouts=(3, -1),
        extra={"graph": tiny_graph.fingerprint},
    )
    loaded = load_model(tmp_path)
    assert (loaded.config, loaded.num_features, loaded.num_classes, loaded.fanouts) == (CONFIG, 20, 4, (3, -1))
    assert loaded.extra == {"graph": tiny_graph.fingerprint} and not loaded.model.training
    assert all(torch.equal(value, loaded.model.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("damage", ["weights", "config", "missing", "other"])
def test_damaged_model_folder(damage: str, model: nn.Module, tmp_path: Path) -> None:
    save_model(tmp_path, model, CONFIG, num_features=20, num_classes=4, fanouts=(3, 3))
    if damage == "weights":
        (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    elif damage == "config":
        path = tmp_path / "model.json"
        path.write_text(path.read_text().replace('"hidden": 16', '"hidden": 17'))
    elif damage == "missing":
        (tmp_path / "model.json").unlink()
    else:
        (tmp_path / "model.json").write_text('{"format": "penstock/graph"}')
    with pytest.raises(FormatError):
        load_model(tmp_path)


@pytest.mark.parametrize(("kind", "width"), [("sage", 16), ("gcnii", 16), ("dagnn", 5)])
def test_embeddings_are_a_layers_own_rows(kind: Any, width: int, tiny_graph: GraphStore, tmp_path: Path) -> None:
    """Not the initial rows that deep models carry along; DAGNN's rows are scores and their gate."""
    model = build_model(ModelConfig(kind=kind, num_layers=3, hidden=16), 20, 4).eval()
    memory: dict[str, Any] = {"host_memory": 64 * MIB, "threads": 1}
    infer_to_parquet(model, tiny_graph, tmp_path / "out.parquet", tmp_path / "s", **memory)
    found = _column(pq.read_table(tmp_path / "out.parquet"), "embedding")
    assert found.shape == (tiny_graph.num_nodes, width)
    table = exact_embeddings(model, tiny_graph, tmp_path / "t", num_layers=2, **memory)
    np.testing.assert_array_equal(found, table.open()[:, :width])
    for layer in (0, -1, 4):
        with pytest.raises(ValueError, match=f"embedding_layer={layer} is not among"):
            infer_to_parquet(model, tiny_graph, tmp_path / "no", tmp_path / "s", embedding_layer=layer, **memory)
