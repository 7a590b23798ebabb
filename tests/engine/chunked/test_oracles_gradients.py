"""Gradients and steps over chunks against a dense program under autograd, finite differences and closed forms."""

from collections.abc import Callable
from itertools import pairwise, permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from penstock.engine.aggregate import aggregate_sum
from penstock.engine.minibatch import Block
from penstock.storage.graph import GraphStore
from tests.engine.chunked.dense_program import check_dense

if TYPE_CHECKING:
    from tests.engine.chunked.conftest import Case

MakeCase = Callable[..., "Case"]
KINDS = ["gcn", "sage", "gat", "gin", "gcnii", "resgcn", "dagnn"]
MODES = ["stale", "surrogate", "gnnpipe", "drop", "mix"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["gcn", "gat", "gcnii"])
def test_every_mode_is_the_dense_program(make_case: MakeCase, kind: str, mode: str) -> None:
    start = "zero" if kind == "gcn" else "exact"
    options = {"history_init": start, "history_period": 1, "epochs": 3, "stages": len(mode) % 3 + 1}
    check_dense(make_case(kind=kind, gradient_mode=mode, recompute=len(mode) % 2 == 0, **options))


@pytest.mark.parametrize("kind", ["sage", "gin", "resgcn", "dagnn"])
def test_every_model_is_the_dense_program(make_case: MakeCase, kind: str) -> None:
    case = make_case(kind=kind, num_layers=4, stages=3, weight_decay=0.01, grad_clip=0.1)
    check_dense(case)


def test_periods_and_moving_averages_are_the_dense_program(make_case: MakeCase) -> None:
    case = make_case(kind="gcnii", epochs=6, history_init="zero")
    check_dense(case.but(history_period=3))
    check_dense(case.but(history_period=2, gradient_mode="gnnpipe"))
    check_dense(case.but(push="ema", ema_gamma=0.6, stages=2))
    check_dense(case.but(push="ema", ema_gamma=0.6, history_period=2, history_init="exact"))


@pytest.mark.parametrize("history", ["zero", "random", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_surrogate_gradient_is_that_of_the_forward_pass_with_constant_histories(
    make_case: MakeCase, kind: str, history: str
) -> None:
    case = make_case(kind=kind, num_layers=4, gradient_mode="surrogate", optimizer="sgd", lr=1.0)
    reference, order = case.reference(), (2, 0, 3, 1)
    rows = reference.exact()
    if history != "exact":
        scale, generator = float(history == "random"), torch.Generator().manual_seed(0)
        rows = {n: scale * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in rows.items()}
    with case.probe() as probe:
        before = probe.weights()
        probe.exact()
        probe.epoch((0, 1, 2, 3))  # leaves messages behind that must not count
        probe.set_history(rows)
        found = probe.gradient(order)
    reference.history = rows
    reference.epoch(order)
    after = reference.model.state_dict()
    assert case.distance(found, {name: before[name] - after[name] for name in before}) < 1e-12


def test_finite_differences_of_the_surrogate_loss(make_case: MakeCase) -> None:
    """Histories held constant, so the loss of an epoch is a function of the weights."""
    case = make_case(kind="gcnii", num_layers=3, activation="elu", gradient_mode="surrogate", optimizer="sgd")
    reference, order, step = case.reference(), (3, 1, 0, 2), 1e-5
    history = {n: rows + 0.1 for n, rows in reference.exact().items()}
    generator = torch.Generator().manual_seed(2)
    with case.probe() as probe:

        def loss(weights: dict[str, Tensor]) -> float:
            probe.rank.model.load_state_dict(weights)
            probe.set_history(history)
            return probe.epoch(order).loss

        weights = probe.weights()
        probe.set_history(history)
        gradient = probe.gradient(order)
        for name, value in weights.items():
            move = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            up, down = loss({**weights, name: value + step * move}), loss({**weights, name: value - step * move})
            assert (up - down) / (2 * step) == pytest.approx(float((gradient[name] * move).sum()), abs=1e-7), name


def test_doubled_gradients_are_right_on_average_for_one_hop_only(make_case: MakeCase) -> None:
    """GNNPipe's estimate, over all orders with exact histories: a path of m hops between chunks counts 2^m / (m+1)!."""
    case = make_case(chunks=3, num_layers=4, gradient_mode="gnnpipe", history_period=1, optimizer="sgd")
    full, orders = case.reference().full_gradient(), list(permutations(range(3)))
    total = {name: torch.zeros_like(value) for name, value in full.items()}
    with case.probe() as probe:
        for order in orders:
            probe.exact()
            for name, value in probe.gradient(order).items():
                total[name] += value / len(orders)

    def error(layer: int) -> float:
        name = f"layers.{layer}.weight"
        return float((total[name] - full[name]).norm() / full[name].norm())

    assert max(error(3), error(2)) < 1e-12
    assert min(error(1), error(0)) > 0.02


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.data())
def test_any_small_run_is_the_dense_program(
    make_case: MakeCase, make_graph: Callable[..., GraphStore], data: st.DataObject
) -> None:
    """Sparse graphs, so that chunks lack edges, halos, mirrors and training nodes in every combination."""
    pick = data.draw
    num_chunks, num_parts = pick(st.integers(1, 5)), pick(st.integers(1, 3))
    num_nodes = num_chunks * num_parts + pick(st.integers(0, 12))
    rng = np.random.default_rng(pick(st.integers(0, 1 << 16)))
    pieces = np.concatenate([np.arange(num_chunks * num_parts), rng.integers(0, num_chunks * num_parts, num_nodes)])
    chunks, parts = np.divmod(rng.permutation(pieces[:num_nodes]), num_parts)
    features = rng.standard_normal((num_nodes, 3)).astype(np.float32)
    edges = rng.integers(0, num_nodes, (pick(st.integers(0, 3 * num_nodes)), 2))
    graph = make_graph(num_nodes, edges, features=features, train=rng.permutation(num_nodes)[: num_nodes // 2 + 1])
    kind, mode = pick(st.sampled_from(KINDS)), pick(st.sampled_from(MODES))
    options = {
        "num_layers": pick(st.integers(2, 4)),
        "stages": pick(st.integers(1, 3 if kind in ("gcnii", "resgcn", "dagnn") else 2)),
        "recompute": pick(st.booleans()),
        "updates_per_epoch": pick(st.integers(1, num_chunks)) if mode == "drop" else 1,
        "history_period": pick(st.integers(1, 3)),
        "history_init": pick(st.sampled_from(["exact", "zero"])),
        "push": pick(st.sampled_from(["copy", "ema"])),
        "dropout": pick(st.sampled_from([0.0, 0.5])),
    }
    check_dense(make_case(graph, chunks, parts, kind=kind, gradient_mode=mode, optimizer="sgd", lr=0.1, **options))


class ScaledSums(nn.Module):
    """h <- w A h, w a number per layer."""

    def __init__(self, num_features: int, num_classes: int, num_layers: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(num_features, num_classes)
        self.layers = nn.ModuleList(ScaledSum() for _ in range(num_layers))

    def forward(self, blocks: list[Block], x: Tensor) -> Tensor:
        x = self.encoder(x)
        for block, layer in zip(blocks, self.layers, strict=True):
            x = layer(block, x)
        return x


class ScaledSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, block: Block, x: Tensor) -> Tensor:
        return self.weight * aggregate_sum(block, x)


def test_paths_weigh_what_their_order_gives_them(make_case: MakeCase, make_graph: Callable[..., GraphStore]) -> None:
    """A chain 0 -> 1 -> 2 -> 3, a chunk per node, a loss at its end: one path, every hop between chunks."""
    hops = 3
    features = np.random.default_rng(0).standard_normal((hops + 1, 2)).astype(np.float32)
    chain = make_graph(
        hops + 1, list(pairwise(range(hops + 1))), features=features, labels=np.arange(4) % 3, train=np.array([hops])
    )
    model: dict[str, Any] = {"kind": "custom", "module": f"{__name__}:ScaledSums", "kwargs": {"num_layers": hops}}
    case = make_case(chain, np.arange(hops + 1), gradient_mode="gnnpipe", history_period=1, optimizer="sgd", **model)
    full = case.reference().full_gradient()

    def coefficient(order: tuple[int, ...], first: int) -> float:
        """Of the path from node `first` to the last: doubled at every hop if it goes with the order, else 0."""
        at = [order.index(node) for node in range(first, hops + 1)]
        return 2.0 ** (hops - first) if at == sorted(at) else 0.0

    with case.probe() as probe:
        for order in permutations(range(hops + 1)):
            probe.exact()
            found = probe.gradient(order)
            for name, value in full.items():
                first = 0 if name.startswith("encoder") else int(name.split(".")[1]) + 1
                expected = coefficient(order, first) * value
                assert torch.allclose(found[name], expected, rtol=1e-12, atol=1e-14), (name, order)


def test_several_updates_are_a_loop_over_clusters(make_case: MakeCase) -> None:
    """GAS: a step per chunk on the loss over its own training nodes, gradients of its own rows only."""
    case = make_case(kind="gcn", gradient_mode="drop", updates_per_epoch=4, epochs=3)
    check_dense(case)
    check_dense(case.but(updates_per_epoch=2, stages=3, recompute=False))

    reference = case.reference()
    reference.history = reference.exact()
    by_hand, chunks = case.reference(), reference.pieces
    history, steps = dict(reference.history), 0
    model: Any = by_hand.model.train()
    for epoch in range(case.train.epochs):
        table = {layer: rows.clone() for layer, rows in history.items()}
        for c in case.order(epoch):
            ids, block = chunks[c].ids, chunks[c].block
            h = model.layer_forward(0, block, by_hand.features[ids])
            for layer in by_hand.layers:
                table[layer][chunks[c].own] = h.detach()
                h = model.layer_forward(layer, block, torch.cat([h, table[layer][ids[len(h) :]]]))
            nodes = int(by_hand.is_train[chunks[c].own].sum())
            by_hand.loss(h, chunks[c].own, nodes).backward()  # type: ignore[no-untyped-call]
            by_hand.optimizer.step()
            by_hand.optimizer.zero_grad()
            steps += 1
        history = table
    assert steps == 12
    assert case.distance(case.run().weights, model.state_dict()) < 1e-11


def test_chunks_and_groups_without_training_nodes(
    make_case: MakeCase, make_graph: Callable[..., GraphStore], lab_graph: GraphStore
) -> None:
    """Their loss is 0, but gradients of others still go through them; a group of them steps on nothing."""
    chunks = np.arange(90) // 23
    edges = np.stack([np.array(lab_graph.indices), np.repeat(np.arange(90), np.diff(lab_graph.indptr))], axis=1)
    features = np.array(lab_graph.features)
    graph = make_graph(90, edges, features=features, labels=np.arange(90) % 3, train=np.arange(50, 90))
    case = make_case(graph, chunks, kind="gcnii", stages=2, weight_decay=0.1)
    check_dense(case)
    check_dense(case.but(gradient_mode="drop", updates_per_epoch=4, optimizer="sgd"))


def test_many_labels_per_node(make_case: MakeCase, make_graph: Callable[..., GraphStore]) -> None:
    rng = np.random.default_rng(1)
    features = rng.standard_normal((70, 4)).astype(np.float32)
    labels = rng.integers(0, 2, (70, 3)).astype(np.uint8)
    graph = make_graph(70, rng.integers(0, 70, (200, 2)), features=features, labels=labels, train=np.arange(40))
    check_dense(make_case(graph, kind="sage", stages=2))
    check_dense(make_case(graph, kind="gat", gradient_mode="drop", updates_per_epoch=3))


def test_weights_of_edges(make_case: MakeCase, make_graph: Callable[..., GraphStore]) -> None:
    rng = np.random.default_rng(6)
    features, weights = rng.standard_normal((60, 4)).astype(np.float32), rng.random(240).astype(np.float32)
    graph = make_graph(60, rng.integers(0, 60, (240, 2)), features=features, weights=weights)
    check_dense(make_case(graph, parts=2, kind="sage", edge_weights=True, stages=2))
