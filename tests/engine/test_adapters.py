import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from penstock.engine.minibatch import Block, MiniBatch
from penstock.storage.errors import MissingDependency

dgl = pytest.importorskip("dgl")
DglSage = pytest.importorskip("dgl.nn").SAGEConv
PygSage = pytest.importorskip("torch_geometric.nn").SAGEConv
trim_to_layer = pytest.importorskip("torch_geometric.utils").trim_to_layer

NODES, WIDTH = 40, 6


def graph() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randint(0, NODES, (2, 150), generator=generator))


def sampled(fanout: int) -> tuple[MiniBatch, torch.Tensor]:
    """Let DGL's own sampler draw two hops, and put its result into a MiniBatch; returns all features too."""
    dgl.seed(5)
    whole = dgl.graph(graph(), num_nodes=NODES)
    table = torch.randn(NODES, WIDTH, generator=torch.Generator().manual_seed(1))
    inputs, seeds, made = dgl.dataloading.NeighborSampler([fanout, fanout]).sample(whole, torch.tensor([8, 1, 30]))
    blocks = []
    for block in made:
        indptr, indices, _ = block.adj_tensors("csc")
        blocks.append(
            Block(
                num_src=block.num_src_nodes(),
                num_dst=block.num_dst_nodes(),
                indptr=indptr.int(),
                indices=indices.int(),
                edge_weights=torch.ones(len(indices)),
                src_degrees=whole.in_degrees(block.srcdata[dgl.NID]).int(),
            )
        )
    batch = MiniBatch(
        step=0,
        item=0,
        epoch=0,
        num_seeds=3,
        input_ids=inputs.int(),
        labels=torch.tensor([0, 1, 2]),
        blocks=tuple(blocks),
        features=table[inputs],
    )
    return batch, table


@pytest.mark.parametrize("fanout", [2, -1])
def test_to_dgl_has_what_its_loader_yields(fanout: int) -> None:
    batch, table = sampled(fanout)
    inputs, outputs, blocks = batch.to_dgl()
    assert outputs.tolist() == [8, 1, 30] and inputs.dtype == torch.int64
    assert [block.num_dst_nodes() for block in blocks] == [blocks[1].num_src_nodes(), 3]
    assert torch.equal(blocks[0].srcdata["feat"], table[inputs])
    assert blocks[-1].dstdata["label"].tolist() == [0, 1, 2]
    for block in blocks:
        assert torch.equal(block.dstdata[dgl.NID], block.srcdata[dgl.NID][: block.num_dst_nodes()])
        assert len(block.edata["weight"]) == block.num_edges()
        source, target = (ids.long() for ids in block.edges())
        pairs = zip(block.srcdata[dgl.NID][source].tolist(), block.dstdata[dgl.NID][target].tolist(), strict=True)
        assert set(pairs) <= set(zip(*(ids.tolist() for ids in graph()), strict=True))
    assert torch.isfinite(
        DglSage(WIDTH, 2, "mean")(blocks[0], (table[inputs], table[inputs][: blocks[1].num_src_nodes()]))
    ).all()


def test_to_dgl_shares_the_features() -> None:
    batch, _ = sampled(2)
    assert batch.to_dgl()[2][0].srcdata["feat"].data_ptr() == batch.features.data_ptr()


@pytest.mark.parametrize("fanout", [2, -1])
def test_to_pyg_holds_each_drawn_edge_once_hop_by_hop(fanout: int) -> None:
    batch, table = sampled(fanout)
    data = batch.to_pyg()
    data.validate()
    drawn = set()
    for block in batch.blocks:
        target = torch.repeat_interleave(torch.arange(block.num_dst), block.indptr.diff().long())
        drawn |= set(zip(block.indices.tolist(), target.tolist(), strict=True))
    assert set(map(tuple, data.edge_index.T.tolist())) == drawn
    assert sum(data.num_sampled_edges) == data.edge_index.shape[1] == len(data.edge_weight)
    assert sum(data.num_sampled_nodes) == len(data.n_id) and data.num_sampled_nodes[0] == data.batch_size == 3
    assert torch.equal(data.x, table[data.n_id])
    first = data.edge_index[:, : data.num_sampled_edges[0]]
    assert int(first[1].max()) < 3 and int(first[0].max()) < sum(data.num_sampled_nodes[:2])


def test_pyg_layers_with_trimming_equal_full_graph_layers_over_all_neighbours() -> None:
    batch, table = sampled(-1)
    data = batch.to_pyg()
    torch.manual_seed(0)
    # sums: a duplicated edge would show
    layers = [PygSage(WIDTH, 5, aggr="sum"), PygSage(5, 4, aggr="sum")]
    x, edge_index = data.x, data.edge_index
    for number, layer in enumerate(layers):
        x, edge_index, _ = trim_to_layer(number, data.num_sampled_nodes, data.num_sampled_edges, x, edge_index)
        x = layer(x, edge_index)
    whole = torch.stack(graph())
    expected = layers[1](layers[0](table, whole), whole)[[8, 1, 30]]
    torch.testing.assert_close(x[:3], expected)


def weighted() -> MiniBatch:
    """Two hops whose draws count differently, the second one with an edge of the first."""
    outer, inner = (
        Block(
            num_src=num_src,
            num_dst=num_dst,
            indptr=torch.tensor(indptr, dtype=torch.int32),
            indices=torch.tensor(indices, dtype=torch.int32),
            edge_weights=torch.arange(len(indices)) + first,
            draw_weights=(torch.arange(len(indices)) + first) / 2,
            src_degrees=torch.arange(num_src, dtype=torch.int32),
            src_loops=torch.arange(num_src, dtype=torch.int32) % 2,
        )
        for num_src, num_dst, indptr, indices, first in ((4, 2, [0, 2, 3], [1, 2, 3], 10.0), (2, 1, [0, 1], [1], 1.0))
    )
    ids, features = torch.tensor([5, 6, 7, 8]), torch.zeros(4, 1)
    whole: dict[str, Any] = {
        "input_ids": ids,
        "labels": torch.tensor([0]),
        "blocks": (outer, inner),
        "features": features,
    }
    return MiniBatch(step=0, item=0, epoch=0, num_seeds=1, **whole)


def test_what_blocks_know_of_draws_and_loops_is_in_both_views() -> None:
    batch = weighted()
    for block, made in zip(batch.blocks, batch.to_dgl()[2], strict=True):
        assert block.draw_weights is not None and block.src_loops is not None
        assert torch.equal(made.edata["draw_weight"], block.draw_weights)
        assert block.edge_weights is not None and torch.equal(made.edata["weight"], block.edge_weights)
        assert torch.equal(made.srcdata["self_loops"], block.src_loops)
    data = batch.to_pyg()
    data.validate()
    assert data.edge_index.tolist() == [[1, 2, 3], [0, 0, 1]] and data.num_sampled_edges == [1, 2]
    assert data.edge_weight.tolist() == [1, 11, 12] and data.draw_weight.tolist() == [0.5, 5.5, 6]
    assert data.self_loops.tolist() == [0, 1, 0, 1] and data.degree.tolist() == [0, 1, 2, 3]
    plain = replace(batch, blocks=tuple(replace(b, draw_weights=None, src_loops=None) for b in batch.blocks))
    assert "draw_weight" not in plain.to_pyg() and "self_loops" not in plain.to_pyg()
    assert "draw_weight" not in plain.to_dgl()[2][0].edata


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, _ = sampled(2)
    monkeypatch.setitem(sys.modules, "dgl", None)
    monkeypatch.setitem(sys.modules, "torch_geometric.data", None)
    with pytest.raises(MissingDependency, match=r"pip install 'dgl>=1.1.3,<2'"):
        batch.to_dgl()
    with pytest.raises(ImportError, match=r"pip install 'torch_geometric>=2.5'"):
        batch.to_pyg()
