"""Gradients and steps over chunks against a dense program that autograd differentiates, finite differences, closed forms."""

from collections.abc import Callable
from itertools import pairwise, permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from penstock.engine.aggregate import aggregate_sum
from penstock.engine.minibatch import Block
from penstock.storage.graph import GraphStore

if TYPE_CHECKING:
    from tests.engine.chunked.conftest import Case

MakeCase = Callable[..., "Case"]
KINDS = ["gcn", "sage", "gat", "gin", "gcnii", "resgcn", "dagnn"]
MODES = ["stale", "surrogate", "gnnpipe", "drop", "mix"]


def check_against_reference(case: "Case", tolerance: float = 1e-11) -> None:
    """Losses and last weights of a run are those of the dense program."""
    found, reference = case.run(), case.reference()
    if case.chunked.starts_exact:
        reference.history = reference.exact()
    losses = [reference.epoch() for _ in range(case.train.epochs)]
    assert found.losses == pytest.approx(losses, rel=1e-12)
    assert case.distance(found.weights, reference.model.state_dict()) < tolerance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["gcn", "gat", "gcnii"])
def test_every_mode_is_the_dense_program(make_case: MakeCase, kind: str, mode: str) -> None:
    start = "zero" if kind == "gcn" else "exact"
    options = {"history_init": start, "history_period": 1, "epochs": 3, "stages": len(mode) % 3 + 1}
    check_against_reference(make_case(kind=kind, gradient_mode=mode, recompute=len(mode) % 2 == 0, **options))


@pytest.mark.parametrize("kind", ["sage", "gin", "resgcn", "dagnn"])
def test_every_model_is_the_dense_program(make_case: MakeCase, kind: str) -> None:
    case = make_case(kind=kind, num_layers=4, stages=3, weight_decay=0.01, grad_clip=0.1)
    check_against_reference(case)


def test_periods_and_moving_averages_are_the_dense_program(make_case: MakeCase) -> None:
    case = make_case(kind="gcnii", epochs=6, history_init="zero")
    check_against_reference(case.but(history_period=3))
    check_against_reference(case.but(history_period=2, gradient_mode="gnnpipe"))
    check_against_reference(case.but(push="ema", ema_gamma=0.6, stages=2))
    check_against_reference(case.but(push="ema", ema_gamma=0.6, history_period=2, history_init="exact"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("history", ["zero", "random", "exact"])
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
    case = make_case(
        chain, np.arange(hops + 1), gradient_mode="gnnpipe", history_period=1, optimizer="sgd", **model
    )
    full = case.reference().full_gradient()

    def coefficient(order: tuple[int, ...], first: int) -> float:
        """Of the path from node `first` to the last: doubled at every hop if its chunks come in its order, else none."""
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
    check_against_reference(case)
    check_against_reference(case.but(updates_per_epoch=2, stages=3, recompute=False))

    reference = case.reference()
    reference.history = reference.exact()
    by_hand, chunks = case.reference(), reference.pieces
    history, model, steps = dict(reference.history), by_hand.model.train(), 0
    for epoch in range(case.train.epochs):
        table = {layer: rows.clone() for layer, rows in history.items()}
        for c in case.order(epoch):
            ids, block = chunks[c].ids, chunks[c].block
            h = model.layer_forward(0, block, by_hand.features[ids])  # type: ignore[operator]
            for layer in by_hand.layers:
                table[layer][chunks[c].own] = h.detach()
                h = model.layer_forward(layer, block, torch.cat([h, table[layer][ids[len(h) :]]]))  # type: ignore[operator]
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
    check_against_reference(case)
    check_against_reference(case.but(gradient_mode="drop", updates_per_epoch=4, optimizer="sgd"))


def test_many_labels_per_node(make_case: MakeCase, make_graph: Callable[..., GraphStore]) -> None:
    rng = np.random.default_rng(1)
    features = rng.standard_normal((70, 4)).astype(np.float32)
    labels = rng.integers(0, 2, (70, 3)).astype(np.uint8)
    graph = make_graph(70, rng.integers(0, 70, (200, 2)), features=features, labels=labels, train=np.arange(40))
    check_against_reference(make_case(graph, kind="sage", stages=2))
    check_against_reference(make_case(graph, kind="gat", gradient_mode="drop", updates_per_epoch=3))
