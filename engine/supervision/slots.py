"""At which logical time a rank is: the slot of its next action, which is later than those of all that it waits for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.play import play
from penstock.engine.chunked.schedule import EpochPlan, Kind
from penstock.engine.chunked.transport import IN_FLIGHT

SlotOf = Callable[[int, int], float]  # of a rank that has done so many actions
_TIES = {Kind.RECV: 0.25, Kind.SEND: 0.5}  # a full lane's sender waits for the receiver, others for neither


def find_plan(arguments: tuple[Any, ...]) -> EpochPlan | None:
    """The plan that a call is about, if it is about one."""
    return next((argument for argument in arguments if isinstance(argument, EpochPlan)), None)


def slots_of(layout: Layout, arguments: Sequence[tuple[Any, ...]]) -> SlotOf:
    """Slots of a call by the arguments of all ranks: of its plans played in unit time, else the actions done.

    Without a plan, ranks do the same things (replicas, steps), so whoever has done the least is the first to stop.
    """
    plans = [find_plan(found) for found in arguments]
    if not plans or any(plan is None for plan in plans):
        return lambda rank, done: float(done)
    lists = tuple(plan.actions[rank] for rank, plan in enumerate(plans) if plan is not None)
    first = plans[0]
    assert first is not None
    played = play(replace(first, actions=lists), layout, lambda *_: 1.0, lambda *_: 0.0, latency_s=1.0, depth=IN_FLIGHT)

    def slot_of(rank: int, done: int) -> float:
        spans = played.spans[rank]
        if done >= len(spans):
            return (spans[-1][1] if spans else 0.0) + 1
        return spans[done][1] + _TIES.get(lists[rank][done].kind, 0.0)

    return slot_of
