"""The earliest slot is that of a rank that waits for nobody, wherever all of them stop."""

import pytest

from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.schedule import Kind, plan_epoch, plan_exact
from penstock.engine.supervision.slots import slots_of


@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(3, 1), Layout(2, 2)])
@pytest.mark.parametrize("exact", [False, True])
def test_slots_order_whatever_waits(layout: Layout, exact: bool) -> None:
    if exact:
        plan = plan_exact(layout, [range(stage, stage + 1) for stage in range(layout.stages)], 8, 2)
    else:
        plan = plan_epoch(layout, epoch=2, order=(3, 1, 0, 2, 4, 5, 7, 6))
    slot_of = slots_of(layout, [(plan.only_for(rank), "rates") for rank in range(layout.num_ranks)])
    lanes: dict[tuple[int, int, str], list[float]] = {}
    for rank, actions in enumerate(plan.actions):
        slots = [slot_of(rank, done) for done in range(len(actions) + 1)]
        assert all(slot > 0 for slot in slots) and slots[-1] == max(slots)
        for action, slot in zip(actions, slots, strict=False):
            if action.kind is Kind.SEND:
                lanes.setdefault((rank, action.peer, action.phase), []).append(slot)
    for rank, actions in enumerate(plan.actions):
        for done, action in enumerate(actions):
            if action.kind is Kind.RECV:
                assert lanes[action.peer, rank, action.phase].pop(0) < slot_of(rank, done)
    assert not any(lanes.values())


def test_without_a_plan_the_least_done_is_the_earliest() -> None:
    slot_of = slots_of(Layout(1, 1), [("folder",)])
    assert [slot_of(0, done) for done in (0, 7)] == [0.0, 7.0]
