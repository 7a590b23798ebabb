"""What is trained on draws by weight is what is evaluated and inferred: the weighted mean."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import penstock
from penstock.engine.layers import SAGEConv
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.minibatch import Block
from penstock.engine.modelfile import save_model
from penstock.engine.models import ModelConfig, build_model
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.budget import MIB
from penstock.storage.errors import DataError
from penstock.storage.graph import GraphStore

NODES = 600


@pytest.fixture(scope="module")
def graph(make_graph: Callable[..., GraphStore]) -> GraphStore:
    """A node's class is the sign of its one heavy in-neighbour; nine light ones are noise, one has no weight at all."""
    rng = np.random.default_rng(0)
    sign = rng.choice([-1.0, 1.0], NODES).astype(np.float32)
    sources = np.argsort(rng.random((NODES, NODES)), axis=1)[:, :11]
    edges = np.stack([sources.reshape(-1), np.repeat(np.arange(NODES), 11)], axis=1)
    weights = np.tile(np.array([1000, *[1] * 9, 0], np.float32), NODES)
    features = np.stack([sign, *np.ones((3, NODES), np.float32)], axis=1)
    labels = (sign[sources[:, 0]] > 0).astype(np.int64)
    return make_graph(NODES, edges, weights=weights, features=features, labels=labels, train=np.arange(1, NODES, 2))


def configure(graph: GraphStore, run_dir: Path, **options: Any) -> penstock.RunConfig:
    flags = {
        "dataset": graph.path,
        "run_dir": run_dir,
        "budgets.host_memory": "256MiB",
        "sampler.fanouts": (3,),
        "sampler.batch_size": 64,
        "train.epochs": 15,
        "train.lr": 0.05,
    }
    return penstock.load_config(flags={**flags, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"sampler.weighted": True},
        {"sampler.weighted": True, "sampler.replace": True, "evaluate.mode": "exact"},
        {"sampler.weighted": True, "sampler.method": "labor", "model.edge_weights": True},
        {"model.edge_weights": True, "sampler.fanouts": (-1,)},
    ],
    ids=["weighted", "replace", "labor", "all"],
)
def test_trained_and_inferred_accuracy_agree(options: dict[str, Any], graph: GraphStore, tmp_path: Path) -> None:
    result = penstock.train(configure(graph, tmp_path / "run", **options))
    penstock.infer(tmp_path / "run", tmp_path / "out.parquet", split="valid", threads=1)
    table = pq.read_table(tmp_path / "out.parquet")
    inferred = (table["prediction"].to_numpy() == graph.labels[table["id"].to_numpy()]).mean()
    assert inferred > 0.97
    assert result["metrics"]["valid_accuracy"] == pytest.approx(inferred, abs=0.03)


@pytest.mark.parametrize("method", [{}, {"replace": True}, {"method": "labor"}], ids=["plain", "replace", "labor"])
def test_the_mean_over_many_epochs_is_the_weighted_mean(
    method: dict[str, Any], hub_graph: GraphStore, tmp_path: Path
) -> None:
    """Through sampler, trace, feed and layer: within five standard errors of the exact value at every node."""
    x = torch.randn(hub_graph.num_nodes, 2, generator=torch.Generator().manual_seed(1))
    layer = SAGEConv(2, 2, edge_weights=True)
    layer.neighbour.weight.data, layer.own.weight.data = torch.eye(2), torch.zeros(2, 2)
    layer.neighbour.bias.data.zero_()
    assert hub_graph.edge_weights is not None
    whole = Block(
        num_src=hub_graph.num_nodes,
        num_dst=hub_graph.num_nodes,
        indptr=torch.from_numpy(hub_graph.indptr.astype(np.int32)),
        indices=torch.from_numpy(np.array(hub_graph.indices)),
        edge_weights=torch.from_numpy(np.array(hub_graph.edge_weights)),
    )
    config = SampleConfig(fanouts=(3,), batch_size=300, weighted=True, **method)
    trace = sample_trace(hub_graph, tmp_path / "t", config, num_epochs=300, host_memory=64 * MIB, threads=1)
    found: list[Tensor] = []
    with torch.no_grad(), open_memory_feed(hub_graph, trace, start_step=0, stop_step=300) as feed:
        wanted = layer(whole, x)
        for batch in feed:
            rows = torch.empty(hub_graph.num_nodes, 2)
            rows[batch.seeds] = layer(batch.blocks[0], x[batch.input_ids.long()])
            found.append(rows)
    means, errors = torch.stack(found).mean(0), torch.stack(found).std(0) / 300**0.5
    # five errors of 1,200 numbers; few draws make skewed sums, so one in a hundred may be further out
    assert ((means - wanted).abs() > 5 * errors + 1e-4).float().mean() < 0.01
    assert (means - wanted).abs().mean() < 2 * errors.mean()


@pytest.mark.parametrize(
    "options",
    [
        *({"model.kind": kind} for kind in ("gcn", "gin", "gat", "gcnii", "resgcn", "dagnn")),
        {"model.aggregator": "max"},
        {"model.edge_weights": False},
    ],
    ids=str,
)
def test_what_has_no_weighted_mean_refuses_draws_by_weight(
    options: dict[str, Any], graph: GraphStore, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"sampler\.weighted=true") as error:
        configure(graph, tmp_path, **{"sampler.weighted": True, **options})
    assert next(iter(options)) in str(error.value)
    configure(graph, tmp_path, **options)  # what the message says to do


@pytest.mark.parametrize("key", ["model.edge_weights", "sampler.weighted"])
def test_a_graph_without_weights_is_refused_before_work(
    key: str, tiny_graph: GraphStore, graph: GraphStore, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{key}.*has no edge weights"):
        penstock.train(configure(tiny_graph, tmp_path / "run", **{key: True}))
    assert not (tmp_path / "run").exists()


def test_inference_on_a_graph_without_weights_is_refused(tmp_path: Path, make_graph: Callable[..., Any]) -> None:
    plain = make_graph(5, [[0, 1], [1, 2]], features=np.ones((5, 4), np.float32))
    config = ModelConfig(num_layers=1, edge_weights=True)
    save_model(
        tmp_path / "run" / "model", build_model(config, 4, 3), config, num_features=4, num_classes=3, fanouts=(3,)
    )
    (tmp_path / "run" / "config.yaml").write_text(f"dataset: {plain.path}\n")
    with pytest.raises(DataError, match="has no edge weights"):
        penstock.infer(tmp_path / "run", tmp_path / "out.parquet")


def test_any_size_of_weight_has_a_mean() -> None:
    """Sums of weights that overflow float32, and weights whose reciprocal does."""
    x, layer = torch.tensor([[1.0], [2.0], [4.0]]), SAGEConv(1, 1, edge_weights=True)
    layer.neighbour.weight.data, layer.own.weight.data = torch.ones(1, 1), torch.zeros(1, 1)
    layer.neighbour.bias.data.zero_()
    for size in (3e38, 1.0, 1e-42):
        block = Block(
            num_src=3,
            num_dst=1,
            indptr=torch.tensor([0, 2], dtype=torch.int32),
            indices=torch.tensor([1, 2], dtype=torch.int32),
            edge_weights=torch.full((2,), size),
        )
        assert layer(block, x).item() == pytest.approx(3.0)
        assert layer.double()(block, x.double()).item() == pytest.approx(3.0)
        layer.float()
