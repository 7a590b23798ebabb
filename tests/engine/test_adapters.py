import sys

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


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, _ = sampled(2)
    monkeypatch.setitem(sys.modules, "dgl", None)
    monkeypatch.setitem(sys.modules, "torch_geometric.data", None)
    with pytest.raises(MissingDependency, match=r"pip install 'dgl>=1.1.3,<2'"):
        batch.to_dgl()
    with pytest.raises(ImportError, match=r"pip install 'torch_geometric>=2.5'"):
        batch.to_pyg()
