"""Weights that stores of earlier releases may hold: refused by name, or drawn alike by every method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.errors import DataError
from penstock.storage.graph import GraphStore

MakeGraph = Callable[..., GraphStore]
METHODS: list[dict[str, Any]] = [
    {"fanouts": (2,)},
    {"fanouts": (2,), "replace": True},
    {"fanouts": (-1,)},
    {"fanouts": (2,), "method": "labor"},
]


def star(make_graph: MakeGraph, weights: list[float]) -> GraphStore:
    """Edges n -> 0 for n = 1, 2, ... of these weights; seeds are all nodes."""
    edges = np.array([[n + 1, 0] for n in range(len(weights))])
    return make_graph(len(weights) + 1, edges, weights=np.array(weights, np.float32))


def sampled(graph: GraphStore, out: Path, epochs: int = 1, **options: Any) -> set[int]:
    """Which neighbours of node 0 were ever drawn."""
    config = SampleConfig(**{"batch_size": graph.num_nodes, "weighted": True, **options})
    trace = sample_trace(graph, out, config, num_epochs=epochs, host_memory=64 << 20, threads=1)
    return {int(node) for item in trace.items() for node in item.input_ids[item.blocks[0].indices]}


@pytest.mark.parametrize("mode", ["item", "hop"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weight", [-2.0, float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_cannot_be_drawn_by_is_refused_with_its_edge(
    make_graph: MakeGraph, tmp_path: Path, method: dict[str, Any], weight: float, mode: str
) -> None:
    graph = star(make_graph, [1.0, 1.0, weight, 1.0])
    with pytest.raises(DataError, match=rf"from node 3 to node 0 \(position 2 .*weight {weight:g}; .*weighted=false"):
        sampled(graph, tmp_path / "trace", mode=mode, **method)
    assert not (tmp_path / "trace" / "window-000000.json").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_drawn_weight_that_is_not_finite_never_reaches_a_trainer(
    make_graph: MakeGraph, tmp_path: Path, method: dict[str, Any]
) -> None:
    graph = star(make_graph, [float("nan")] * 3)
    with pytest.raises(DataError, match="to node 0 .*weight nan"):
        sampled(graph, tmp_path / "trace", weighted=False, **method)


def test_the_remedy_of_a_negative_weight_works(make_graph: MakeGraph, tmp_path: Path) -> None:
    graph = star(make_graph, [1.0, -1.0])
    assert sampled(graph, tmp_path / "trace", weighted=False, fanouts=(2,)) == {1, 2}


@pytest.mark.parametrize("mode", ["item", "hop"])
@pytest.mark.parametrize("method", METHODS)
def test_edges_of_weight_zero_are_drawn_by_no_method(
    make_graph: MakeGraph, tmp_path: Path, method: dict[str, Any], mode: str
) -> None:
    tiny, large = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    weights = {"some": [0.0, 1.0, 0.0, 2.0, -0.0], "none": [0.0, 0.0], "extreme": [0.0, tiny, large, large, 0.0]}
    drawn = {
        name: sampled(star(make_graph, found), tmp_path / name, epochs=30, mode=mode, **method)
        for name, found in weights.items()
    }
    assert drawn["some"] == {2, 4} and drawn["none"] == set()
    assert {3, 4} <= drawn["extreme"] <= {2, 3, 4}
