import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.chunked.layout import Layout, split_stages
from penstock.engine.chunked.schedule import (
    Action,
    EpochPlan,
    Kind,
    chunk_order,
    cut_groups,
    load_sequence,
    plan_epoch,
    plan_exact,
)


def chunks_of(plan: EpochPlan, rank: int, kind: Kind) -> list[int]:
    return [action.chunk for action in plan.actions[rank] if action.kind is kind]


def test_ranks_are_numbered_stage_first() -> None:
    layout = Layout(3, 2)
    assert [(layout.part_of(rank), layout.stage_of(rank)) for rank in range(layout.num_ranks)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert [layout.prev_rank(rank) for rank in range(6)] == [None, 0, 1, None, 3, 4]
    assert [layout.next_rank(rank) for rank in range(6)] == [1, 2, None, 4, 5, None]
    assert layout.peers(4) == (1,)
    assert Layout(1, 4).peers(2) == (0, 1, 3)


def test_a_layout_without_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="stages=0, parts=2"):
        Layout(0, 2)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.data())
def test_stages_are_the_best_cut(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    cut = split_stages(costs, stages)
    assert [unit for stage in cut for unit in stage] == list(range(len(costs)))
    assert all(cut)
    every_cut = itertools.combinations(range(1, len(costs)), stages - 1)
    best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *bounds, len(costs)))) for bounds in every_cut)
    assert max(sum(costs[stage.start : stage.stop]) for stage in cut) == best


def test_equal_costs_are_cut_evenly() -> None:
    assert [len(stage) for stage in split_stages([1.0] * 7, 3)] == [3, 2, 2]
    assert split_stages([1, 1, 1, 1, 5], 3) == (range(0, 2), range(2, 4), range(4, 5))


def test_more_stages_than_units_are_refused() -> None:
    with pytest.raises(ValueError, match="stages=4 cannot share 3 units .* set stages between 1 and 3"):
        split_stages([1, 1, 1], 4)


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(1, 40))
def test_an_order_is_a_permutation_that_depends_on_its_arguments_alone(seed: int, epoch: int, num_chunks: int) -> None:
    order = chunk_order(seed, epoch, num_chunks)
    assert sorted(order) == list(range(num_chunks))
    assert order == chunk_order(seed, epoch, num_chunks)
    assert chunk_order(seed, epoch, num_chunks, 3) == chunk_order(seed, epoch % 3, num_chunks)


def test_orders_differ_by_epoch_and_seed_and_can_be_turned_off() -> None:
    orders = {chunk_order(seed, epoch, 32) for seed in range(3) for epoch in range(5)}
    assert len(orders) == 15
    assert len({chunk_order(0, epoch, 32, 2) for epoch in range(10)}) == 2
    assert chunk_order(5, 3, 4, shuffle=False) == (0, 1, 2, 3)


def test_every_place_in_the_order_is_as_likely_for_every_chunk() -> None:
    counts = [[0] * 4 for _ in range(4)]
    for epoch in range(4000):
        for place, chunk in enumerate(chunk_order(1, epoch, 4)):
            counts[place][chunk] += 1
    assert all(880 < count < 1120 for row in counts for count in row)  # 1000, standard deviation 27


@given(st.integers(1, 20), st.data())
def test_groups_cut_the_order_evenly(num_chunks: int, data: st.DataObject) -> None:
    updates = data.draw(st.integers(1, num_chunks))
    groups = cut_groups(range(num_chunks), updates)
    assert [chunk for group in groups for chunk in group] == list(range(num_chunks))
    assert len(groups) == updates
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_more_updates_than_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="updates=3 .* there are 2"):
        cut_groups((0, 1), 3)
    with pytest.raises(ValueError, match="updates=2 needs gradient_mode drop, not stale"):
        plan_epoch(Layout(1, 1), epoch=0, order=(0, 1), updates=2, gradient_mode="stale")


def test_a_pipeline_of_two_stages_is_listed_as_the_paper_has_it() -> None:
    plan = plan_epoch(Layout(2, 1), epoch=7, order=(1, 0), recompute=True, defer_weights=False)
    first, last = ([str(action) for action in actions] for actions in plan.actions)
    assert first == [
        "load(chunk=1, phase=forward)",
        "forward(chunk=1)",
        "send(chunk=1, peer=1, phase=forward)",
        "load(chunk=0, phase=forward)",
        "forward(chunk=0)",
        "send(chunk=0, peer=1, phase=forward)",
        "load(chunk=0, phase=backward)",
        "recv(chunk=0, peer=1, phase=backward)",
        "backward(chunk=0)",
        "weight(chunk=0)",
        "load(chunk=1, phase=backward)",
        "recv(chunk=1, peer=1, phase=backward)",
        "backward(chunk=1)",
        "weight(chunk=1)",
        "step(group=0)",
    ]
    assert last == [
        "recv(chunk=1, peer=0, phase=forward)",
        "forward(chunk=1)",
        "recv(chunk=0, peer=0, phase=forward)",
        "forward(chunk=0)",
        "backward(chunk=0)",
        "send(chunk=0, peer=0, phase=backward)",
        "weight(chunk=0)",
        "backward(chunk=1)",
        "send(chunk=1, peer=0, phase=backward)",
        "weight(chunk=1)",
        "step(group=0)",
    ]
    assert load_sequence(plan) == (1, 0, 0, 1)


def test_weight_gradients_trail_by_twice_the_stage_and_end_before_the_step() -> None:
    plan = plan_epoch(Layout(3, 1), epoch=0, order=tuple(range(8)), recompute=False, defer_weights=True)
    for stage in range(3):
        actions = plan.actions[stage]
        behind = [
            sum(a.kind is Kind.BACKWARD for a in actions[:n]) - sum(a.kind is Kind.WEIGHT for a in actions[:n])
            for n, action in enumerate(actions)
            if action.kind is Kind.WEIGHT
        ]
        assert max(behind) == 1 + 2 * stage
        assert chunks_of(plan, stage, Kind.WEIGHT) == chunks_of(plan, stage, Kind.BACKWARD)
        assert actions[-1].kind is Kind.STEP


def test_groups_step_one_by_one_and_each_goes_backward_in_reverse() -> None:
    plan = plan_epoch(Layout(2, 2), epoch=0, order=(3, 1, 0, 2, 4), updates=2, gradient_mode="drop", recompute=False)
    assert plan.groups == ((3, 1), (0, 2, 4))
    assert chunks_of(plan, 1, Kind.FORWARD) == [3, 1, 0, 2, 4]
    assert chunks_of(plan, 1, Kind.BACKWARD) == [1, 3, 4, 2, 0]
    assert [action.group for action in plan.actions[0] if action.kind is Kind.STEP] == [0, 1]
    assert load_sequence(plan) == (3, 1, 0, 2, 4)


def test_parts_do_the_same() -> None:
    plan = plan_epoch(Layout(2, 3), epoch=0, order=(2, 0, 1))
    kinds = [[(a.kind, a.chunk) for a in actions] for actions in plan.actions]
    assert kinds[0] == kinds[2] == kinds[4]
    assert kinds[1] == kinds[3] == kinds[5]


def test_an_exact_pass_computes_layer_by_layer_and_streams_the_last() -> None:
    plan = plan_exact(Layout(2, 1), [range(1, 2), range(2, 4)], 2, epoch=3)
    assert plan.exact and plan.epoch == 3
    assert [str(action) for action in plan.actions[0]] == [
        "load(chunk=0, phase=exact)",
        "enter(chunk=0)",
        "load(chunk=1, phase=exact)",
        "enter(chunk=1)",
        "refresh(chunk=0, layer=1)",
        "send(chunk=0, peer=1, phase=exact)",
        "refresh(chunk=1, layer=1)",
        "send(chunk=1, peer=1, phase=exact)",
    ]
    refreshed = [(action.layer, action.chunk) for action in plan.actions[1] if action.kind is Kind.REFRESH]
    assert refreshed == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert not chunks_of(plan, 1, Kind.SEND)


def test_a_stage_without_hidden_layers_sends_what_it_entered() -> None:
    plan = plan_exact(Layout(2, 1), [range(1, 1), range(1, 2)], 1, epoch=0)
    assert plan.actions[0] == (
        Action(kind=Kind.LOAD, chunk=0, phase="exact"),
        Action(kind=Kind.ENTER, chunk=0, phase="exact"),
        Action(kind=Kind.SEND, chunk=0, peer=1, phase="exact"),
    )
    with pytest.raises(ValueError, match="1 ranges for 2 stages"):
        plan_exact(Layout(2, 1), [range(1, 2)], 1, epoch=0)


def test_a_rank_is_sent_its_own_list_only() -> None:
    plan = plan_epoch(Layout(2, 2), epoch=1, order=(1, 0, 2))
    own = plan.only_for(2)
    assert own.actions == ((), (), plan.actions[2], ()) and (own.epoch, own.order) == (1, (1, 0, 2))
