from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.chunked.config import GradientMode
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.schedule import Action, EpochPlan, Kind, chunk_order, plan_epoch, plan_exact
from penstock.engine.chunked.validate import ScheduleError, history_versions, validate_plan

MODES: list[GradientMode] = ["stale", "surrogate", "gnnpipe", "drop", "mix"]
LAYOUT = Layout(3, 2)


def plan(mode: GradientMode = "stale", updates: int = 1, *, recompute: bool = True, epoch: int = 5) -> EpochPlan:
    order = chunk_order(0, epoch, 4)
    return plan_epoch(
        LAYOUT, epoch=epoch, order=order, updates=updates, gradient_mode=mode, recompute=recompute, defer_weights=True
    )


def find(plan: EpochPlan, rank: int, kind: Kind, nth: int = 0, phase: str | None = None) -> int:
    """Position of the nth action of a kind in a rank's list."""
    actions = enumerate(plan.actions[rank])
    return [n for n, a in actions if a.kind is kind and (phase is None or a.phase == phase)][nth]


def edit(plan: EpochPlan, ranks: Sequence[int], change: dict[int, Sequence[Action]]) -> EpochPlan:
    """Put other actions in the place of those at some positions of some ranks' lists."""
    lists = list(plan.actions)
    for rank in ranks:
        lists[rank] = tuple(new for n, old in enumerate(lists[rank]) for new in change.get(n, (old,)))
    return replace(plan, actions=tuple(lists))


def swap(plan: EpochPlan, ranks: Sequence[int], first: int, second: int) -> EpochPlan:
    actions = plan.actions[ranks[0]]
    return edit(plan, ranks, {first: (actions[second],), second: (actions[first],)})


def move(plan: EpochPlan, ranks: Sequence[int], source: int, after: int) -> EpochPlan:
    actions = plan.actions[ranks[0]]
    return edit(plan, ranks, {source: (), after: (actions[after], actions[source])})


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 6),
    st.sampled_from(MODES),
    st.booleans(),
    st.booleans(),
    st.integers(0, 50),
    st.integers(1, 25),
    st.data(),
)
def test_every_planned_epoch_is_sound(
    stages: int,
    parts: int,
    num_chunks: int,
    mode: GradientMode,
    recompute: bool,
    defer_weights: bool,
    epoch: int,
    period: int,
    data: st.DataObject,
) -> None:
    layout = Layout(stages, parts)
    updates = data.draw(st.integers(1, num_chunks)) if mode == "drop" else 1
    planned = plan_epoch(
        layout,
        epoch=epoch,
        order=chunk_order(3, epoch, num_chunks),
        updates=updates,
        gradient_mode=mode,
        recompute=recompute,
        defer_weights=defer_weights,
    )
    validate_plan(planned, layout, period=period, messages=(epoch - 1,) * num_chunks)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2))
def test_every_planned_exact_pass_is_sound(sizes: list[int], parts: int, num_chunks: int, first: int) -> None:
    layout = Layout(len(sizes), parts)
    bounds = [first + sum(sizes[:stage]) for stage in range(len(sizes) + 1)]
    layers = [range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
    exact = plan_exact(layout, layers, num_chunks, epoch=1)
    validate_plan(exact, layout)
    validate_plan(exact, layout, stage_layers=layers)


@given(st.data())
def test_no_action_may_be_left_out_or_done_twice(data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(MODES))
    sound = plan(mode, recompute=data.draw(st.booleans()))
    rank = data.draw(st.integers(0, LAYOUT.num_ranks - 1))
    position = data.draw(st.integers(0, len(sound.actions[rank]) - 1))
    action = sound.actions[rank][position]
    # in one part alone, and in all parts at once: the parts agree, and it is wrong all the same
    for ranks in ([rank], [LAYOUT.stage_of(rank), LAYOUT.stages + LAYOUT.stage_of(rank)]):
        for instead in ((), (action, action)):
            with pytest.raises(ScheduleError, match=r"epoch 5, rank \d, action \d+ of \d+, "):
                validate_plan(edit(sound, ranks, {position: instead}), LAYOUT)


def _depend(first: Action, second: Action) -> bool:
    """Whether two actions of a rank may not change places: some order is fixed, or one needs the other."""
    kinds = {first.kind, second.kind}
    return kinds in ({Kind.FORWARD}, {Kind.BACKWARD}) or (Kind.BACKWARD in kinds and first.chunk == second.chunk)


@given(st.sampled_from(["stale", "surrogate", "gnnpipe", "mix"]), st.integers(0, LAYOUT.num_ranks - 1), st.data())
def test_actions_that_depend_on_each_other_may_not_change_places(
    mode: GradientMode, rank: int, data: st.DataObject
) -> None:
    sound = plan(mode)
    actions = sound.actions[rank]
    pairs = [(m, n) for n, second in enumerate(actions) for m in range(n) if _depend(actions[m], second)]
    with pytest.raises(ScheduleError):
        validate_plan(swap(sound, [rank], *data.draw(st.sampled_from(pairs))), LAYOUT)


def test_the_message_names_rank_position_action_and_reason() -> None:
    sound = plan()
    position = find(sound, 4, Kind.FORWARD, 1)
    chunk = sound.order[1]
    wrong = edit(sound, [4], {position - 1: ()})
    with pytest.raises(ScheduleError) as caught:
        validate_plan(wrong, LAYOUT)
    assert str(caught.value) == (
        f"epoch 5, rank 4, action {position - 1} of {len(wrong.actions[4])}, forward(chunk={chunk}): "
        "goes forward without its rows; LOAD or RECV must come before"
    )


def test_backward_in_forward_order_is_refused_but_for_drop() -> None:
    layout = Layout(1, 1)
    for mode in MODES:
        sound = plan_epoch(layout, epoch=0, order=(2, 0, 1), gradient_mode=mode, recompute=False, defer_weights=False)
        forward = [Action(kind=Kind.LOAD, chunk=c) for c in sound.order]
        forward += [Action(kind=Kind.FORWARD, chunk=c) for c in sound.order]
        backward = [
            Action(kind=kind, chunk=c, phase="backward") for c in sound.order for kind in (Kind.BACKWARD, Kind.WEIGHT)
        ]
        wrong = replace(sound, actions=((*forward, *backward, sound.actions[0][-1]),))
        if mode == "drop":
            validate_plan(wrong, layout)
        else:
            with pytest.raises(ScheduleError, match="not in reverse order: chunk 1 comes next"):
                validate_plan(wrong, layout)


def test_a_weight_gradient_after_its_step_or_out_of_order_is_refused() -> None:
    sound = plan()
    last = len(sound.actions[2]) - 1
    with pytest.raises(ScheduleError, match="without WEIGHT of chunks"):
        validate_plan(move(sound, [2, 5], last - 1, last), LAYOUT)
    with pytest.raises(ScheduleError, match="weight gradients must be summed in backward order"):
        validate_plan(swap(sound, [2], last - 2, last - 1), LAYOUT)
    weight, backward = find(sound, 0, Kind.WEIGHT), find(sound, 0, Kind.BACKWARD)
    with pytest.raises(ScheduleError, match="needs its BACKWARD first"):
        validate_plan(swap(sound, [0, 3], backward, weight), LAYOUT)


def test_backward_after_the_step_of_its_group_is_refused() -> None:
    sound = plan("drop", updates=2, recompute=False)
    step = find(sound, 2, Kind.STEP)
    # the next group's forward before this group's step: it would use other weights in backward
    with pytest.raises(ScheduleError, match="goes forward with the weights of another group"):
        validate_plan(move(sound, [2, 5], step, step + 2), LAYOUT)
    send = find(sound, 2, Kind.SEND, 1)
    with pytest.raises(ScheduleError, match="without backward SEND of chunks"):
        validate_plan(move(sound, [2, 5], send, step), LAYOUT)


def test_a_wrong_peer_or_a_wrong_chunk_is_refused() -> None:
    sound = plan()
    for kind, phase, rank, peer in (
        (Kind.RECV, "forward", 1, 3),
        (Kind.SEND, "backward", 4, 0),
        (Kind.SEND, "forward", 2, 0),
    ):
        if rank == 2:
            bad = edit(sound, [2], {1: (sound.actions[2][1], Action(kind=kind, chunk=sound.order[0], peer=peer))})
        else:
            position = find(sound, rank, kind, phase=phase)
            bad = edit(sound, [rank], {position: (replace(sound.actions[rank][position], peer=peer),)})
        with pytest.raises(ScheduleError, match="must (receive from|send to) rank"):
            validate_plan(bad, LAYOUT)
    position = find(sound, 1, Kind.RECV)
    bad = edit(sound, [1], {position: (replace(sound.actions[1][position], chunk=9),)})
    with pytest.raises(ScheduleError, match="no such chunk"):
        validate_plan(bad, LAYOUT)


def test_sends_in_another_order_than_receives_are_refused() -> None:
    sound = plan_epoch(Layout(2, 1), epoch=0, order=(0, 1), recompute=False)
    first = list(sound.actions[0])
    sends = [find(sound, 0, Kind.SEND, n) for n in (0, 1)]
    late = Action(kind=Kind.SEND, chunk=0, peer=1)
    wrong = edit(sound, [0], {sends[0]: (), sends[1]: (first[sends[1]], late)})
    with pytest.raises(ScheduleError, match=r"rank 1, action 0 of \d+, recv\(.*\): rank 0 sends chunk 1 then"):
        validate_plan(wrong, Layout(2, 1))


def test_a_receive_that_waits_for_what_waits_for_it_is_a_deadlock() -> None:
    layout = Layout(2, 1)
    sound = plan_epoch(layout, epoch=0, order=(0,), recompute=False)
    send, recv = find(sound, 0, Kind.SEND), find(sound, 0, Kind.RECV)
    assert recv == send + 1
    with pytest.raises(ScheduleError, match="deadlock, sends buffered: rank 0 at recv.*; rank 1 at recv"):
        validate_plan(swap(sound, [0], send, recv), layout)


def _ends(num_chunks: int) -> EpochPlan:
    """The first stage sends everything before it takes anything back, the last goes backward chunk by chunk."""
    base = plan_epoch(Layout(2, 1), epoch=0, order=range(num_chunks), gradient_mode="drop", recompute=False)
    first, last = [], []
    for c in base.order:
        first += [Action(kind=Kind.LOAD, chunk=c), Action(kind=Kind.FORWARD, chunk=c)]
        first += [Action(kind=Kind.SEND, chunk=c, peer=1)]
        last += [Action(kind=Kind.RECV, chunk=c, peer=0), Action(kind=Kind.FORWARD, chunk=c)]
        last += [Action(kind=Kind.BACKWARD, chunk=c), Action(kind=Kind.SEND, chunk=c, peer=0, phase="backward")]
        last += [Action(kind=Kind.WEIGHT, chunk=c)]
    for c in base.order:
        first += [Action(kind=Kind.RECV, chunk=c, peer=1, phase="backward")]
        first += [Action(kind=Kind.BACKWARD, chunk=c), Action(kind=Kind.WEIGHT, chunk=c)]
    step = Action(kind=Kind.STEP, group=0)
    return replace(base, actions=((*first, step), (*last, step)))


def test_a_list_that_ends_only_with_buffered_sends_is_refused() -> None:
    validate_plan(_ends(3), Layout(2, 1))
    with pytest.raises(ScheduleError, match=r"deadlock, sends unbuffered: rank 0 at send\(.*; rank 1 at send\("):
        validate_plan(_ends(4), Layout(2, 1))


def test_parts_that_disagree_are_refused() -> None:
    layout = Layout(1, 2)
    sound = plan_epoch(layout, epoch=0, order=(0, 1), gradient_mode="drop", recompute=False, defer_weights=False)
    backward, later = find(sound, 1, Kind.BACKWARD), find(sound, 1, Kind.BACKWARD, 1)
    actions = sound.actions[1]
    wrong = edit(
        sound,
        [1],
        {
            backward: (actions[later],),
            backward + 1: (actions[later + 1],),
            later: (actions[backward],),
            later + 1: (actions[backward + 1],),
        },
    )
    with pytest.raises(ScheduleError, match=r"rank 1, action \d+ .*: rank 0 of the same stage does backward"):
        validate_plan(wrong, layout)


def test_a_row_older_than_the_bound_is_refused() -> None:
    sound = plan(epoch=5)
    validate_plan(sound, LAYOUT, past=[4, 4, 4, 4])
    with pytest.raises(
        ScheduleError, match=r"rank 0, .* reads history of chunk \d that is 2 epochs old, outside 1\.\.1"
    ):
        validate_plan(sound, LAYOUT, past=[3 if c == sound.order[-1] else 4 for c in range(4)])
    # the first chunk of the order is read fresh by all others, and a chunk's own rows never come from history
    validate_plan(sound, LAYOUT, past=[-1 if c == sound.order[0] else 4 for c in range(4)])
    with pytest.raises(ScheduleError, match="0 epochs old"):
        validate_plan(sound, LAYOUT, past=[5, 5, 5, 5])


def test_histories_are_as_old_as_the_period_says() -> None:
    ages = [epoch - history_versions(epoch, 3, 1)[0] for epoch in range(8)]
    assert ages == [1, 2, 3, 1, 2, 3, 1, 2]
    assert history_versions(46, 23, 2) == (45, 45)
    with pytest.raises(ScheduleError, match=r"3 epochs old, outside 1\.\.2"):
        validate_plan(plan(epoch=5), LAYOUT, period=2, past=history_versions(5, 3, 4))


def test_old_gradient_messages_are_refused_where_the_mode_reads_them() -> None:
    messages = [3, 3, 3, 3]
    for mode in MODES:
        if mode in ("stale", "mix"):
            with pytest.raises(ScheduleError, match="backward.* reads gradients of chunk .* 2 epochs old"):
                validate_plan(plan(mode), LAYOUT, messages=messages)
        else:
            validate_plan(plan(mode), LAYOUT, messages=messages)


def test_plans_of_the_wrong_shape_are_refused() -> None:
    sound = plan()
    with pytest.raises(ScheduleError, match="6 lists for 2 ranks"):
        validate_plan(sound, Layout(2, 1))
    with pytest.raises(ScheduleError, match="not a permutation"):
        validate_plan(replace(sound, order=(0, 0, 1, 2)), LAYOUT)
    with pytest.raises(ScheduleError, match="do not cut order"):
        validate_plan(replace(sound, groups=(sound.order[:3],)), LAYOUT)
    with pytest.raises(ScheduleError, match="2 groups in mode stale"):
        validate_plan(replace(plan("drop", updates=2), gradient_mode="stale"), LAYOUT)
    with pytest.raises(ScheduleError, match="has no place"):
        validate_plan(edit(sound, [0], {0: (Action(kind=Kind.ENTER, chunk=0, phase="exact"),)}), LAYOUT)


@given(st.data())
def test_an_exact_pass_with_an_action_less_or_more_is_refused(data: st.DataObject) -> None:
    layers = [range(1, 2), range(2, 4), range(4, 5)]
    sound = plan_exact(LAYOUT, layers, 3, epoch=0)
    rank = data.draw(st.integers(0, LAYOUT.num_ranks - 1))
    position = data.draw(st.integers(0, len(sound.actions[rank]) - 1))
    action = sound.actions[rank][position]
    stage = LAYOUT.stage_of(rank)
    for ranks in ([rank], [stage, LAYOUT.stages + stage]):
        for instead in ((), (action, action)):
            with pytest.raises(ScheduleError):
                validate_plan(edit(sound, ranks, {position: instead}), LAYOUT)


def test_an_exact_pass_in_the_wrong_order_is_refused() -> None:
    layout = Layout(2, 1)
    layers = [range(1, 3), range(3, 4)]
    sound = plan_exact(layout, layers, 2, epoch=0)
    refreshes = [find(sound, 0, Kind.REFRESH, n) for n in range(4)]
    with pytest.raises(ScheduleError, match="reads a layer before all chunks have it"):
        validate_plan(swap(sound, [0], refreshes[1], refreshes[2]), layout)
    with pytest.raises(ScheduleError, match="sends a chunk that lacks a layer"):
        validate_plan(swap(sound, [0], refreshes[2], refreshes[2] + 1), layout)
    with pytest.raises(ScheduleError, match="must send to rank 1"):
        send = refreshes[2] + 1
        validate_plan(edit(sound, [0], {send: (replace(sound.actions[0][send], peer=0),)}), layout)
    with pytest.raises(ScheduleError, match="rows come by recv from rank 0"):
        validate_plan(edit(sound, [1], {0: (Action(kind=Kind.LOAD, chunk=0, phase="exact"),)}), layout)
    with pytest.raises(ScheduleError, match="has no place"):
        validate_plan(edit(sound, [1], {0: (Action(kind=Kind.STEP, group=0),)}), layout)


def test_an_exact_pass_that_lacks_a_layer_is_refused() -> None:
    layout = Layout(2, 1)
    whole = [range(1, 3), range(3, 4)]
    with pytest.raises(ScheduleError, match=r"layers \[4\] do not go on from layer 3"):
        validate_plan(plan_exact(layout, [range(1, 3), range(4, 5)], 2, epoch=0), layout)
    short = plan_exact(layout, [range(1, 3), range(3, 3)], 2, epoch=0)
    validate_plan(short, layout)
    with pytest.raises(ScheduleError, match="rank 1, .*ends before all chunks have all layers"):
        validate_plan(short, layout, stage_layers=whole)
