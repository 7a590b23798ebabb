"""Oracles in float64: PyG's GCN2Conv, and dense formulas written from the papers."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from penstock.engine.deep_models import DAGNN, GCNII, GCNIIConv, ResGCN
from penstock.engine.layers import GCNConv, GINConv, SAGEConv
from penstock.engine.minibatch import Block
from penstock.engine.models import ModelConfig, build_model, check_layer_forward, needs_degrees

FEATURES, HIDDEN, CLASSES, NODES = 5, 8, 3, 30
DEEP = ["gcnii", "resgcn", "dagnn"]


@pytest.fixture(scope="module")
def edge_index() -> Tensor:
    """An undirected graph without self-loops; node 0 has no neighbours."""
    edges = torch.randint(1, NODES, (2, 60), generator=torch.Generator().manual_seed(0))
    edges = edges[:, edges[0] != edges[1]]
    return torch.unique(torch.cat([edges, edges.flip(0)], dim=1), dim=1)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def block(edge_index: Tensor) -> Block:
    source, target = edge_index[:, torch.argsort(edge_index[1], stable=True)]
    counts = torch.bincount(target, minlength=NODES)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return Block(num_src=NODES, num_dst=NODES, indptr=indptr.int(), indices=source.int(), src_degrees=counts.int())


@pytest.fixture(scope="module")
def propagation(edge_index: Tensor) -> Tensor:
    """D^-1/2 (A + I) D^-1/2, dense."""
    matrix = torch.eye(NODES, dtype=torch.float64)
    matrix[edge_index[1], edge_index[0]] = 1
    scale = matrix.sum(1).rsqrt()
    return scale[:, None] * matrix * scale


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(NODES, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("depth", "alpha", "theta"), [(1, 0.1, 0.5), (7, 0.2, 1.5), (3, 0.0, 1.0)])
def test_gcnii_equals_pyg(
    depth: int, alpha: float, theta: float, block: Block, edge_index: Tensor, propagation: Tensor
) -> None:
    pyg = pytest.importorskip("torch_geometric.nn")
    h, initial = torch.randn(2, NODES, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = GCNIIConv(HIDDEN, depth=depth, alpha=alpha, theta=theta).double()
    theirs = pyg.GCN2Conv(HIDDEN, alpha, theta, layer=depth).double()
    theirs.weight1.data.copy_(ours.weight.detach().t())
    assert_equal(ours(block, h, initial), dense_gcnii(propagation, h, initial, ours.weight, alpha, theta, depth))
    # PyG computes degrees in float32, so it is the coarser of the two
    torch.testing.assert_close(ours(block, h, initial), theirs(h, initial, edge_index), rtol=1e-6, atol=1e-6)


def dense_gcnii(
    propagation: Tensor, h: Tensor, initial: Tensor, weight: Tensor, alpha: float, theta: float, depth: int
) -> Tensor:
    beta = math.log(theta / depth + 1)
    identity = torch.eye(len(weight), dtype=torch.float64)
    support = (1 - alpha) * propagation @ h + alpha * initial
    return support @ ((1 - beta) * identity + beta * weight.t())


def test_gcnii_is_the_papers(block: Block, propagation: Tensor, x: Tensor) -> None:
    model: Any = GCNII(FEATURES, CLASSES, num_layers=4, hidden=HIDDEN, alpha=0.3, theta=0.7).double()
    initial = h = model.encoder.linear(x).relu()
    for n, layer in enumerate(model.layers):
        h = dense_gcnii(propagation, h, initial, layer.conv.weight, 0.3, 0.7, n + 1).relu()
    assert_equal(model([block] * 4, x), nn.functional.linear(h, model.head.weight, model.head.bias))


def test_dagnn_is_the_papers(block: Block, propagation: Tensor, x: Tensor) -> None:
    model: Any = DAGNN(FEATURES, CLASSES, num_layers=6, hidden=HIDDEN).double()
    z = model.encoder.second(model.encoder.first.linear(x).relu())
    hops = [torch.linalg.matrix_power(propagation, k) @ z for k in range(7)]
    stacked = torch.stack(hops, dim=1)  # [N, 7, C]
    score = (stacked @ model.encoder.gate.weight.t()).sigmoid()  # [N, 7, 1]
    assert_equal(model([block] * 6, x), (score.transpose(1, 2) @ stacked).squeeze(1))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.Identity])
def test_resgcn_is_the_papers(norm: Any, block: Block, propagation: Tensor, x: Tensor) -> None:
    model: Any = ResGCN(FEATURES, CLASSES, num_layers=4, hidden=HIDDEN, norm=norm).double()
    layers: list[Any] = list(model.layers)
    h = model.encoder.linear(x)
    for layer in layers:
        h = h + propagation @ layer.norm(h).relu() @ layer.conv.weight.t() + layer.conv.bias
    h = layers[-1].last_norm(h).relu()
    assert_equal(model([block] * 4, x), model.head(h))


def test_the_old_layers_are_exact_in_float64_too(
    block: Block, edge_index: Tensor, propagation: Tensor, x: Tensor
) -> None:
    """Scales in float32 would be off by 1e-8."""
    adjacency = torch.zeros(NODES, NODES, dtype=torch.float64)
    adjacency[edge_index[1], edge_index[0]] = 1
    layers: list[Any] = [kind(FEATURES, HIDDEN).double() for kind in (GCNConv, SAGEConv, GINConv)]
    gcn, sage, gin = layers
    assert_equal(gcn(block, x), propagation @ x @ gcn.weight.t() + gcn.bias)
    mean = adjacency / adjacency.sum(1, keepdim=True).clamp(min=1)
    assert_equal(sage(block, x), sage.neighbour(mean @ x) + sage.own(x))
    assert_equal(gin(block, x), gin.mlp(adjacency @ x + x))


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("num_layers", [1, 2, 128])
def test_any_depth_runs_and_has_gradients_everywhere(kind: Any, num_layers: int, block: Block, x: Tensor) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(kind=kind, num_layers=num_layers, hidden=HIDDEN), FEATURES, CLASSES)
    out = model([block] * num_layers, x.float())
    out.square().sum().backward()
    assert out.shape == (NODES, CLASSES) and out.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("kind", DEEP)
def test_they_train_on_blocks_and_work_layer_by_layer(kind: Any) -> None:
    blocks = chain(40, 20, 10, 4)
    x = torch.randn(40, FEATURES, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    config = ModelConfig(kind=kind, hidden=HIDDEN, dropout=0.1, activation="elu")
    model = build_model(config, FEATURES, CLASSES, num_layers=3)
    check_layer_forward(model, blocks, x)
    labels = torch.tensor([0, 1, 2, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(80):
        loss = nn.functional.cross_entropy(model(blocks, x), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    torch.manual_seed(3)
    first = model(blocks, x)
    assert not torch.equal(first, model(blocks, x))
    torch.manual_seed(3)
    assert torch.equal(first, model(blocks, x))


def chain(*sizes: int) -> list[Block]:
    """Random blocks; each one's destinations are the next one's sources."""
    generator, blocks = torch.Generator().manual_seed(0), []
    for num_src, num_dst in zip(sizes, sizes[1:], strict=False):
        indices = torch.randint(0, num_src, (3 * num_dst,), generator=generator, dtype=torch.int32)
        degrees = torch.randint(3, 9, (num_src,), generator=generator, dtype=torch.int32)
        indptr = torch.arange(0, 3 * num_dst + 1, 3, dtype=torch.int32)
        blocks.append(Block(num_src=num_src, num_dst=num_dst, indptr=indptr, indices=indices, src_degrees=degrees))
    return blocks


def test_dropout_stands_before_every_matrix(block: Block, x: Tensor) -> None:
    """One dropout on at a time changes the output; with none, two passes are equal."""
    for kind in DEEP:
        config = ModelConfig(kind=kind, num_layers=2, hidden=HIDDEN, dropout=0, input_dropout=0)  # type: ignore[arg-type]
        model: Any = build_model(config, FEATURES, CLASSES)
        drops = [module for module in model.modules() if hasattr(module, "salt")]
        before = model([block] * 2, x.float())
        assert torch.equal(model([block] * 2, x.float()), before)
        changes = 0
        for drop in drops:
            drop.p = 0.5
            changes += not torch.equal(model([block] * 2, x.float()), before)
            drop.p = 0.0
        matrices = sum(parameter.ndim == 2 for parameter in model.parameters())
        assert changes >= (2 if kind == "dagnn" else matrices)


def test_configs_say_what_the_deep_kinds_take(block: Block) -> None:
    assert all(needs_degrees(ModelConfig(kind=kind)) for kind in DEEP)  # type: ignore[arg-type]
    assert ModelConfig(kind="resgcn").norm == "layer" and ModelConfig(kind="resgcn", norm="batch").norm == "batch"
    assert ModelConfig.model_validate(ModelConfig(kind="resgcn", norm="none").model_dump()).norm == "none"
    for value, message in (
        ({"kind": "gcnii", "residual": True}, "residual is part of what kind gcnii is"),
        ({"kind": "dagnn", "norm": "layer"}, "kind dagnn has no norms"),
        ({"kind": "gcnii", "alpha": 1.5}, "less than or equal to 1"),
        ({"kind": "gcnii", "theta": 0}, "greater than 0"),
        ({"kind": "dagnn", "hidden": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=message):
            ModelConfig.model_validate(value)
    bare = Block(num_src=NODES, num_dst=NODES, indptr=block.indptr, indices=block.indices)
    model = build_model(ModelConfig(kind="gcnii", num_layers=1), FEATURES, CLASSES)
    with pytest.raises(ValueError, match="GCNIIConv needs the in-degrees"):
        model([bare], torch.zeros(NODES, FEATURES))
