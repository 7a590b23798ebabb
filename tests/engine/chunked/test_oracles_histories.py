"""What histories become when weights stand still, and what exact passes make of them."""

from collections.abc import Callable
from itertools import permutations
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.engine.chunked.conftest import Case

MakeCase = Callable[..., "Case"]
KINDS = ["gcn", "sage", "gat", "gcnii", "resgcn"]
ORDERS = list(permutations(range(4)))[::5]  # any will do, as long as they differ


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_of_the_nth_aggregation_is_exact_after_n_epochs(make_case: MakeCase, kind: str) -> None:
    """VR-GCN's theorem (Chen et al., ICML 2018). Not one epoch earlier: nothing was refreshed behind our back."""
    case = make_case(kind=kind, num_layers=4, history_init="zero", optimizer="sgd")
    exact = case.reference().exact()
    with case.probe() as probe:
        probe.rank.start_cold()
        for epoch in range(len(exact)):
            errors = [probe.history_error(layer, rows) for layer, rows in exact.items()]
            assert max(errors[:epoch], default=0) < 1e-13
            assert min(errors[epoch:]) > 1e-4
            probe.epoch(ORDERS[epoch])
        assert max(probe.history_error(layer, rows) for layer, rows in exact.items()) < 1e-13


def test_histories_that_stay_for_a_period_take_as_many_epochs_per_layer(make_case: MakeCase) -> None:
    """The input of aggregation n, from 0, is exact after n T + 1 epochs, and not one earlier."""
    period = 3
    case = make_case(kind="gcnii", num_layers=3, history_init="zero", history_period=period, optimizer="sgd")
    exact = case.reference().exact()
    with case.probe() as probe:
        probe.rank.start_cold()
        for epoch in range(2 * period + 1):
            probe.epoch(ORDERS[epoch % len(ORDERS)])
            ended = probe.epochs % period == 0
            for layer, rows in exact.items():
                error = probe.history_error(layer, rows, fresh=not ended)
                assert (error < 1e-13) == (probe.epochs >= layer * period + 1), (layer, probe.epochs, error)
        versions = probe.rank.tables["history-0"].versions
        assert (versions[1] == 2 * period - 1).all() and (versions[0] == 2 * period).all()


@pytest.mark.parametrize("kind", KINDS)
def test_stale_gradients_become_the_full_gradient(make_case: MakeCase, kind: str) -> None:
    """After an epoch per aggregation for histories, as many for gradients, and one; not one epoch earlier."""
    case = make_case(kind=kind, num_layers=3, history_init="zero", optimizer="sgd")
    full = case.reference().full_gradient()
    with case.probe() as probe:
        probe.rank.start_cold()
        needed = 2 * len(probe.layers) + 1
        errors = [case.distance(probe.gradient(ORDERS[n % len(ORDERS)]), full) for n in range(needed)]
    assert errors[0] > 1e-2 and errors[-2] > 1e-7
    assert errors[-1] < 1e-12


def test_full_weight_on_stale_gradients_is_the_stale_mode(make_case: MakeCase) -> None:
    case = make_case(kind="gat", stages=2)
    assert case.equal(case.run(), case.but(gradient_mode="mix", mix_beta=1.0).run())
    assert case.run().losses != case.but(gradient_mode="mix", mix_beta=0.5).run().losses


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_on_exact_histories_is_the_full_loss(make_case: MakeCase, kind: str) -> None:
    case = make_case(kind=kind, num_layers=4, stages=3)
    reference = case.reference()
    full = reference.full_loss().item()
    found = case.run()
    assert found.losses[0] == pytest.approx(full, rel=1e-12)
    assert case.but(history_init="zero", epochs=1).run().losses[0] != pytest.approx(full, rel=1e-4)


@pytest.mark.parametrize("kind", ["gcn", "gcnii"])
def test_a_refresh_before_every_epoch_keeps_losses_full(make_case: MakeCase, kind: str) -> None:
    """And only that: without it, the second epoch reads rows of other weights."""
    case = make_case(kind=kind, epochs=4, refresh_every=1, lr=0.05, stages=2)
    reference, full = case.reference(), []
    for _ in range(4):
        reference.history = reference.exact()
        full.append(reference.full_loss().item())
        reference.epoch()
    assert case.run().losses == pytest.approx(full, rel=1e-12)
    assert case.but(refresh_every=0).run().losses[1] != pytest.approx(full[1], rel=1e-5)


@pytest.mark.parametrize(("stages", "parts"), [(1, 1), (2, 1), (3, 2)])
def test_evaluation_scores_the_whole_graph_and_changes_nothing(make_case: MakeCase, stages: int, parts: int) -> None:
    case = make_case(kind="gcnii", parts=parts, stages=stages, epochs=3, dropout=0.3)
    plain, scored = case.run(), case.but(evaluate_every=1).run(evaluate=("train", "valid"))
    assert plain.losses == scored.losses
    reference = case.reference()
    reference.history = reference.exact()
    for found in scored.state.evaluations:
        reference.epoch()
        reference.model.eval()
        with torch.no_grad():
            loss = reference.full_loss().item()
        assert found["train"]["loss"] == pytest.approx(loss, rel=1e-5)  # counted in float32
        assert found["train"]["num_nodes"] == int(reference.is_train.sum())
        assert found["valid"]["num_nodes"] == int((reference.labels[::2] >= 0).sum())


def test_exact_passes_tell_how_far_histories_were_off(make_case: MakeCase) -> None:
    """Last epoch's rows are close, not equal; the longer they stay, the further off."""
    case = make_case(kind="gcn", num_layers=3, epochs=3, evaluate_every=3, lr=0.02)
    once = case.run(evaluate=("valid",)).history_errors
    kept = case.but(history_period=23, epochs=6, evaluate_every=6).run(evaluate=("valid",)).history_errors
    assert set(once) == {1, 2}
    assert all(0 < once[layer] < kept[layer] < 1 for layer in once)
