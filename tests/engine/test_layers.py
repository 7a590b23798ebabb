"""Oracles: PyG's layers on a whole graph, DGL's on blocks, with our weights copied into them."""

import pytest
import torch
from torch import Tensor, nn

from penstock.engine.layers import GATConv, GCNConv, GINConv, SAGEConv
from penstock.engine.minibatch import Block

FEATURES, HIDDEN, NODES = 12, 8, 60
pyg = pytest.importorskip("torch_geometric.nn")


@pytest.fixture(scope="module")
def edge_index() -> Tensor:
    """An undirected graph without self-loops; node 0 has no neighbours."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(1, NODES, (2, 150), generator=generator)
    edges = edges[:, edges[0] != edges[1]]
    return torch.unique(torch.cat([edges, edges.flip(0)], dim=1), dim=1)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(NODES, FEATURES, generator=torch.Generator().manual_seed(1))


def full_block(edge_index: Tensor, num_dst: int = NODES) -> Block:
    """All neighbours of the first nodes; the sources are all nodes."""
    source, target = edge_index[:, edge_index[1] < num_dst]
    order = torch.argsort(target, stable=True)
    counts = torch.bincount(edge_index[1], minlength=NODES)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts[:num_dst].cumsum(0)])
    return Block(
        num_src=NODES,
        num_dst=num_dst,
        indptr=indptr.int(),
        indices=source[order].int(),
        edge_weights=torch.rand(len(order), generator=torch.Generator().manual_seed(2)),
        src_degrees=counts.int(),
    )


def dgl_block(block: Block) -> object:
    dgl = pytest.importorskip("dgl")
    csc = ("csc", (block.indptr, block.indices, torch.empty(0, dtype=torch.int32)))
    return dgl.create_block(csc, num_src_nodes=block.num_src, num_dst_nodes=block.num_dst)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def copy(source: Tensor, *targets: Tensor) -> None:
    for target in targets:
        target.data.copy_(source.detach().reshape(target.shape))


def assert_same_with_gradients(ours: Tensor, theirs: Tensor, mine: Tensor, other: Tensor) -> None:
    """Outputs equal, and gradients with respect to one weight of each."""
    assert_near(ours, theirs)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    (a,), (b,) = torch.autograd.grad(ours, mine, grad), torch.autograd.grad(theirs, other, grad)
    assert_near(a.reshape(b.shape), b)


@pytest.mark.parametrize("aggregator", ["mean", "max"])
@pytest.mark.parametrize("out_features", [2, 40])  # the mean runs before or after the linear map
def test_sage_equals_pyg(edge_index: Tensor, x: Tensor, aggregator: str, out_features: int) -> None:
    layer = SAGEConv(FEATURES, out_features, aggregator=aggregator)  # type: ignore[arg-type]
    theirs = pyg.SAGEConv(FEATURES, out_features, aggr=aggregator)
    copy(layer.neighbour.weight, theirs.lin_l.weight)
    copy(layer.neighbour.bias, theirs.lin_l.bias)
    copy(layer.own.weight, theirs.lin_r.weight)
    out = layer(full_block(edge_index), x)
    assert_same_with_gradients(out, theirs(x, edge_index), layer.neighbour.weight, theirs.lin_l.weight)


def test_the_order_of_mean_and_linear_map_changes_rounding_only(edge_index: Tensor, x: Tensor) -> None:
    block, layer = full_block(edge_index, 3), SAGEConv(FEATURES, 1)
    many = torch.cat([block.indices] * 50)  # so many edges that the narrow side is gathered
    dense = Block(num_src=NODES, num_dst=1, indptr=torch.tensor([0, len(many)], dtype=torch.int32), indices=many)
    wanted = x[many.long()].mean(0, keepdim=True) @ layer.neighbour.weight.T + layer.neighbour.bias
    assert_near(layer(dense, x), wanted + layer.own(x[:1]))


def test_weighted_mean_is_over_the_weights(edge_index: Tensor, x: Tensor) -> None:
    block, layer = full_block(edge_index, 20), SAGEConv(FEATURES, HIDDEN, edge_weights=True)
    assert block.edge_weights is not None
    means = []
    for v in range(20):
        span = slice(int(block.indptr[v]), int(block.indptr[v + 1]))
        weights = block.edge_weights[span]
        rows = x[block.indices[span].long()]
        means.append((weights[:, None] * rows).sum(0) / weights.sum() if len(weights) else torch.zeros(FEATURES))
    assert_near(layer(block, x), layer.neighbour(torch.stack(means)) + layer.own(x[:20]))


def test_gcn_equals_pyg(edge_index: Tensor, x: Tensor) -> None:
    layer, theirs = GCNConv(FEATURES, HIDDEN), pyg.GCNConv(FEATURES, HIDDEN)
    copy(layer.weight, theirs.lin.weight)
    copy(torch.arange(HIDDEN) / 8, layer.bias, theirs.bias)
    out = layer(full_block(edge_index), x)
    assert_same_with_gradients(out, theirs(x, edge_index), layer.weight, theirs.lin.weight)


def test_gcn_of_some_nodes_equals_their_rows(edge_index: Tensor, x: Tensor) -> None:
    layer = GCNConv(FEATURES, HIDDEN)
    whole, part = layer(full_block(edge_index), x), layer(full_block(edge_index, 17), x)
    assert_near(part, whole[:17])


@pytest.mark.parametrize("kind", [GCNConv, GINConv])
def test_sampled_sums_are_unbiased(edge_index: Tensor, x: Tensor, kind: type[nn.Module]) -> None:
    """The mean over every single-neighbour sample of a node is its full-neighbourhood value."""
    layer = kind(FEATURES, HIDDEN)
    if kind is GINConv:
        layer.mlp = nn.Identity()
    block = full_block(edge_index)
    node = int(block.indptr.diff().argmax())
    whole = layer(block, x)[node]
    neighbours = block.indices[block.indptr[node] : block.indptr[node + 1]]
    samples = []
    for neighbour in neighbours.tolist():
        order = torch.tensor([node, neighbour])
        single = Block(
            num_src=2,
            num_dst=1,
            indptr=torch.tensor([0, 1], dtype=torch.int32),
            indices=torch.tensor([1], dtype=torch.int32),
            src_degrees=block.src_degrees[order] if block.src_degrees is not None else None,
        )
        samples.append(layer(single, x[order])[0])
    assert len(samples) > 3
    assert_near(torch.stack(samples).mean(0), whole)


@pytest.mark.parametrize("concat", [True, False])
def test_gat_equals_pyg(edge_index: Tensor, x: Tensor, concat: bool) -> None:
    layer = GATConv(FEATURES, HIDDEN, heads=2, concat=concat)
    theirs = pyg.GATConv(FEATURES, HIDDEN // 2 if concat else HIDDEN, heads=2, concat=concat)
    copy(layer.linear.weight, theirs.lin.weight)
    copy(layer.src_attention, theirs.att_src)
    copy(layer.dst_attention, theirs.att_dst)
    copy(torch.arange(HIDDEN) / 8, layer.bias, theirs.bias)
    out, wanted = layer(full_block(edge_index), x), theirs(x, edge_index)
    assert_same_with_gradients(out, wanted, layer.src_attention, theirs.att_src)
    assert_same_with_gradients(
        layer(full_block(edge_index), x), theirs(x, edge_index), layer.linear.weight, theirs.lin.weight
    )


def test_gat_drops_attention_in_training_only(edge_index: Tensor, x: Tensor) -> None:
    layer, block = GATConv(FEATURES, HIDDEN, heads=2, attention_dropout=0.5), full_block(edge_index)
    assert not torch.equal(layer(block, x), layer(block, x))
    torch.manual_seed(5)
    first = layer(block, x)
    torch.manual_seed(5)
    assert torch.equal(first, layer(block, x))
    assert torch.equal(layer.eval()(block, x), layer(block, x))


def test_gin_equals_pyg(edge_index: Tensor, x: Tensor) -> None:
    layer = GINConv(FEATURES, HIDDEN)
    layer.eps.data.fill_(0.3)
    theirs = pyg.GINConv(layer.mlp, eps=0.3, train_eps=True)
    out = layer(full_block(edge_index), x)
    assert_same_with_gradients(out, theirs(x, edge_index), layer.eps, theirs.eps)


@pytest.mark.parametrize("aggregator", ["mean", "pool"])
def test_sage_equals_dgl_on_a_block(edge_index: Tensor, x: Tensor, aggregator: str) -> None:
    dgl_nn = pytest.importorskip("dgl.nn")
    block = full_block(edge_index, 25)
    theirs = dgl_nn.SAGEConv(FEATURES, HIDDEN, aggregator)
    layer = SAGEConv(FEATURES, HIDDEN, aggregator="mean" if aggregator == "mean" else "max")
    copy(theirs.fc_neigh.weight, layer.neighbour.weight)
    copy(theirs.fc_self.weight, layer.own.weight)
    copy(theirs.fc_self.bias, layer.neighbour.bias)
    pooled = x if aggregator == "mean" else torch.relu(theirs.fc_pool(x))
    out = layer(block, pooled) + layer.own(x[:25]) - layer.own(pooled[:25])
    assert_near(out, theirs(dgl_block(block), (x, x[:25])))


def test_gin_and_gat_equal_dgl_on_a_block(edge_index: Tensor, x: Tensor) -> None:
    dgl_nn = pytest.importorskip("dgl.nn")
    block = full_block(edge_index, 25)
    gin = GINConv(FEATURES, HIDDEN)
    theirs = dgl_nn.GINConv(gin.mlp, "sum")
    assert_near(gin(block, x), theirs(dgl_block(block), (x, x[:25])))

    gat = GATConv(FEATURES, HIDDEN, heads=2)
    attention = dgl_nn.GATConv(FEATURES, HIDDEN // 2, 2)
    copy(gat.linear.weight, attention.fc.weight)
    copy(gat.src_attention, attention.attn_l)
    copy(gat.dst_attention, attention.attn_r)
    loops = torch.arange(25).repeat(2, 1)
    kept = full_block(torch.cat([edge_index, loops], dim=1), 25)  # DGL wants the loops in the block
    out = attention(dgl_block(kept), (x, x[:25])).flatten(1)
    assert_near(gat(block, x), out)


@pytest.mark.parametrize("kind", [GCNConv, GINConv])
def test_missing_degrees_are_named(edge_index: Tensor, x: Tensor, kind: type[nn.Module]) -> None:
    block = full_block(edge_index)
    bare = Block(num_src=NODES, num_dst=NODES, indptr=block.indptr, indices=block.indices)
    with pytest.raises(ValueError, match=f"{kind.__name__} needs the in-degrees.*degrees: true"):
        kind(FEATURES, HIDDEN)(bare, x)


def test_impossible_options_are_named(edge_index: Tensor, x: Tensor) -> None:
    with pytest.raises(ValueError, match="10 outputs do not part into 4 heads.*12"):
        GATConv(FEATURES, 10, heads=4)
    with pytest.raises(ValueError, match="edge_weights has no meaning"):
        SAGEConv(FEATURES, HIDDEN, aggregator="max", edge_weights=True)
    block = full_block(edge_index)
    bare = Block(num_src=NODES, num_dst=NODES, indptr=block.indptr, indices=block.indices)
    with pytest.raises(ValueError, match="no weights"):
        SAGEConv(FEATURES, HIDDEN, edge_weights=True)(bare, x)
