import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from penstock.engine.exact import exact_embeddings
from penstock.engine.layers import SAGEConv
from penstock.engine.minibatch import Block
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.rowtable import RowTable
from penstock.engine.topology import ChunkCosts, InEdges
from penstock.storage.blocks import read_block_sums
from penstock.storage.budget import MIB
from penstock.storage.errors import DoesNotFit
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore
from penstock.storage.ingest import IngestOptions, ingest_npy
from penstock.storage.npyfile import NpyWriter
from penstock.storage.rows import RowDtype, decode_rows

KINDS: list[dict[str, Any]] = [
    {"kind": "sage"},
    {"kind": "sage", "aggregator": "max"},
    {"kind": "gcn"},
    {"kind": "gat", "heads": 2},
    {"kind": "gin"},
    {"kind": "gcnii"},
    {"kind": "resgcn"},
    {"kind": "dagnn"},
    {"kind": "sage", "norm": "batch", "residual": True, "activation": "elu"},
]


@pytest.fixture(scope="module")
def wide_graph(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """Features of 10 MiB and no large hub, so that budgets below the table and above a neighbourhood exist."""
    config = GenerateConfig(num_nodes=2500, avg_degree=4, num_features=1024, num_classes=4, exponent=4.0)
    return generate_graph(tmp_path_factory.mktemp("wide") / "graph", config, host_memory=64 * MIB)


def _model(graph: GraphStore, options: dict[str, Any], num_layers: int = 3) -> nn.Module:
    torch.manual_seed(1)
    config = ModelConfig(num_layers=num_layers, hidden=16, **options)
    model = build_model(config, graph.meta.num_features, graph.meta.num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):  # as after training, so that forgetting them would show
            assert module.running_mean is not None
            module.running_mean.uniform_(-1, 1)
    return model


def _whole_graph(graph: GraphStore, model: nn.Module) -> Tensor:
    """The oracle: every layer as one block over all nodes, in memory."""
    block = Block(
        num_src=graph.num_nodes,
        num_dst=graph.num_nodes,
        indptr=torch.from_numpy(graph.indptr.astype(np.int32)),
        indices=torch.from_numpy(graph.indices.astype(np.int32)),
        edge_weights=None if graph.edge_weights is None else torch.from_numpy(np.array(graph.edge_weights)),
        src_degrees=torch.from_numpy(np.diff(graph.indptr).astype(np.int32)),
    )
    x = torch.from_numpy(decode_rows(np.array(graph.features), graph.row_format))
    with torch.no_grad():
        out: Tensor = model.eval()([block] * len(model.layers), x)  # type: ignore[arg-type]
    return out


def _smallest(graph: GraphStore, model: nn.Module, scratch: Path) -> int:
    """The smallest budget, as the error names it."""
    budget = 1
    while True:
        try:
            exact_embeddings(model, graph, scratch / "probe", host_memory=budget, threads=1)
            return budget
        except DoesNotFit as error:
            assert error.host_bytes is not None and f"use --host-memory {error.host_bytes} or more" in str(error)
            budget = error.host_bytes


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
def test_equals_whole_graph_forward(options: dict[str, Any], tiny_graph: GraphStore, tmp_path: Path) -> None:
    model = _model(tiny_graph, options)
    expected = _whole_graph(tiny_graph, model)
    for budget in (5 * MIB, 512 * MIB):
        table = exact_embeddings(model, tiny_graph, tmp_path / str(budget), host_memory=budget, threads=2)
        torch.testing.assert_close(torch.from_numpy(np.array(table.open())), expected, rtol=1e-5, atol=1e-5)
    assert not model.training


@pytest.mark.slow
@pytest.mark.parametrize("options", KINDS[:4], ids=lambda options: "-".join(map(str, options.values())))
def test_table_larger_than_the_budget(options: dict[str, Any], wide_graph: GraphStore, tmp_path: Path) -> None:
    model = _model(wide_graph, options, 2)
    least = _smallest(wide_graph, model, tmp_path)
    assert least < wide_graph.feature_bytes
    stages: list[str] = []

    def record(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        stages.append(stage)

    table = exact_embeddings(
        model,
        wide_graph,
        tmp_path / "least",
        host_memory=least,
        threads=1,
        progress=record,
    )
    assert stages.count("exact layer 1") > 10
    torch.testing.assert_close(torch.from_numpy(np.array(table.open())), _whole_graph(wide_graph, model))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_row_dtypes(dtype: RowDtype, tmp_path: Path) -> None:
    config = GenerateConfig(num_nodes=120, avg_degree=5, num_features=13, num_classes=3, feature_dtype=dtype)
    graph = generate_graph(tmp_path / "graph", config, host_memory=64 * MIB)
    model = _model(graph, {"kind": "sage"})
    for budget in (5 * MIB, 256 * MIB):
        table = exact_embeddings(model, graph, tmp_path / str(budget), host_memory=budget, threads=1)
        torch.testing.assert_close(torch.from_numpy(np.array(table.open())), _whole_graph(graph, model))


@pytest.mark.parametrize("targets", [None, np.arange(0, 50, 3)])
def test_edge_weights(targets: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    np.save(arrays / "features.npy", rng.standard_normal((50, 6)).astype(np.float32))
    np.save(arrays / "labels.npy", rng.integers(0, 3, 50))
    np.save(arrays / "edge_index.npy", rng.integers(0, 50, (2, 300)))
    np.save(arrays / "edge_weights.npy", rng.random(300).astype(np.float32))
    graph = ingest_npy(arrays, tmp_path / "graph", IngestOptions(), host_memory=64 * MIB)
    model = _model(graph, {"kind": "sage", "edge_weights": True}, 2)
    table = exact_embeddings(model, graph, tmp_path / "s", host_memory=64 * MIB, threads=1, targets=targets)
    expected = _whole_graph(graph, model)
    torch.testing.assert_close(
        torch.from_numpy(np.array(table.open())), expected if targets is None else expected[targets]
    )


def test_targets_only(tiny_graph: GraphStore, tmp_path: Path) -> None:
    model = _model(tiny_graph, {"kind": "gcn"})
    targets = np.array([399, 3, 17, 200, 3])
    table = exact_embeddings(model, tiny_graph, tmp_path, host_memory=64 * MIB, threads=1, targets=targets)
    assert table.num_rows == 4
    found = table.open()[table.positions(targets)]
    torch.testing.assert_close(torch.from_numpy(found), _whole_graph(tiny_graph, model)[targets])
    with pytest.raises(ValueError, match="targets"):
        table.positions(np.array([4]))


def test_chunks_cover_all_within_the_budget(tiny_graph: GraphStore) -> None:
    costs = ChunkCosts(source=100, destination=50, edge=10, num_nodes=tiny_graph.num_nodes)
    edges = InEdges(tiny_graph, None)
    least = int(costs.chunk(1, edges.max_degree))
    assert edges.max_degree == int(np.diff(tiny_graph.indptr).max())
    seen = []
    for budget in (least, 3 * least // 2, 10**9):
        chunks = list(edges.chunks(costs, budget))
        assert [lo for lo, _ in chunks] == [0, *(hi for _, hi in chunks[:-1])] and chunks[-1][1] == 400
        for lo, hi in chunks:
            num_edges = int(tiny_graph.indptr[hi] - tiny_graph.indptr[lo])
            assert costs.chunk(hi - lo, num_edges) <= budget
        seen.append(len(chunks))
    assert seen[0] > seen[1] > seen[2] == 1


def test_block_has_all_in_neighbours(tiny_graph: GraphStore) -> None:
    ids = np.array([5, 6, 9, 300])
    for edges, lo, hi in ((InEdges(tiny_graph, None), 20, 60), (InEdges(tiny_graph, ids), 1, 4)):
        block, dst, others = edges.block(lo, hi, with_degrees=True)
        sources = np.concatenate([dst, others])
        assert len(np.unique(sources)) == len(sources) == block.num_src and (np.diff(others) > 0).all()
        for n, node in enumerate(dst):
            mine = block.indices[block.indptr[n] : block.indptr[n + 1]].numpy()
            bounds = tiny_graph.indptr[node], tiny_graph.indptr[node + 1]
            assert sources[mine].tolist() == tiny_graph.indices[bounds[0] : bounds[1]].tolist()
        assert block.src_degrees is not None
        assert block.src_degrees.tolist() == np.diff(tiny_graph.indptr)[sources].tolist()


def test_too_small_a_budget_names_the_smallest(tiny_graph: GraphStore, tmp_path: Path) -> None:
    model = _model(tiny_graph, {"kind": "sage"})
    least = _smallest(tiny_graph, model, tmp_path)
    with pytest.raises(DoesNotFit, match=f"in-neighbours.*use --host-memory {least} or more"):
        exact_embeddings(model, tiny_graph, tmp_path / "out", host_memory=least - 1, threads=1)
    assert not list((tmp_path / "out").iterdir())


def test_finished_layers_are_kept(tiny_graph: GraphStore, tmp_path: Path) -> None:
    model = _model(tiny_graph, {"kind": "sage"})

    def run() -> dict[str, int]:
        exact_embeddings(model, tiny_graph, tmp_path, host_memory=64 * MIB, threads=1)
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("layer-?.npy")}

    first = run()
    assert run() == first and len(first) == 3
    marker = tmp_path / "layer-3.json"
    (tmp_path / "layer-3.npy").write_bytes(b"cut by a kill")
    second = run()
    assert second["layer-2.npy"] == first["layer-2.npy"] and second["layer-3.npy"] > first["layer-3.npy"]
    with torch.no_grad():
        next(model.parameters()).add_(1)
    third = run()
    assert all(third[name] > second[name] for name in third)
    assert json.loads(marker.read_text())["bytes"] == os.path.getsize(tmp_path / "layer-3.npy")


MEASURE = """
import sys
from pathlib import Path
import psutil
from penstock.engine.exact import exact_embeddings
from penstock.engine.models import ModelConfig, build_model
from penstock.storage.budget import peak_rss_bytes, reset_peak_rss
from penstock.storage.graph import open_graph

folder, memory = Path(sys.argv[1]), int(sys.argv[2])
large, small = open_graph(folder / "large"), open_graph(folder / "small")
model = build_model(ModelConfig(num_layers=2, hidden=32), large.meta.num_features, large.meta.num_classes)
exact_embeddings(model, small, folder / "warm", host_memory=memory, threads=1)  # compiles and loads
before = psutil.Process().memory_info().rss
print(reset_peak_rss())
exact_embeddings(model, large, folder / "exact", host_memory=memory, threads=1)
print(peak_rss_bytes() - before)
"""


@pytest.mark.slow
def test_peak_memory_is_the_budget_and_not_the_table(tmp_path: Path) -> None:
    shape = {"avg_degree": 8, "num_features": 512, "num_classes": 4, "exponent": 4.0}
    for name, num_nodes in (("small", 1000), ("large", 90_000)):
        config = GenerateConfig.model_validate({"num_nodes": num_nodes, **shape})
        large = generate_graph(tmp_path / name, config, host_memory=64 * MIB)
    budget = 32 * MIB
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(budget)]
    could_reset, grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if could_reset != "True":
        pytest.skip("the kernel does not let this process reset its peak")
    # what malloc keeps of freed temporaries comes on top: 30 MiB on the reference machine
    assert int(grown) < budget + 48 * MIB < large.feature_bytes // 2


class _Bare(nn.Module):
    """A user's module with layers but no `layer_forward`; `between` is what forward does between them."""

    def __init__(self, graph: GraphStore, between: nn.Module) -> None:
        super().__init__()
        widths = [graph.meta.num_features, 8, graph.meta.num_classes]
        self.layers = nn.ModuleList(SAGEConv(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.between = between

    def forward(self, blocks: list[Block], x: Tensor) -> Tensor:
        for layer, block in zip(self.layers, blocks, strict=True):
            x = self.between(layer(block, x))
        return x


def test_users_module(tiny_graph: GraphStore, tmp_path: Path) -> None:
    model = _Bare(tiny_graph, nn.Identity())
    table = exact_embeddings(model, tiny_graph, tmp_path / "a", host_memory=64 * MIB, threads=1)
    torch.testing.assert_close(torch.from_numpy(np.array(table.open())), _whole_graph(tiny_graph, model))
    with pytest.raises(ValueError, match="layer_forward"):
        exact_embeddings(_Bare(tiny_graph, nn.Tanh()), tiny_graph, tmp_path / "b", host_memory=64 * MIB, threads=1)
    with pytest.raises(ValueError, match="no `layers`"):
        exact_embeddings(nn.Linear(20, 4), tiny_graph, tmp_path / "c", host_memory=64 * MIB, threads=1)


@pytest.mark.parametrize("width", [1, 3, 300, 5000])
@pytest.mark.parametrize("resident", [False, True])
def test_row_table_reads_any_ascending_ids(width: int, resident: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(width)
    rows = rng.integers(0, 256, (1500, width * 4), dtype=np.uint8)
    with NpyWriter(tmp_path / "t.npy", "<f4", (1500, width), blocks=True) as writer:
        writer.append(rows.view("<f4").reshape(1500, width))
    assert writer.sums_entry is not None
    checks = (tmp_path / "t.sums.npy", writer.sums_entry.xxh3, tmp_path / "t.npy", rows.nbytes, "rebuild it")
    with RowTable(tmp_path / "t.npy", width * 4, 1500, read_block_sums(*checks), resident=resident, threads=2) as table:
        for count in (0, 1, 7, 400, 1500):
            ids = np.sort(rng.choice(1500, count, replace=False))
            out = np.zeros((count, width * 4), np.uint8)
            table.gather(ids, out)
            assert np.array_equal(out, rows[ids])
        last = np.zeros((1, width * 4), np.uint8)
        table.gather(np.array([1499]), last)
        assert np.array_equal(last[0], rows[-1])
