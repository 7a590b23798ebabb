"""A table of one function is never taken for that of another."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from penstock.engine.exact import exact_embeddings
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.tablekey import function_digest
from penstock.storage.budget import MIB
from penstock.storage.graph import GraphStore

PAIRS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kind": "sage"}, {"kind": "sage", "aggregator": "max"}),
    ({"kind": "sage"}, {"kind": "sage", "edge_weights": True}),
    ({"kind": "sage"}, {"kind": "sage", "activation": "elu"}),
    ({"kind": "gcnii", "alpha": 0.1}, {"kind": "gcnii", "alpha": 0.5}),
    ({"kind": "gcnii", "theta": 0.5}, {"kind": "gcnii", "theta": 1.5}),
    ({"kind": "resgcn"}, {"kind": "resgcn", "activation": "elu"}),
]


def build(graph: GraphStore, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"num_layers": 2, "hidden": 16, **options})
    return build_model(config, graph.meta.num_features, graph.meta.num_classes).eval()


@pytest.fixture(scope="module")
def graph(make_graph: Callable[..., GraphStore]) -> GraphStore:
    rng = np.random.default_rng(0)
    edges = rng.integers(0, 50, (300, 2))
    features = rng.standard_normal((50, 6)).astype(np.float32)
    return make_graph(50, edges, features=features, weights=rng.random(300).astype(np.float32))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_table_of_another_function_is_not_used(pair: Any, graph: GraphStore, tmp_path: Path) -> None:
    first, second = (build(graph, options) for options in pair)
    second.load_state_dict(first.state_dict())
    memory: dict[str, Any] = {"host_memory": 64 * MIB, "threads": 1}
    exact_embeddings(first, graph, tmp_path / "one", **memory)
    found = np.array(exact_embeddings(second, graph, tmp_path / "one", **memory).open())
    wanted = np.array(exact_embeddings(second, graph, tmp_path / "two", **memory).open())
    np.testing.assert_array_equal(found, wanted)
    assert function_digest(first) != function_digest(second)


def test_other_graphs_budgets_and_weights_are_other_tables(graph: GraphStore, tmp_path: Path) -> None:
    model = build(graph, {"kind": "gcn"})

    def stamp(memory: int = 64 * MIB, targets: Any = None) -> int:
        exact_embeddings(model, graph, tmp_path, host_memory=memory, threads=1, targets=targets)
        return (tmp_path / "layer-2.npy").stat().st_mtime_ns

    first = stamp()
    assert stamp() == first
    assert first < (other := stamp(65 * MIB)) < (part := stamp(65 * MIB, np.arange(9)))
    assert part == stamp(65 * MIB, np.arange(9)) and other < part
    model.float()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert stamp(65 * MIB, np.arange(9)) > part


MODULE = """
import torch
from torch import nn
from penstock.engine.layers import SAGEConv

class Net(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.act = nn.ModuleList([SAGEConv(6, 3)]), lambda x: x * factor
        self.options = {{"names": ["a", "b"], "ids": (1, 2), "table": torch.arange(3)}}
        self.register_buffer("hidden", torch.ones(3), persistent=False)

    def layer_forward(self, layer, block, x):
        return self.act(self.layers[layer](block, x)) * {number}
"""


def load(file: Path, number: int) -> Any:
    file.write_text(MODULE.format(number=number))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module.Net


def test_users_code_and_attributes_count(tmp_path: Path) -> None:
    net = load(tmp_path / "users_net_1.py", 1)
    digest = function_digest(net())
    assert function_digest(net()) == digest != function_digest(net(factor=3.0))
    changed = net()
    changed.options["names"].append("c")
    assert function_digest(changed) != digest
    changed = net()
    changed.hidden.add_(1)
    assert function_digest(changed) != digest
    assert function_digest(load(tmp_path / "users_net_2.py", 4)()) != digest


def test_another_process_finds_the_same_digest(graph: GraphStore) -> None:
    program = f"""
import torch
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.tablekey import function_digest
torch.manual_seed(0)
config = ModelConfig(num_layers=2, hidden=16, kind="gcnii")
print(function_digest(build_model(config, {graph.meta.num_features}, {graph.meta.num_classes}).eval()))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert found == function_digest(build(graph, {"kind": "gcnii"}))


def test_what_cannot_be_described_is_never_the_same() -> None:
    model = nn.Linear(2, 2)
    model.extra = object()  # type: ignore[assignment]
    assert function_digest(model) != function_digest(model)
