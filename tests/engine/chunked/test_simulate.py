from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.schedule import Action, EpochPlan, Kind, plan_epoch, plan_exact
from penstock.engine.chunked.simulate import count_slots, simulate, uniform_costs


def plan(layout: Layout, num_chunks: int, *, recompute: bool = False, defer_weights: bool = False) -> EpochPlan:
    return plan_epoch(layout, epoch=0, order=tuple(range(num_chunks)), recompute=recompute, defer_weights=defer_weights)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 12), st.booleans(), st.booleans())
def test_slots_and_bubble_are_those_of_the_formula(
    stages: int, parts: int, num_chunks: int, recompute: bool, defer_weights: bool
) -> None:
    layout = Layout(stages, parts)
    planned = plan(layout, num_chunks, recompute=recompute, defer_weights=defer_weights)
    assert count_slots(planned, layout) == 2 * (num_chunks + stages - 1)
    uniform = simulate(replace(planned, recompute=False), layout, uniform_costs(layout, num_chunks))
    assert uniform.bubble == pytest.approx((stages - 1) / (num_chunks + stages - 1))
    assert uniform.makespan_s == 2 * (num_chunks + stages - 1)


def test_every_group_fills_the_pipeline_anew() -> None:
    layout = Layout(3, 1)
    planned = plan_epoch(layout, epoch=0, order=range(8), updates=2, gradient_mode="drop", recompute=False)
    assert count_slots(planned, layout) == 2 * 2 * (4 + 3 - 1)


def test_a_chunk_is_at_one_stage_after_the_other() -> None:
    layout = Layout(3, 1)
    spans = simulate(plan(layout, 4), layout, uniform_costs(layout, 4)).spans
    starts = [
        [span[0] for action, span in zip(actions, spans[rank], strict=True) if action.kind is Kind.FORWARD]
        for rank, actions in enumerate(plan(layout, 4).actions)
    ]
    assert starts == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]


@given(st.integers(1, 5), st.integers(1, 8), st.booleans(), st.integers(0, 2**32))
def test_bytes_between_stages_do_not_depend_on_the_chunks(
    stages: int, num_chunks: int, recompute: bool, seed: int
) -> None:
    layout, num_nodes, width, itemsize = Layout(stages, 1), 1000, 16, 4
    bounds = np.sort(np.random.default_rng(seed).integers(0, num_nodes, num_chunks - 1))
    own = np.diff(np.concatenate([[0], bounds, [num_nodes]]))
    costs = replace(
        uniform_costs(layout, num_chunks), wire_bytes=np.tile(own * width * itemsize, (stages, 1)).astype(np.int64)
    )
    found = simulate(plan(layout, num_chunks, recompute=recompute), layout, costs)
    assert found.sent_bytes == 2 * (stages - 1) * num_nodes * width * itemsize
    assert found.exchanged_bytes == found.reduced_bytes == 0


def test_a_slow_wire_is_hidden_where_it_is_faster_than_computing() -> None:
    layout = Layout(2, 1)
    free = uniform_costs(layout, 8)
    wire = np.full((2, 8), 100, np.int64)
    hidden = simulate(plan(layout, 8), layout, replace(free, wire_bytes=wire, bytes_per_s=200.0))
    # half a slot per tensor: only the first on the way there and the last on the way back are waited for
    assert hidden.makespan_s == 2 * (8 + 1) + 2 * 0.5
    exposed = simulate(plan(layout, 8), layout, replace(free, wire_bytes=wire, bytes_per_s=50.0))
    # two slots per tensor: the wire is busy without a pause, and one forward and one backward lie before and after
    assert exposed.makespan_s == 2 * (1 + 8 * 2 + 1)
    late = simulate(plan(layout, 8), layout, replace(free, latency_s=0.25))
    assert late.makespan_s == 2 * (8 + 1) + 2 * 0.25


@pytest.mark.parametrize("later", [1.0, 1.25, 1.5])
def test_deferred_weight_gradients_help_where_later_stages_are_dearer(later: float) -> None:
    layout = Layout(4, 1)
    costs = uniform_costs(layout, 8, weight_s=0.5)
    costs.backward_s[1:] = later
    at_once = simulate(plan(layout, 8), layout, costs)
    deferred = simulate(plan(layout, 8, defer_weights=True), layout, costs)
    assert deferred.busy_s == at_once.busy_s
    if later == 1.0:  # the first stage has no time to fill at its end, and all others wait for it
        assert deferred.makespan_s == at_once.makespan_s == 2 * (8 + 3) + 8 * 0.5
    else:
        assert deferred.makespan_s < at_once.makespan_s
        assert deferred.bubble < at_once.bubble


def test_parts_wait_for_the_slowest_and_pay_for_the_exchange() -> None:
    layout = Layout(1, 2)
    costs = uniform_costs(layout, 2)
    costs = replace(
        costs,
        forward_s=np.array([[1.0, 3.0], [2.0, 1.0]]),
        exchange_s=np.full((2, 2), 0.5),
        exchange_bytes=np.full((2, 2), 7, np.int64),
        step_bytes=11,
    )
    found = simulate(plan(layout, 2), layout, costs)
    assert found.makespan_s == (2 + 3) + (1 + 1) + 4 * 0.5
    assert found.exchanged_bytes == 2 * 2 * 2 * 7
    assert found.reduced_bytes == 2 * 11
    assert found.busy_s == (1 + 3 + 2, 2 + 1 + 2)


def test_recomputing_takes_a_forward_more_and_keeps_one_chunk() -> None:
    layout = Layout(2, 1)
    costs = replace(
        uniform_costs(layout, 4),
        activation_bytes=np.full((2, 4), 100, np.int64),
        input_bytes=np.array([[0] * 4, [10] * 4], np.int64),
        constant_bytes=np.array([1000, 2000]),
    )
    stashed = simulate(plan(layout, 4), layout, costs)
    recomputed = simulate(plan(layout, 4, recompute=True), layout, costs)
    assert stashed.peak_bytes == (1000 + 4 * 100, 2000 + 4 * 100)
    assert recomputed.peak_bytes == (1000 + 100, 2000 + 4 * 10 + 100)
    assert recomputed.makespan_s == stashed.makespan_s + 4 + 1


def test_a_backward_pass_holds_gradients_beside_what_was_kept() -> None:
    layout = Layout(2, 1)
    costs = replace(
        uniform_costs(layout, 4),
        activation_bytes=np.full((2, 4), 100, np.int64),
        gradient_bytes=np.array([[30] * 4, [50] * 4], np.int64),
    )
    assert simulate(plan(layout, 4), layout, costs).peak_bytes == (4 * 100 + 30, 4 * 100 + 50)
    assert simulate(plan(layout, 4, recompute=True), layout, costs).peak_bytes == (100 + 30, 100 + 50)


def test_deferred_weight_gradients_hold_memory_until_they_are_summed() -> None:
    layout = Layout(2, 1)
    costs = replace(uniform_costs(layout, 8), deferred_bytes=np.full((2, 8), 10, np.int64))
    assert simulate(plan(layout, 8), layout, costs).peak_bytes == (10, 10)
    assert simulate(plan(layout, 8, defer_weights=True), layout, costs).peak_bytes == (10, 30)


def test_an_exact_pass_takes_one_forward() -> None:
    layout = Layout(2, 1)
    exact = plan_exact(layout, [range(1, 1), range(1, 3)], 3, epoch=0)
    costs = replace(
        uniform_costs(layout, 3, forward_s=2.0),
        wire_bytes=np.full((2, 3), 5, np.int64),
        activation_bytes=np.full((2, 3), 8, np.int64),
    )
    found = simulate(exact, layout, costs)
    assert found.busy_s == (6, 6)
    # the last stage computes a layer only once it has every chunk
    assert found.makespan_s == 12
    assert found.sent_bytes == 3 * 5
    assert found.peak_bytes == (8, 4)


def test_a_plan_that_cannot_end_is_refused() -> None:
    layout = Layout(2, 1)
    planned = plan(layout, 1)
    waits = (Action(kind=Kind.RECV, chunk=0, peer=1, phase="backward"), *planned.actions[0])
    with pytest.raises(ValueError, match=r"cannot end: ranks \[0, 1\] wait"):
        simulate(replace(planned, actions=(waits, planned.actions[1])), layout, uniform_costs(layout, 1))
