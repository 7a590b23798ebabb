"""Dropout and norms over chunks: masks belong to nodes, batch norms to chunks, layer norms to rows."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from tests.engine.chunked.dense_program import check_dense

if TYPE_CHECKING:
    from tests.engine.chunked.conftest import Case

pytestmark = pytest.mark.slow  # a long oracle; gradients and full batches are compared in every run

MakeCase = Callable[..., "Case"]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("kind", ["gcn", "gat", "gcnii", "resgcn", "dagnn"])
def test_dropout_in_backward_is_that_of_forward(make_case: MakeCase, kind: str, recompute: bool) -> None:
    """And every reader of a row drops of it what its owner drops."""
    case = make_case(kind=kind, num_layers=3, dropout=0.5, input_dropout=0.3, recompute=recompute)
    check_dense(case.but(stages=2, **({"attention_dropout": 0.4} if kind == "gat" else {})))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("kind", ["gcn", "resgcn"])
def test_a_batch_norm_normalises_by_chunk_and_counts_each_once(make_case: MakeCase, kind: str, recompute: bool) -> None:
    """Running statistics take one step per chunk and epoch, also where a chunk is computed twice."""
    case = make_case(kind=kind, norm="batch", recompute=recompute, stages=2, epochs=3, optimizer="sgd", lr=0.1)
    check_dense(case)
    weights = case.run().weights
    counts = [int(value) for name, value in weights.items() if name.endswith("num_batches_tracked")]
    assert counts and set(counts) == {3 * case.num_chunks}


def test_evaluations_and_refreshes_leave_running_statistics_alone(make_case: MakeCase) -> None:
    case = make_case(kind="gcn", norm="batch", stages=2)
    plain, scored = case.run(), case.but(evaluate_every=1).run(evaluate=("valid",))
    assert plain.losses == scored.losses
    refreshed = case.but(refresh_every=2).run().weights
    assert {int(t) for name, t in refreshed.items() if name.endswith("tracked")} == {4 * case.num_chunks}


def test_parts_normalise_by_their_own_piece_and_share_statistics(make_case: MakeCase) -> None:
    """A part's batch is its piece of a chunk, so results differ from one part's. Evaluation is of what is saved."""
    case = make_case(kind="gcn", norm="batch", parts=3, evaluate_every=4, lr=0.05)
    one, found = case.but(parts=1).run(evaluate=("train",)), case.run(evaluate=("train",))
    assert found.losses != one.losses
    model = case.reference()
    model.model.load_state_dict(found.weights)
    model.model.eval()
    assert found.state.evaluations[-1]["train"]["loss"] == pytest.approx(model.full_loss().item(), rel=1e-6)
    assert case.equal(case.but(stages=3, recompute=False).run(), case.but(evaluate_every=0).run())


@pytest.mark.parametrize("kind", ["gcn", "sage", "resgcn"])
def test_a_layer_norm_does_not_notice_chunks(make_case: MakeCase, kind: str) -> None:
    """On exact histories the loss is the full one, and the dense program's afterwards."""
    case = make_case(kind=kind, norm="layer", num_layers=4, residual=kind == "sage", activation="elu")
    reference = case.reference()
    assert case.run().losses[0] == pytest.approx(reference.full_loss().item(), rel=1e-12)
    check_dense(case.but(stages=3))


def test_masks_change_with_epoch_and_seed_only(make_case: MakeCase) -> None:
    """At rate zero on exact histories, a model of one layer loses the same again only with the same masks."""
    case = make_case(kind="gcn", num_layers=1, input_dropout=0.5, optimizer="sgd", lr=1e-30, cycle_orders=1)
    losses = case.run().losses
    assert len(set(losses)) == len(losses)
    again = case.but(shuffle_chunks=False).run().losses
    assert again == pytest.approx(losses, rel=1e-13)
    assert case.but(seed=3).run().losses[0] != pytest.approx(losses[0], rel=1e-6)
    dry = case.but(input_dropout=0.0).run().losses
    assert torch.tensor(dry).std() < 1e-13
