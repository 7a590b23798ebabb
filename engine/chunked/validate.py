"""Prove a plan sound before it runs: refuse every list that would compute something else, or never end.

Each rank's list is followed with what the rank has by then (`follow`); then lanes are compared end to end, parts side
by side, and the whole is played with sends that are buffered and with sends that wait for the one before.
gnnpipe.md, section 6.2, O12.
"""

from collections import defaultdict, deque
from collections.abc import Sequence

from penstock.engine.chunked.follow import MESSAGE_BOUND, ExactRank, ScheduleError, Stale, TrainingRank, refuse
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.play import TOGETHER, play
from penstock.engine.chunked.schedule import EpochPlan, Kind, Phase, join_plans

__all__ = ["ScheduleError", "history_versions", "validate_plan", "validate_replicas"]

Lane = tuple[int, int, Phase]  # source, destination


def _stage_layers(plan: EpochPlan, layout: Layout) -> list[range]:
    """Read the layers of every stage off an exact plan; each stage must go on where the one before ended."""
    layers: list[range] = []
    start: int | None = None
    for stage in range(layout.stages):
        rank = layout.rank(0, stage, plan.replica)
        found = sorted({action.layer for action in plan.actions[rank] if action.kind is Kind.REFRESH})
        first = start if start is not None else (found[0] if found else 0)
        if found != list(range(first, first + len(found))):
            refuse(plan, rank, 0, f"layers {found} do not go on from layer {first}")
        layers.append(range(first, first + len(found)))
        start = layers[-1].stop if found else start
    return layers


def _check_shape(plan: EpochPlan, layout: Layout) -> None:
    if len(plan.actions) != layout.num_ranks:
        raise ScheduleError(
            f"epoch {plan.epoch}: {len(plan.actions)} lists for {layout.num_ranks} ranks; plan it for them"
        )
    if not 0 <= plan.replica < layout.replicas:
        raise ScheduleError(f"epoch {plan.epoch}: replica {plan.replica} of {layout.replicas}; plan it for one of them")
    for rank, actions in enumerate(plan.actions):
        if actions and layout.replica_of(rank) != plan.replica:
            refuse(plan, rank, 0, f"is of replica {layout.replica_of(rank)}, the plan of replica {plan.replica}")
    if sorted(plan.order) != list(range(len(plan.order))):
        raise ScheduleError(f"epoch {plan.epoch}: order {plan.order} is not a permutation of 0..{len(plan.order) - 1}")
    if plan.exact:
        return
    if not all(plan.groups) or tuple(chunk for group in plan.groups for chunk in group) != plan.order:
        raise ScheduleError(f"epoch {plan.epoch}: groups {plan.groups} do not cut order {plan.order} into runs")
    if len(plan.groups) > 1 and plan.gradient_mode != "drop":
        raise ScheduleError(
            f"epoch {plan.epoch}: {len(plan.groups)} groups in mode {plan.gradient_mode}; only drop allows that"
        )


def _check_lanes(plan: EpochPlan) -> None:
    """Every lane delivers first in, first out: what the n-th receive expects must be what the n-th send sends."""
    sends: dict[Lane, deque[int]] = defaultdict(deque)
    for rank, actions in enumerate(plan.actions):
        for action in actions:
            if action.kind is Kind.SEND:
                sends[rank, action.peer, action.phase].append(action.chunk)
    for rank, actions in enumerate(plan.actions):
        for position, action in enumerate(actions):
            if action.kind is Kind.RECV:
                lane = sends[action.peer, rank, action.phase]
                chunk = lane.popleft() if lane else None
                if chunk != action.chunk:
                    refuse(plan, rank, position, f"rank {action.peer} sends chunk {chunk} then")
    for (rank, peer, _), chunks in sends.items():
        if chunks:
            refuse(plan, rank, len(plan.actions[rank]), f"rank {peer} never receives chunks {list(chunks)}")


def _check_parts(plan: EpochPlan, layout: Layout) -> None:
    """Ranks of a stage exchange rows inside an action, so all must do the same ones in the same order."""
    for stage in range(layout.stages):
        ranks = layout.same_stage(layout.rank(0, stage, plan.replica))
        lists = [[(n, a) for n, a in enumerate(plan.actions[rank]) if a.kind in TOGETHER] for rank in ranks]
        for rank, found in zip(ranks[1:], lists[1:], strict=True):
            for (_, first), (position, action) in zip(lists[0], found, strict=False):
                if first != action:
                    refuse(plan, rank, position, f"rank {ranks[0]} of the same stage does {first} then")
            if len(lists[0]) != len(found):
                refuse(plan, rank, len(plan.actions[rank]), f"does not match rank {ranks[0]} of the same stage")


def _check_ends(plan: EpochPlan, layout: Layout) -> None:
    for depth in (None, 1):  # sends buffered without limit; a send that waits until the one before was taken
        stuck = play(plan, layout, lambda *_: 0.0, lambda *_: 0.0, depth=depth).stuck
        if stuck:
            waits = "; ".join(f"rank {rank} at {plan.actions[rank][position]}" for rank, position in stuck.items())
            rank, position = next(iter(stuck.items()))
            refuse(plan, rank, position, f"deadlock, sends {'buffered' if depth is None else 'unbuffered'}: {waits}")


def history_versions(epoch: int, period: int, num_chunks: int) -> tuple[int, ...]:
    """The epochs whose end the histories of all chunks are of, during `epoch`; -1 is before epoch 0."""
    return (epoch // period * period - 1,) * num_chunks


def validate_plan(
    plan: EpochPlan,
    layout: Layout,
    *,
    period: int = 1,
    past: Sequence[int] | None = None,
    messages: Sequence[int] | None = None,
    stage_layers: Sequence[range] | None = None,
) -> None:
    """Raise ScheduleError unless every rank of a replica can run its list to the end and computes what the mode says.

    `period` (epochs) is how long histories stay as they are, and so how old a row may be when it is read. `past` and
    `messages` have the epoch of every chunk's history and gradient messages as the epoch begins; unless told, what a
    run from epoch 0 has. An exact pass reads neither; it must compute `stage_layers`, read off the plan unless told.
    """
    _check_shape(plan, layout)
    if plan.exact:
        layers = stage_layers or _stage_layers(plan, layout)
        for rank in layout.ranks_of(plan.replica):
            ExactRank(plan, layout, rank, layers[layout.stage_of(rank)]).check()
    else:
        past = history_versions(plan.epoch, period, len(plan.order)) if past is None else past
        messages = messages if messages is not None and plan.gradient_mode in ("stale", "mix") else ()
        stale = Stale(
            history={c: age for c, v in enumerate(past) if not 0 < (age := plan.epoch - v) <= period},
            messages={c: age for c, v in enumerate(messages) if not 0 < (age := plan.epoch - v) <= MESSAGE_BOUND},
            period=period,
        )
        for rank in layout.ranks_of(plan.replica):
            TrainingRank(plan, layout, rank, stale).check()
    _check_lanes(plan)
    _check_parts(plan, layout)
    _check_ends(plan, layout)


def validate_replicas(plans: Sequence[EpochPlan], layout: Layout, *, period: int = 1) -> None:
    """Raise ScheduleError unless the plans of all replicas are sound, alone and together: they meet at every STEP."""
    for replica, plan in enumerate(plans):
        if plan.replica != replica:
            raise ScheduleError(f"epoch {plan.epoch}: the plan of replica {plan.replica} is given for {replica}")
        validate_plan(plan, layout, period=period)
        for name in ("epoch", "gradient_mode", "exact"):
            if getattr(plan, name) != getattr(plans[0], name):
                raise ScheduleError(f"epoch {plan.epoch}: replica {replica} has another {name} than replica 0")
    if len(plans) != layout.replicas:
        raise ScheduleError(f"epoch {plans[0].epoch}: {len(plans)} plans for {layout.replicas} replicas; plan them all")
    if layout.replicas > 1:
        _check_ends(join_plans(plans), layout)
