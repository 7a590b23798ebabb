"""The failure policy: what to do about a group of ranks, from what was seen of them. Pure: no clock, no I/O, no Ray.

| phase | is | ends with |
|---|---|---|
| `idle` | the group waits for a call | Called |
| `calling` | a call is under way on all ranks, the first of them `start` | all answers, or a cause |
| `ending` | the group failed and is being killed | Ended |
| `waiting` | a new group is due, after a pause | Called |
| `over` | nothing more is decided | |

A backend's watch has a state per group; `run_with_restarts` one per run, whose group counts as one rank. Of several
errors the one that explains the others is the cause: a rank's own, before that of one that was lost or is silent,
before that of one that lost a peer. The last is given `SETTLE_S` to be explained. A stop is carried out by those who
train: they save and end by themselves. Here it means that no new group follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from penstock.engine.supervision.events import (
    Answered,
    Beat,
    Called,
    Cause,
    Decision,
    Dumped,
    DumpStacks,
    Ended,
    Failed,
    FeederFailed,
    Finish,
    GiveUp,
    KillGroup,
    Kind,
    Observation,
    Proceed,
    ReplaceFeeder,
    Restart,
    StopRequested,
    Wait,
)

Phase = Literal["idle", "calling", "ending", "waiting", "over"]
SETTLE_S = 2.0  # for how long a lost peer may be explained by what became of the peer
DUMP_S = 30.0  # for stacks to come: nodes may have to start a process first
KILL_S = 60.0  # for a group to end; processes that sleep in the kernel may never
LONGEST_PAUSE_S = 30.0  # between two attempts
EXIT_STOPPED = 75  # EX_TEMPFAIL: run again
_BLAME: tuple[Kind, ...] = ("own", "feeder", "lost", "silent", "peer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A rank in the call under way."""

    moved_s: float = 0.0
    slot: float = 0.0
    is_done: bool = False  # answered or failed


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where a group is; make one with `State(num_ranks=...)` and change it with `step` alone."""

    num_ranks: int
    retries: int = 0
    feeder_retries: int = 0
    phase: Phase = "idle"
    now_s: float = 0.0
    timeout_s: float = 0.0
    since_s: float = 0.0  # of the phase
    members: tuple[Member, ...] = ()
    found: tuple[Cause, ...] = ()  # what failed in this call, in order
    suspect: int | None = None  # whose stack is being collected
    suspected_s: float = 0.0
    cause: Cause | None = None
    restarts: int = 0
    stops: bool = False
    replaced: tuple[tuple[int, int], ...] = ()  # feeders and how often they were
    outbox: tuple[Decision, ...] = ()  # decided by what was seen, and not told yet

    @property
    def pending(self) -> tuple[int, ...]:
        """Ranks that have neither answered nor failed."""
        return tuple(rank for rank, member in enumerate(self.members) if not member.is_done)


def step(state: State, observations: Sequence[Observation]) -> tuple[State, tuple[Decision, ...]]:
    """Take what was seen, in order, and decide. What is seen out of turn changes nothing."""
    for observation in observations:
        state = _take(replace(state, now_s=max(state.now_s, observation.at_s)), observation)
    state = _weigh(state)
    decisions = state.outbox
    if not decisions and state.phase != "over":
        decisions = (Wait(_due_s(state)),)
    return replace(state, outbox=()), decisions


def _take(state: State, seen: Observation) -> State:
    """Write down one observation."""
    match seen:
        case Called(at_s=at_s, timeout_s=timeout_s) if state.phase in ("idle", "waiting"):
            members = (Member(moved_s=at_s),) * state.num_ranks
            return replace(_enter(state, "calling"), timeout_s=timeout_s, members=members, found=())
        case Beat(rank=rank) if state.phase == "calling":
            member = state.members[rank]
            return _put(state, rank, replace(member, moved_s=max(member.moved_s, seen.at_s), slot=seen.slot))
        case Answered(rank=rank) if state.phase == "calling":
            return _put(state, rank, replace(state.members[rank], is_done=True))
        case Failed(rank=rank, kind=kind) if state.phase == "calling":
            # the first error of a rank stays: that its process ended behind it explains nothing
            if rank not in [cause.member for cause in state.found]:
                state = replace(state, found=(*state.found, Cause(kind, rank, seen.at_s)))
            return _put(state, rank, replace(state.members[rank], is_done=True))
        case Dumped() if state.phase == "calling" and state.suspect is not None:
            return _accuse(state, seen)
        case Ended() if state.phase == "ending":
            return _end(state)
        case StopRequested():
            return replace(state, stops=True)
        case FeederFailed() if state.phase not in ("ending", "over"):
            return _lose_feeder(state, seen)
    return state


def _enter(state: State, phase: Phase, *told: Decision) -> State:
    return replace(state, phase=phase, since_s=state.now_s, suspect=None, outbox=(*state.outbox, *told))


def _finish(state: State, last: Finish | GiveUp) -> State:
    return _enter(state, "over", last)


def _kill(state: State, cause: Cause) -> State:
    return replace(_enter(state, "ending", KillGroup(cause)), cause=cause)


def _put(state: State, rank: int, member: Member) -> State:
    return replace(state, members=(*state.members[:rank], member, *state.members[rank + 1 :]))


def _end(state: State) -> State:
    """Decide what follows a group that has ended."""
    cause = state.cause
    assert cause is not None
    if not cause.is_mendable:
        return _finish(state, GiveUp(cause))
    if state.stops:  # what was saved last is there for the next run
        return _finish(state, Finish(EXIT_STOPPED))
    if state.restarts >= state.retries:
        return _finish(state, GiveUp(cause))
    pause_s = min(LONGEST_PAUSE_S, 2.0 ** (state.restarts - 1)) if state.restarts else 0.0
    restarts = state.restarts + 1
    return replace(_enter(state, "waiting", Restart(restarts, pause_s)), restarts=restarts)


def _lose_feeder(state: State, seen: FeederFailed) -> State:
    """Replace a feeder that died or is slow; one that keeps dying ends the run, one that stays slow does not."""
    counts = dict(state.replaced)
    count = counts.get(seen.feeder, 0)
    if count < state.feeder_retries:
        counts[seen.feeder] = count + 1
        told = (*state.outbox, ReplaceFeeder(seen.feeder))
        return replace(state, replaced=tuple(sorted(counts.items())), outbox=told)
    return _kill(state, Cause("feeder", seen.feeder, seen.at_s)) if seen.is_dead else state


def _is_silent(state: State, rank: int) -> bool:
    return state.now_s - state.members[rank].moved_s >= state.timeout_s


def _first_to_stop(state: State) -> int | None:
    """The rank that has not moved in time and for which others wait, if any.

    What a rank does next waits only for what has an earlier slot. So of all ranks the one at the earliest slot waits
    for nobody; any other that is silent may wait for one that moves.
    """
    silent = [rank for rank in state.pending if _is_silent(state, rank)]
    if not silent:
        return None
    first = min(silent, key=lambda rank: (state.members[rank].slot, state.members[rank].moved_s, rank))
    moving = [state.members[rank].slot for rank in state.pending if rank not in silent]
    return None if moving and min(moving) <= state.members[first].slot else first


def _accuse(state: State, seen: Dumped) -> State:
    """Name the culprit, now that stacks are there: one that is frozen, else one that does not wait for another."""

    def blame(rank: int) -> tuple[bool, bool, float, float, int]:
        member = state.members[rank]
        return rank not in seen.frozen, rank in seen.waiting, member.slot, member.moved_s, rank

    accused = [rank for rank in state.pending if rank in seen.frozen or _is_silent(state, rank)]
    state = replace(state, suspect=None)
    if not accused:
        return state
    return _take(state, Failed(at_s=seen.at_s, rank=min(accused, key=blame), kind="silent"))


def _cause(state: State) -> Cause | None:
    """What explains that the call failed, as soon as nothing better can be hoped for."""
    if not state.found:
        return None
    best = min(state.found, key=lambda cause: _BLAME.index(cause.kind))  # the first of them
    settled = state.now_s - state.found[0].at_s >= SETTLE_S
    return best if best.kind != "peer" or not state.pending or settled else None


def _weigh(state: State) -> State:
    """Decide what follows from all that was seen, and from the time."""
    if state.phase == "calling":
        return _weigh_call(state)
    if state.phase == "waiting" and state.stops:
        return _finish(state, Finish(EXIT_STOPPED))
    if state.phase == "ending" and state.now_s - state.since_s >= KILL_S:
        assert state.cause is not None
        return _finish(state, GiveUp(state.cause))  # nothing can be started beside what is still there
    return state


def _weigh_call(state: State) -> State:
    if (cause := _cause(state)) is not None:
        return _kill(state, cause)
    if not state.pending:
        return _enter(state, "idle", Proceed())
    if state.suspect is not None:
        if state.now_s - state.suspected_s < DUMP_S:
            return state
        return _weigh_call(_accuse(state, Dumped(at_s=state.now_s)))
    if state.found or (first := _first_to_stop(state)) is None:
        return state
    told = (*state.outbox, DumpStacks(state.pending, first))
    return replace(state, suspect=first, suspected_s=state.now_s, outbox=told)


def _due_s(state: State) -> float | None:
    """When something is to be decided although nothing is seen."""
    if state.phase == "ending":
        return state.since_s + KILL_S
    if state.phase != "calling":
        return None
    if state.found:
        return state.found[0].at_s + SETTLE_S
    if state.suspect is not None:
        return state.suspected_s + DUMP_S
    moving = [state.members[rank].moved_s for rank in state.pending if not _is_silent(state, rank)]
    due_s = min(moving) + state.timeout_s if moving else inf
    return due_s if due_s < inf else None
