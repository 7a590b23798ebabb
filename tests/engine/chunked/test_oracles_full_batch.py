"""Where training over chunks has to be plain full-graph training: one chunk, one layer, no edges between chunks."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from penstock.storage.graph import GraphStore
from tests.engine.chunked.dense_program import check_plain

if TYPE_CHECKING:
    from tests.engine.chunked.conftest import Case

MakeCase = Callable[..., "Case"]
KINDS = ["gcn", "sage", "gat", "gin", "gcnii", "resgcn", "dagnn"]
MODES = ["stale", "surrogate", "gnnpipe", "drop", "mix"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_chunk_is_plain_training(make_case: MakeCase, kind: str) -> None:
    """With dropout too, drawn as the reference draws: by node, layer and epoch."""
    case = make_case(chunks=1, kind=kind, num_layers=4, dropout=0.4, input_dropout=0.2, epochs=5)
    for stages, start in ((1, "zero"), (2, "exact"), (4, "zero")):
        check_plain(case.but(stages=stages, history_init=start))


def test_one_chunk_is_plain_training_in_every_mode(make_case: MakeCase) -> None:
    case = make_case(chunks=1, kind="gat", attention_dropout=0.3, dropout=0.3, norm="batch", optimizer="sgd")
    for mode in MODES:
        check_plain(case.but(gradient_mode=mode, recompute=mode != "mix"))


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_one_chunk_are_plain_training(make_case: MakeCase, kind: str, parts: int) -> None:
    """Pure graph parallelism: mirrors are exchanged in every layer, nothing is approximated."""
    case = make_case(chunks=1, parts=parts, kind=kind, num_layers=3, dropout=0.3, grad_clip=0.05)
    check_plain(case.but(gradient_mode="drop" if parts == 3 else "stale"))


@pytest.fixture
def islands(make_graph: Callable[..., GraphStore]) -> GraphStore:
    """60 nodes whose edges all stay among the nodes of equal number modulo 3."""
    rng = np.random.default_rng(8)
    edges = rng.integers(0, 20, (150, 2)) * 3 + rng.integers(0, 3, (150, 1))
    features = rng.standard_normal((60, 5)).astype(np.float32)
    return make_graph(60, edges, features=features, labels=rng.integers(0, 3, 60), train=np.arange(40))


@pytest.mark.parametrize("mode", MODES)
def test_chunks_without_edges_between_them_are_plain_training(
    make_case: MakeCase, islands: GraphStore, mode: str
) -> None:
    case = make_case(islands, np.arange(60) % 3, kind="gcnii", dropout=0.5, input_dropout=0.3, gradient_mode=mode)
    check_plain(case.but(stages=2))
    check_plain(case.but(kind="gat", dropout=0.3, attention_dropout=0.4))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["gcn", "gat", "gcnii"])
def test_one_aggregation_is_plain_training(make_case: MakeCase, kind: str, mode: str) -> None:
    """Layers that read features need no history; a halo's features lose what they lose at their owner.

    An encoder's layer does have a history, so its dropout stays off and all but the gradients that it sends is exact.
    """
    if kind != "gcnii":
        check_plain(make_case(kind=kind, num_layers=1, input_dropout=0.5, gradient_mode=mode))
        return
    case = make_case(kind=kind, num_layers=1, optimizer="sgd", gradient_mode=mode, history_init="exact")
    full = case.reference().full_gradient()
    with case.probe() as probe:
        probe.exact()
        found = probe.gradient((1, 0, 3, 2))
    heads = {name: value for name, value in full.items() if not name.startswith("encoder")}
    assert case.distance(found, heads) < 1e-12


def test_dropout_does_not_depend_on_how_the_graph_is_cut(make_case: MakeCase) -> None:
    """One layer over features: the loss of every epoch is that of the same masks over the whole graph."""
    case = make_case(kind="gat", num_layers=1, input_dropout=0.5, attention_dropout=0.5, heads=1, shuffle_chunks=False)
    whole = make_case(chunks=1).but(model=case.model).run()
    for other in (case, make_case(chunks=7, parts=2, stages=1).but(model=case.model)):
        found = other.run()
        assert found.losses == pytest.approx(whole.losses, rel=1e-12)
    assert case.but(seed=1).run().losses[0] != pytest.approx(whole.losses[0], rel=1e-3)
