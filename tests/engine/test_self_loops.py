"""PyG's layers as oracles on a graph with everything that real ones have: self-loops, parallel edges, lonely nodes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from penstock.engine.chunked.blocks import load_chunk
from penstock.engine.deep_models import GCNIIConv
from penstock.engine.exact import exact_embeddings
from penstock.engine.layers import GATConv, GCNConv, GINConv, SAGEConv, gcn_propagate
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.minibatch import Block
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.topology import InEdges, count_self_loops
from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.write import write_chunks
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.budget import MIB
from penstock.storage.graph import GraphStore

NODES, FEATURES, HIDDEN = 60, 6, 8
pyg = pytest.importorskip("torch_geometric.nn")


@pytest.fixture(scope="module")
def graph(make_graph: Callable[..., GraphStore]) -> GraphStore:
    """Loops at a third of the nodes, node 2 with 12 of them; parallel edges; nodes 55 to 59 without edges, 50 to 54
    without in-edges, node 49 with a loop only."""
    rng = np.random.default_rng(2)
    edges = np.stack([rng.integers(0, 49, 160), rng.integers(0, 49, 160)], axis=1)
    out_only = np.stack([np.arange(50, 55), np.arange(5)], axis=1)
    loops = np.repeat(np.arange(0, 49, 3), 2).repeat(2).reshape(-1, 2)
    every = np.concatenate([edges, edges[:20], out_only, loops, [[49, 49]], np.full((12, 2), 2)])
    return make_graph(NODES, every, features=rng.standard_normal((NODES, FEATURES)).astype(np.float32))


@pytest.fixture(scope="module")
def edge_index(graph: GraphStore) -> Tensor:
    targets = np.repeat(np.arange(NODES), np.diff(graph.indptr))
    return torch.from_numpy(np.stack([np.asarray(graph.indices), targets]).astype(np.int64))


@pytest.fixture(scope="module")
def x(graph: GraphStore) -> Tensor:
    return torch.from_numpy(np.array(graph.features))


@pytest.fixture(scope="module")
def whole(graph: GraphStore) -> Block:
    """The graph as a block made by hand, without `src_loops`."""
    return Block(
        num_src=NODES,
        num_dst=NODES,
        indptr=torch.from_numpy(np.array(graph.indptr, np.int32)),
        indices=torch.from_numpy(np.array(graph.indices, np.int32)),
        src_degrees=torch.from_numpy(np.diff(graph.indptr).astype(np.int32)),
    )


@pytest.fixture(scope="module")
def propagated(edge_index: Tensor, x: Tensor) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 X by PyG."""
    layer = pyg.GCNConv(FEATURES, FEATURES, bias=False)
    layer.lin.weight.data = torch.eye(FEATURES)
    return layer(x, edge_index).detach()  # type: ignore[no-any-return]


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def sampled_blocks(graph: GraphStore, folder: Path, mode: Any) -> list[tuple[Block, Tensor]]:
    config = SampleConfig(fanouts=(-1,), batch_size=13, degrees=True, mode=mode)
    trace = sample_trace(graph, folder, config, shuffle=False, host_memory=64 * MIB, threads=1)
    with open_memory_feed(graph, trace, start_step=0, stop_step=trace.meta.num_items) as feed:
        return [(batch.blocks[0].clone(), batch.input_ids.long().clone()) for batch in feed]


def exact_blocks(graph: GraphStore, ids: Any) -> list[tuple[Block, Tensor]]:
    edges, found = InEdges(graph, ids, count_self_loops(graph)), []
    for lo in range(0, edges.num_dst, 11):
        block, dst, others = edges.block(lo, min(lo + 11, edges.num_dst), True)
        found.append((block, torch.from_numpy(np.concatenate([dst, others]))))
    return found


def chunk_blocks(graph: GraphStore, folder: Path) -> list[tuple[Block, Tensor]]:
    config = PartitionConfig(chunks=3, parts=2, method="random")
    store = write_chunks(graph, folder, config, host_memory=64 * MIB, threads=1)
    loaded = [load_chunk(store.part(p).chunk(c), torch.device("cpu"), graph) for p in range(2) for c in range(3)]
    return [(chunk.block, chunk.src_ids) for chunk in loaded]


@pytest.mark.parametrize("mode", ["whole", "item", "hop", "exact", "some", "chunks"])
def test_propagation_equals_pyg_in_every_mode(
    mode: str, graph: GraphStore, whole: Block, x: Tensor, propagated: Tensor, tmp_path: Path
) -> None:
    blocks = {
        "whole": lambda: [(whole, torch.arange(NODES))],
        "item": lambda: sampled_blocks(graph, tmp_path / "t", "item"),
        "hop": lambda: sampled_blocks(graph, tmp_path / "t", "hop"),
        "exact": lambda: exact_blocks(graph, None),
        "some": lambda: exact_blocks(graph, np.arange(1, NODES, 3)),
        "chunks": lambda: chunk_blocks(graph, tmp_path / "c"),
    }[mode]()
    seen = 0
    for block, ids in blocks:
        assert_near(gcn_propagate(block, x[ids], "test"), propagated[ids[: block.num_dst]])
        seen += block.num_dst
    assert seen == (20 if mode == "some" else NODES)


def test_loops_are_counted_per_node(graph: GraphStore, edge_index: Tensor, make_graph: Callable[..., Any]) -> None:
    wanted = torch.bincount(edge_index[0][edge_index[0] == edge_index[1]], minlength=NODES)
    found = count_self_loops(graph)
    assert found is not None and found.tolist() == wanted.tolist() and found.dtype == np.uint8
    assert count_self_loops(make_graph(3, [[0, 1], [1, 2]])) is None
    many = count_self_loops(make_graph(3, [[0, 1], *[[1, 1]] * 300, [2, 2]]))
    assert many is not None and many.tolist() == [0, 300, 1]


def test_sampled_propagation_is_unbiased_with_loops(
    graph: GraphStore, whole: Block, x: Tensor, propagated: Tensor
) -> None:
    """The mean over every single-neighbour sample of a node, its loops among them."""
    loops = count_self_loops(graph)
    assert loops is not None and whole.src_degrees is not None
    for node in (2, 3):
        samples = []
        for neighbour in np.asarray(graph.indices[graph.indptr[node] : graph.indptr[node + 1]]).tolist():
            order = torch.tensor([node] if neighbour == node else [node, neighbour])
            single = Block(
                num_src=len(order),
                num_dst=1,
                indptr=torch.tensor([0, 1], dtype=torch.int32),
                indices=torch.tensor([len(order) - 1], dtype=torch.int32),
                src_degrees=whole.src_degrees[order],
                src_loops=torch.from_numpy(loops[order.numpy()].astype(np.int32)),
            )
            samples.append(gcn_propagate(single, x[order], "test")[0])
        assert len(samples) > 3
        assert_near(torch.stack(samples).mean(0), propagated[node])


def pairs() -> dict[str, Callable[[], tuple[nn.Module, nn.Module]]]:
    """Our layers and PyG's with equal weights, by name."""

    def sage(aggregator: Any) -> tuple[nn.Module, nn.Module]:
        ours, theirs = (
            SAGEConv(FEATURES, HIDDEN, aggregator=aggregator),
            pyg.SAGEConv(FEATURES, HIDDEN, aggr=aggregator),
        )
        theirs.lin_l.load_state_dict(ours.neighbour.state_dict())
        theirs.lin_r.load_state_dict(ours.own.state_dict())
        return ours, theirs

    def gcn() -> tuple[nn.Module, nn.Module]:
        ours, theirs = GCNConv(FEATURES, HIDDEN), pyg.GCNConv(FEATURES, HIDDEN)
        theirs.lin.weight.data.copy_(ours.weight.data)
        return ours, theirs

    def gat() -> tuple[nn.Module, nn.Module]:
        ours, theirs = GATConv(FEATURES, HIDDEN, heads=2), pyg.GATConv(FEATURES, HIDDEN // 2, heads=2)
        theirs.lin.weight.data.copy_(ours.linear.weight.data)
        theirs.att_src.data.copy_(ours.src_attention.data)
        theirs.att_dst.data.copy_(ours.dst_attention.data)
        return ours, theirs

    def gin() -> tuple[nn.Module, nn.Module]:
        ours = GINConv(FEATURES, HIDDEN)
        return ours, pyg.GINConv(ours.mlp, eps=0.0)

    return {"sage": lambda: sage("mean"), "max": lambda: sage("max"), "gcn": gcn, "gat": gat, "gin": gin}


@pytest.mark.parametrize("name", pairs())
def test_layers_equal_pyg(name: str, whole: Block, edge_index: Tensor, x: Tensor) -> None:
    torch.manual_seed(3)
    ours, theirs = pairs()[name]()
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, wanted = ours(whole, mine), theirs(other, edge_index)
    assert_near(out, wanted)
    grad = torch.randn(out.shape)
    out.backward(grad)
    wanted.backward(grad)
    assert mine.grad is not None and other.grad is not None
    if name != "max":  # of parallel edges PyG shares the gradient, we take the first
        assert_near(mine.grad, other.grad)


def test_gcnii_equals_pyg(whole: Block, edge_index: Tensor) -> None:
    h, initial = torch.randn(2, NODES, HIDDEN, generator=torch.Generator().manual_seed(2))
    ours, theirs = GCNIIConv(HIDDEN, depth=2), pyg.GCN2Conv(HIDDEN, alpha=0.1, theta=0.5, layer=2)
    theirs.weight1.data.copy_(ours.weight.data.T)
    assert_near(ours(whole, h, initial), theirs(h, initial, edge_index))


@pytest.mark.parametrize("kind", ["sage", "gcn", "gat", "gin", "gcnii", "resgcn", "dagnn"])
def test_models_agree_between_whole_sampled_and_exact(
    kind: Any, graph: GraphStore, whole: Block, x: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    model = build_model(ModelConfig(kind=kind, num_layers=2, hidden=HIDDEN), FEATURES, 3).eval()
    with torch.no_grad():
        wanted = model([whole, whole], x)
    table = exact_embeddings(model, graph, tmp_path / "exact", host_memory=64 * MIB, threads=1)
    assert_near(torch.from_numpy(np.array(table.open())), wanted)
    config = SampleConfig(fanouts=(-1, -1), batch_size=13, degrees=True)
    trace = sample_trace(graph, tmp_path / "t", config, shuffle=False, host_memory=64 * MIB, threads=1)
    with open_memory_feed(graph, trace, start_step=0, stop_step=trace.meta.num_items) as feed, torch.no_grad():
        for batch in feed:
            assert_near(model(batch.blocks, batch.features), wanted[batch.seeds])
