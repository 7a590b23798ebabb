"""Faults put in on purpose: the checks of the other files have to see every one of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine import layered
from penstock.engine.chunked import planning, schedule, stage
from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.exchange import MirrorExchange
from penstock.engine.chunked.rank import Rank
from penstock.engine.chunked.schedule import EpochPlan, Kind
from penstock.engine.chunked.stage import Position, StageCompute
from penstock.engine.chunked.stepping import StageOptimizer
from penstock.storage.history import RunTable, StaleRead
from tests.engine.chunked.dense_program import check_dense

if TYPE_CHECKING:
    from tests.engine.chunked.conftest import Case

pytestmark = pytest.mark.slow  # a long oracle; gradients and full batches are compared in every run

MakeCase = Callable[..., "Case"]
Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]
Bools = NDArray[np.bool_]


def sees(case: "Case", check: Callable[["Case"], None] = check_dense) -> bool:
    """Whether the check fails, or the run does: on a stale row, or on a loss made of dead ones."""
    try:
        check(case)
    except (AssertionError, StaleRead, ValueError):
        return True
    return False


def change_plan(patch: Patch, change: Callable[[EpochPlan], EpochPlan]) -> None:
    """Change every epoch's plan behind the validator's back."""
    patch.setattr(planning, "plan_epoch", lambda *args, **options: change(schedule.plan_epoch(*args, **options)))
    patch.setattr(planning, "validate_replicas", lambda *args, **options: None)


def flip_backward(plan: EpochPlan) -> EpochPlan:
    """Backward in the order of forward."""
    other = {**dict(zip(plan.order, reversed(plan.order), strict=True)), -1: -1}
    actions = [replace(a, chunk=other[a.chunk]) if a.phase == "backward" else a for a in plan.actions[0]]
    return replace(plan, actions=(tuple(actions),))


def step_too_early(plan: EpochPlan) -> EpochPlan:
    """Step before the last chunk goes backward: it is computed again from weights after the step."""
    (actions,) = plan.actions
    last = max(n for n, action in enumerate(actions) if action.kind is Kind.LOAD)
    return replace(plan, actions=((*actions[:last], actions[-1], *actions[last:-1], actions[-1]),))


def no_messages(self: StageCompute, chunk: int, layer: int, grad_x: Tensor, epoch: int) -> Tensor:
    return grad_x[: self.chunks[chunk].num_own]


def change_freshness(patch: Patch, change: Callable[[Rank, int, Bools], Bools]) -> None:
    """Change whose rows of this epoch a chunk reads, and let nobody look at their age."""
    original = Rank._position

    def position(self: Rank, chunk: int) -> Position:
        found = original(self, chunk)
        return replace(found, is_fresh=change(self, chunk, found.is_fresh))

    patch.setattr(Rank, "_position", position)
    patch.setattr(RunTable, "_check_ages", lambda *args: None)


def draw_anew_in_backward(patch: Patch) -> None:
    original = StageCompute.replay

    def replay(self: StageCompute, chunk: int, at: Position, *args: Any) -> Any:
        return original(self, chunk, replace(at, draw_key=at.draw_key ^ 1), *args)

    patch.setattr(StageCompute, "replay", replay)


def update_statistics_twice(patch: Patch) -> None:
    class Nothing:
        __init__ = __enter__ = __exit__ = lambda *args: None

    patch.setattr(layered, "frozen_statistics", Nothing)


def forget_to_forget(patch: Patch) -> None:
    """Gradients are not zeroed after a step."""

    def step(self: StageOptimizer, rate: float) -> None:
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    patch.setattr(StageOptimizer, "step", step)


def count_all_nodes(patch: Patch) -> None:
    """A group's loss is divided by the training nodes of the graph."""
    original = StageCompute.loss
    patch.setattr(StageCompute, "loss", lambda self, chunk, tape, total: original(self, chunk, tape, 4 * total))


MUTATIONS: dict[str, tuple[Mutation, dict[str, Any]]] = {
    "backward in the order of forward": (
        lambda patch: change_plan(patch, flip_backward),
        {"gradient_mode": "surrogate"},
    ),
    "a step before the last backward": (lambda patch: change_plan(patch, step_too_early), {"lr": 0.05}),
    "no messages": (lambda patch: patch.setattr(StageCompute, "_collect", no_messages), {}),
    "no messages, doubled": (
        lambda patch: patch.setattr(StageCompute, "_collect", no_messages),
        {"gradient_mode": "gnnpipe", "history_period": 1},
    ),
    "messages of the last epoch kept": (
        lambda patch: patch.setattr(StageCompute, "_message_scale", lambda *args: None),
        {"gradient_mode": "surrogate"},
    ),
    "messages not doubled": (
        lambda patch: patch.setattr(ChunkedConfig, "message_weights", lambda self: (1.0, 0.0)),
        {"gradient_mode": "gnnpipe", "history_period": 1},
    ),
    "fresh and past swapped": (lambda patch: change_freshness(patch, lambda rank, c, fresh: ~fresh), {}),
    "fresh rows not used": (
        lambda patch: change_freshness(patch, lambda rank, c, fresh: np.arange(len(fresh)) == c),
        {},
    ),
    "a period one too long": (lambda patch: patch.setattr(ChunkedConfig, "period", 3), {"history_period": 2}),
    "a period one too short": (lambda patch: patch.setattr(ChunkedConfig, "period", 1), {"history_period": 2}),
    "other masks in backward": (draw_anew_in_backward, {"dropout": 0.5}),
    "statistics updated twice": (update_statistics_twice, {"norm": "batch", "optimizer": "sgd"}),
    "gradients kept after a step": (forget_to_forget, {}),
    "losses divided by too much": (count_all_nodes, {"optimizer": "sgd"}),
    "a cold start": (lambda patch: patch.setattr(ChunkedConfig, "starts_exact", False), {}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_dense_program_sees(make_case: MakeCase, monkeypatch: Patch, name: str) -> None:
    mutate, options = MUTATIONS[name]
    case = make_case(kind="gcn", num_layers=4, epochs=5, **options)
    assert not sees(case)
    expected = case.reference()
    if case.chunked.starts_exact:
        expected.history = expected.exact()
    losses = [expected.epoch() for _ in range(case.train.epochs)]

    def check(case: "Case") -> None:
        found = case.run()
        assert case.distance(found.weights, expected.model.state_dict()) < 1e-6
        assert found.losses == pytest.approx(losses, rel=1e-6)

    assert not sees(case, check)
    mutate(monkeypatch)
    assert sees(case, check)


def test_parts_see_mirrors_that_stay_away(make_case: MakeCase, monkeypatch: Patch) -> None:
    """Gradients of mirrors are not sent back to their owners, or are added to the wrong rows."""
    case = make_case(kind="gcnii", parts=2)
    one = case.but(parts=1).run()

    def check(case: "Case") -> None:
        assert case.distance(case.run().weights, one.weights) < 1e-9

    check(case)
    original = MirrorExchange.gradients
    with monkeypatch.context() as patch:
        patch.setattr(MirrorExchange, "gradients", lambda self, data, slab: slab[: data.num_own])
        assert sees(case, check)
    with monkeypatch.context() as patch:
        rolled = lambda self, data, slab: original(self, data, slab).roll(1, 0)  # noqa: E731
        patch.setattr(MirrorExchange, "gradients", rolled)
        assert sees(case, check)


def test_stages_see_a_replay_of_other_rows(make_case: MakeCase, monkeypatch: Patch) -> None:
    """The rows that entered a stage are read back with one bit less."""
    case = make_case(kind="gcn", num_layers=3, dtype="float32")
    one, original = case.run(), stage.StageCompute.replay

    def replay(self: StageCompute, chunk: int, at: Position, entry: Tensor, initial: Tensor | None) -> Any:
        rounded = entry if self.enters else torch.nextafter(entry, torch.zeros(()))
        return original(self, chunk, at, rounded, initial)

    assert case.equal(case.but(stages=2).run(), one)
    monkeypatch.setattr(StageCompute, "replay", replay)
    assert not case.equal(case.but(stages=2).run(), one)
