"""What must not change results: stages, recomputation, deferred weights, storage of histories; parts but for sums."""

from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from penstock.storage.graph import GraphStore

if TYPE_CHECKING:
    from tests.engine.chunked.conftest import Case

pytestmark = pytest.mark.slow  # a long oracle; gradients and full batches are compared in every run

MakeCase = Callable[..., "Case"]
MODELS: list[dict[str, Any]] = [
    {"kind": "gcn", "dropout": 0.4, "input_dropout": 0.2, "norm": "batch", "num_layers": 5},
    {"kind": "sage", "dropout": 0.4, "norm": "layer", "residual": True, "aggregator": "max", "num_layers": 5},
    {"kind": "gat", "dropout": 0.3, "attention_dropout": 0.3, "num_layers": 5},
    {"kind": "gin", "norm": "batch", "num_layers": 5},
    {"kind": "gcnii", "dropout": 0.5, "num_layers": 4},
    {"kind": "resgcn", "dropout": 0.2, "num_layers": 4},
    {"kind": "resgcn", "dropout": 0.2, "norm": "batch", "num_layers": 4},
    {"kind": "dagnn", "dropout": 0.3, "num_layers": 4},
]


def name_of(model: dict[str, Any]) -> str:
    return f"{model['kind']}-{model.get('norm', '')}"


@pytest.mark.parametrize("model", MODELS, ids=name_of)
def test_stages_do_not_change_a_bit(make_case: MakeCase, model: dict[str, Any]) -> None:
    """Nor does what is recomputed, nor when weight gradients are added; 1, 2, 4 and 5 stages of 5 units."""
    case = make_case(dtype="float32", epochs=3, grad_clip=0.2, **model)
    first = case.run()
    variants: list[dict[str, Any]] = [
        {"stages": 2},
        {"stages": 4, "recompute": False},
        {"stages": 5, "defer_weights": False},
    ]
    for variant in variants:
        assert case.equal(case.but(**variant).run(), first), variant
    double = case.but(dtype="float64")
    assert case.equal(double.but(stages=3, recompute=False).run(), double.run())


@pytest.mark.parametrize("mode", ["surrogate", "gnnpipe", "drop", "mix"])
def test_stages_do_not_change_a_bit_in_any_mode(make_case: MakeCase, mode: str) -> None:
    options = {"updates_per_epoch": 3} if mode == "drop" else {"history_period": 2}
    case = make_case(kind="gcnii", dtype="float32", gradient_mode=mode, dropout=0.4, push="ema", **options)
    first = case.run()
    for stages, recompute in ((2, False), (3, True), (4, True)):
        assert case.equal(case.but(stages=stages, recompute=recompute).run(), first)


def test_histories_in_half_precision_do_not_depend_on_stages(make_case: MakeCase) -> None:
    """Only what chunks read of each other is rounded, not what a stage starts from."""
    case = make_case(kind="gcn", dtype="float32", num_layers=4, history_dtype="bfloat16")
    half, whole = case.run(), case.but(history_dtype="float32").run()
    for stages, recompute in ((3, True), (3, False), (1, False)):
        assert case.equal(case.but(stages=stages, recompute=recompute).run(), half)
    assert half.losses != whole.losses and half.losses == pytest.approx(whole.losses, rel=0.02)


@pytest.mark.parametrize("mode", ["stale", "surrogate", "gnnpipe", "drop", "mix"])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_change_only_the_order_of_sums(make_case: MakeCase, parts: int, mode: str) -> None:
    """The same logical chunks, whole or in pieces on several ranks."""
    kind = {"stale": "gcnii", "surrogate": "gat", "gnnpipe": "sage", "drop": "resgcn", "mix": "gcn"}[mode]
    case = make_case(kind=kind, parts=parts, gradient_mode=mode, dropout=0.3, grad_clip=0.2, history_period=2)
    one = case.but(parts=1).run()
    for stages in (1, 2):
        found = case.but(stages=stages).run()
        assert found.losses == pytest.approx(one.losses, rel=1e-12)
        assert case.distance(found.weights, one.weights) < 1e-11


@pytest.mark.parametrize("kind", ["gcn", "gat", "gcnii", "dagnn"])
def test_parts_in_single_precision(make_case: MakeCase, kind: str) -> None:
    case = make_case(kind=kind, parts=2, dtype="float32", optimizer="sgd", lr=0.1, dropout=0.3)
    one, found = case.but(parts=1).run(), case.but(stages=2).run()
    assert found.losses == pytest.approx(one.losses, rel=2e-6)
    assert case.distance(found.weights, one.weights) < 2e-6


def test_updates_of_parts(make_case: MakeCase) -> None:
    case = make_case(kind="gcn", parts=2, gradient_mode="drop", updates_per_epoch=2)
    one, found = case.but(parts=1).run(), case.run()
    assert found.losses == pytest.approx(one.losses, rel=1e-12)
    assert case.distance(found.weights, one.weights) < 1e-11


def test_a_part_may_lack_edges_and_training_nodes(make_case: MakeCase) -> None:
    """Nodes from 80 on have no edges at all: their part has nothing to mirror and nothing to send."""
    parts = (np.arange(90) >= 80).astype(np.int32)
    chunks = np.arange(90) % 3
    case = make_case(chunks=chunks, parts=parts, kind="gcnii", stages=2)
    one = case.but(parts=1).run()
    assert case.distance(case.run().weights, one.weights) < 1e-11


def relabelled(graph: GraphStore, make_graph: Callable[..., GraphStore], new: Any) -> GraphStore:
    """The graph whose node `new[n]` is node n of the given one; in-edges keep their order."""
    targets = np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))
    features, labels = np.empty_like(graph.features), np.empty_like(graph.labels)
    features[new], labels[new] = graph.features, graph.labels
    edges = np.stack([new[np.array(graph.indices)], new[targets]], axis=1)
    return make_graph(
        graph.num_nodes, edges, features=features, labels=labels, train=np.sort(new[np.array(graph.split_ids("train"))])
    )


@pytest.mark.parametrize("kind", ["gcn", "gat", "gcnii"])
def test_names_of_nodes_and_chunks_do_not_matter(
    make_case: MakeCase, make_graph: Callable[..., GraphStore], lab_graph: GraphStore, kind: str
) -> None:
    rng = np.random.default_rng(4)
    new, chunk_names = rng.permutation(90), rng.permutation(4)
    options: dict[str, Any] = {"kind": kind, "optimizer": "sgd", "lr": 1.0}
    case = make_case(**options)
    labels = np.empty(90, np.int32)
    labels[new] = chunk_names[case.chunks]
    other = make_case(relabelled(lab_graph, make_graph, new), labels, **options)
    found = []
    for which, names in ((case, np.arange(4)), (other, chunk_names)):
        with which.probe() as probe:
            probe.exact()
            for order in ((2, 0, 3, 1), (1, 3, 0, 2)):
                probe.epoch([int(names[c]) for c in order], 0.1)
            found.append(probe.weights())
    assert case.distance(*found) < 1e-12


@pytest.mark.parametrize(("kind", "per_node"), [("gcn", 1), ("gcnii", 2)])
def test_stages_send_every_row_once_each_way(make_case: MakeCase, kind: str, per_node: int) -> None:
    """2 (S - 1) N H elements an epoch whatever the number of chunks, twice as many with initial representations."""
    for stages, chunks in product((1, 2, 4), (1, 5)):
        case = make_case(chunks=chunks, kind=kind, num_layers=4, stages=stages, epochs=1)
        sent = sum(report.bytes_sent for report in case.run().reports)
        assert sent == 2 * (stages - 1) * 90 * 8 * per_node * 8


@pytest.mark.parametrize(("stages", "parts", "mode"), [(1, 2, "stale"), (1, 3, "drop"), (3, 2, "surrogate")])
def test_parts_send_mirrors_and_gradients_of_weights(make_case: MakeCase, stages: int, parts: int, mode: str) -> None:
    """Rows of mirrors and their gradients once per hidden layer, every part's weight gradients to every other."""
    case = make_case(kind="gcnii", num_layers=3, stages=stages, parts=parts, epochs=1, gradient_mode=mode)
    store = case.store()
    mirrors = sum(int(store.part(w).chunk(c).mirror_counts.sum()) for w in range(parts) for c in range(4))
    num_parameters = sum(parameter.numel() for parameter in case.build().parameters())
    rows = 2 * 3 * mirrors * 8 + 2 * (stages - 1) * 90 * 16
    sent = sum(report.bytes_sent for report in case.run().reports)
    assert sent == 8 * (rows + parts * (parts - 1) * num_parameters)


@pytest.mark.parametrize("options", [{}, {"gradient_mode": "gnnpipe", "history_period": 2}, {"push": "ema"}])
def test_where_histories_lie_does_not_change_a_bit(make_case: MakeCase, options: dict[str, Any]) -> None:
    case = make_case(kind="gcnii", num_layers=3, dtype="float32", stages=2, **options)
    memory = case.but(history_storage="memory").run()
    small: dict[str, Any] = {"history_memory": 128 << 10}
    for variant in ({"history_storage": "mmap"}, {"history_storage": "disk", **small}, small):
        found = case.but(**variant).run()
        assert case.equal(found, memory), variant
    assert sum(report.history_written_bytes for report in memory.reports) == 0
    on_disk = case.but(history_storage="disk", **small).run()
    assert all(report.history_read_bytes > 0 and report.history_written_bytes > 0 for report in on_disk.reports)


def test_histories_on_disk_with_parts_and_half_precision(make_case: MakeCase) -> None:
    case = make_case(kind="sage", parts=2, dtype="float32", history_dtype="bfloat16", dropout=0.2)
    assert case.equal(case.but(history_storage="disk").run(), case.but(history_storage="memory").run())


def test_more_updates_read_no_more_of_the_disk(make_case: MakeCase) -> None:
    """What is read ahead on the way back ends with the group."""
    case = make_case(kind="gcn", gradient_mode="drop", history_storage="disk", epochs=3)
    one, four = (case.but(updates_per_epoch=updates).run().reports[0] for updates in (1, 4))
    assert 0 < four.history_read_bytes <= one.history_read_bytes


def test_poisoned_tables_leave_no_trace(make_case: MakeCase) -> None:
    """What is dead is NaN in all these tests; a run without gives the same bits, so no dead row was ever read."""
    case = make_case(kind="gat", dtype="float32")
    found = case.run()
    assert all(torch.isfinite(tensor).all() for tensor in found.weights.values())
    assert case.equal(case.but(poison=False).run(), found)
