"""The failure policy, one transition at a time, and what holds whatever is seen."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    Tick,
    Wait,
)
from penstock.engine.supervision.policy import DUMP_S, KILL_S, SETTLE_S, State, step

TIMEOUT_S = 10.0
CALL = Called(at_s=0.0, timeout_s=TIMEOUT_S)


def play(
    *batches: Sequence[Observation], num_ranks: int = 2, retries: int = 0, feeder_retries: int = 0
) -> list[tuple[Decision, ...]]:
    """What is decided after each batch, from ranks that stand idle."""
    state, told = State(num_ranks=num_ranks, retries=retries, feeder_retries=feeder_retries), []
    for batch in batches:
        state, decisions = step(state, batch)
        told.append(decisions)
    return told


def beat(at_s: float, rank: int, slot: float) -> Beat:
    return Beat(at_s=at_s, rank=rank, slot=slot)


def answered(at_s: float, rank: int) -> Answered:
    return Answered(at_s=at_s, rank=rank)


def failed(at_s: float, rank: int, kind: Kind) -> Failed:
    return Failed(at_s=at_s, rank=rank, kind=kind)


def test_a_call_is_waited_for_until_its_first_silence_and_goes_on_when_all_have_answered() -> None:
    told = play([CALL], [beat(3, 0, 1), beat(4, 1, 1)], [answered(5, 1)], [answered(6, 0)], [Tick(at_s=99)])
    assert told == [(Wait(10),), (Wait(13),), (Wait(13),), (Proceed(),), (Wait(None),)]


def test_a_patience_without_end_is_waited_for_without_end() -> None:
    assert play([Called(at_s=0, timeout_s=float("inf"))], [Tick(at_s=1e9)]) == [(Wait(None),)] * 2


@pytest.mark.parametrize("kind", ["own", "lost"])
def test_an_error_that_explains_itself_ends_the_group_at_once(kind: Kind) -> None:
    assert play([CALL], [failed(1, 1, kind)])[-1] == (KillGroup(Cause(kind, 1, 1)),)


def test_a_lost_peer_is_explained_by_what_became_of_the_peer() -> None:
    told = play([CALL], [failed(1, 0, "peer")], [failed(2, 1, "lost")])
    assert told[1:] == [(Wait(1 + SETTLE_S),), (KillGroup(Cause("lost", 1, 2)),)]


def test_a_lost_peer_that_nobody_explains_is_the_cause_in_the_end() -> None:
    told = play([CALL], [failed(1, 0, "peer")], [Tick(at_s=2)], [Tick(at_s=1 + SETTLE_S)])
    assert told[2:] == [(Wait(1 + SETTLE_S),), (KillGroup(Cause("peer", 0, 1)),)]


def test_if_all_have_lost_a_peer_the_first_is_told_without_a_pause() -> None:
    told = play([CALL], [failed(1, 1, "peer")], [failed(1.5, 0, "peer")])
    assert told[-1] == (KillGroup(Cause("peer", 1, 1)),)


def test_that_a_rank_ends_after_its_error_does_not_hide_it() -> None:
    assert play([CALL], [failed(1, 0, "peer")], [failed(1, 0, "lost")])[-1] == (Wait(1 + SETTLE_S),)


def test_of_errors_seen_at_once_a_ranks_own_is_the_cause() -> None:
    seen = [failed(1, 0, "peer"), failed(1, 1, "lost"), failed(1, 2, "own")]
    assert play([CALL], seen, num_ranks=3)[-1] == (KillGroup(Cause("own", 2, 1)),)


def test_the_cause_stays_whatever_comes_later() -> None:
    told = play([CALL], [failed(1, 0, "lost")], [failed(1.1, 1, "own")], [Ended(at_s=2)])
    assert told[-2:] == [(Wait(1 + KILL_S),), (GiveUp(Cause("lost", 0, 1)),)]


def test_of_silent_ranks_the_one_at_the_earliest_slot_is_named() -> None:
    moved = [beat(2, 0, 7), beat(1, 1, 9)]
    told = play([CALL], moved, [Tick(at_s=12)], [Dumped(at_s=13, waiting=frozenset({1}))])
    assert told[2:] == [(DumpStacks((0, 1), 0),), (KillGroup(Cause("silent", 0, 13)),)]


def test_a_silent_rank_is_named_while_others_move_ahead_of_it() -> None:
    told = play([CALL], [beat(1, 0, 3), beat(11, 1, 8)])
    assert told[-1] == (DumpStacks((0, 1), 0),)


def test_a_silent_rank_that_others_are_behind_only_waits() -> None:
    told = play([CALL], [beat(1, 0, 8), beat(11, 1, 3)], [beat(15, 1, 9)])
    assert told[1:] == [(Wait(21),), (DumpStacks((0, 1), 0),)]


def test_a_silent_rank_whose_peers_have_answered_is_named() -> None:
    assert play([CALL], [answered(1, 0)], [Tick(at_s=10)])[-1] == (DumpStacks((1,), 1),)


@pytest.mark.parametrize(
    ("dumped", "culprit"),
    [
        (Dumped(at_s=11, frozen=frozenset({1})), 1),
        (Dumped(at_s=11, waiting=frozenset({0})), 1),
        (Dumped(at_s=11, waiting=frozenset({0, 1})), 0),
        (Dumped(at_s=11), 0),
    ],
)
def test_stacks_tell_ranks_of_one_slot_apart(dumped: Dumped, culprit: int) -> None:
    told = play([CALL], [Tick(at_s=10)], [dumped])
    assert told[1:] == [(DumpStacks((0, 1), 0),), (KillGroup(Cause("silent", culprit, 11)),)]


def test_stacks_that_do_not_come_are_waited_for_so_long() -> None:
    told = play([CALL], [Tick(at_s=10)], [Tick(at_s=11)], [Tick(at_s=10 + DUMP_S)])
    assert told[2:] == [(Wait(10 + DUMP_S),), (KillGroup(Cause("silent", 0, 10 + DUMP_S)),)]


def test_a_rank_that_answers_while_stacks_are_collected_is_not_named() -> None:
    told = play([CALL], [answered(1, 0)], [Tick(at_s=10)], [answered(10.5, 1), Dumped(at_s=11)])
    assert told[-1] == (Proceed(),)


def lose(at_s: float) -> list[list[Observation]]:
    """A call that a death ends, and the end of its group."""
    return [[Called(at_s=at_s, timeout_s=TIMEOUT_S)], [failed(at_s, 0, "lost")], [Ended(at_s=at_s)]]


def test_groups_are_restarted_after_longer_and_longer_pauses_and_then_given_up() -> None:
    told = play(*(batch for at_s in range(4) for batch in lose(at_s)), retries=3)
    assert told[2::3] == [(Restart(1, 0),), (Restart(2, 1),), (Restart(3, 2),), (GiveUp(Cause("lost", 0, 3)),)]


def test_a_pause_has_a_limit() -> None:
    told = play(*(batch for at_s in range(9) for batch in lose(at_s)), retries=9)
    assert told[-1] == (Restart(9, 30),)


def test_what_a_restart_cannot_mend_is_not_retried() -> None:
    told = play([CALL], [failed(1, 0, "own")], [Ended(at_s=1)], retries=5)
    assert told[-1] == (GiveUp(Cause("own", 0, 1)),)


def test_nothing_is_started_beside_a_group_that_does_not_end() -> None:
    told = play([CALL], [failed(1, 0, "lost")], [Tick(at_s=1 + KILL_S)], [Ended(at_s=99)], retries=5)
    assert told[2:] == [(GiveUp(Cause("lost", 0, 1)),), ()]


def test_a_stop_does_not_end_a_call() -> None:
    told = play([CALL], [StopRequested(at_s=1)], [answered(2, 0), answered(2, 1)])
    assert told[1:] == [(Wait(10),), (Proceed(),)]


def test_a_group_that_fails_while_it_is_to_stop_is_not_restarted() -> None:
    assert play([StopRequested(at_s=0), CALL], *lose(0)[1:], retries=5)[-1] == (Finish(75),)
    assert play(*lose(0), [StopRequested(at_s=1)], retries=5)[-1] == (Finish(75),)


def test_an_error_of_its_own_is_told_although_the_run_is_to_stop() -> None:
    told = play([StopRequested(at_s=0), CALL], [failed(1, 0, "own")], [Ended(at_s=1)])
    assert told[-1] == (GiveUp(Cause("own", 0, 1)),)


def test_each_feeder_is_replaced_so_often() -> None:
    dead = [FeederFailed(at_s=1, feeder=feeder, is_dead=True) for feeder in (7, 8, 7)]
    told = play([CALL], *([one] for one in dead), [Ended(at_s=2)], feeder_retries=1, retries=5)
    assert told[1:3] == [(ReplaceFeeder(7),), (ReplaceFeeder(8),)]
    assert told[3:] == [(KillGroup(Cause("feeder", 7, 1)),), (GiveUp(Cause("feeder", 7, 1)),)]


def test_a_feeder_that_stays_slow_is_kept() -> None:
    slow = [FeederFailed(at_s=at_s, feeder=0, is_dead=False) for at_s in (1, 2)]
    assert play([CALL], [slow[0]], [slow[1]], feeder_retries=1)[1:] == [(ReplaceFeeder(0),), (Wait(10),)]


RANKS = st.integers(0, 2)
KINDS: st.SearchStrategy[Kind] = st.sampled_from(["own", "lost", "peer"])
SEEN = st.one_of(
    st.builds(Called, at_s=st.just(0.0), timeout_s=st.sampled_from([1.0, 10.0])),
    st.builds(Beat, at_s=st.just(0.0), rank=RANKS, slot=st.floats(0, 9)),
    st.builds(Answered, at_s=st.just(0.0), rank=RANKS),
    st.builds(Failed, at_s=st.just(0.0), rank=RANKS, kind=KINDS),
    st.builds(Dumped, at_s=st.just(0.0), frozen=st.frozensets(RANKS), waiting=st.frozensets(RANKS)),
    st.builds(Ended, at_s=st.just(0.0)),
    st.builds(StopRequested, at_s=st.just(0.0)),
    st.builds(FeederFailed, at_s=st.just(0.0), feeder=st.integers(0, 1), is_dead=st.booleans()),
    st.builds(Tick, at_s=st.just(0.0)),
)


@st.composite
def histories(draw: st.DrawFn) -> list[list[Observation]]:
    """Anything, in batches, as time goes by."""
    now, found = 0.0, []
    for batch in draw(st.lists(st.lists(SEEN, min_size=1, max_size=3), max_size=40)):
        timed: list[Observation] = []
        for seen in batch:
            now += draw(st.sampled_from([0.0, 0.5, 3.0]))
            timed.append(replace(seen, at_s=now))
        found.append(timed)
    return found


@given(history=histories(), retries=st.integers(0, 3), feeder_retries=st.integers(0, 2))
def test_whatever_is_seen(history: list[list[Observation]], retries: int, feeder_retries: int) -> None:
    state = State(num_ranks=3, retries=retries, feeder_retries=feeder_retries)
    told: list[Decision] = []
    for batch in history:
        state, decisions = step(state, batch)
        assert not any(isinstance(decision, Wait) for decision in decisions) or len(decisions) == 1
        assert decisions or state.phase == "over"
        if state.found and state.phase == "calling":  # it does not wait for ever once something failed
            assert any(
                isinstance(d, KillGroup | ReplaceFeeder) or (isinstance(d, Wait) and d.until_s) for d in decisions
            )
        told += decisions
    ends = [decision for decision in told if isinstance(decision, GiveUp | Finish)]
    restarts = [decision for decision in told if isinstance(decision, Restart)]
    kills = [decision for decision in told if isinstance(decision, KillGroup)]
    replaced = [decision.feeder for decision in told if isinstance(decision, ReplaceFeeder)]
    assert len(ends) <= 1 and (not ends or told[-1] == ends[0])  # nothing follows an end, no restart above all
    assert [restart.attempt for restart in restarts] == list(range(1, len(restarts) + 1)) and len(restarts) <= retries
    assert all(replaced.count(feeder) <= feeder_retries for feeder in set(replaced))
    assert len(restarts) <= len(kills) and not any(not kill.cause.is_mendable for kill in kills[: len(restarts)])
    if ends and isinstance(ends[0], GiveUp):
        assert ends[0].cause == kills[-1].cause


@given(history=histories(), retries=st.integers(0, 3))
def test_a_driver_that_obeys_always_comes_to_an_end(history: list[list[Observation]], retries: int) -> None:
    """After anything, the clock alone, deaths that kills bring and restarts that are carried out lead to an end."""
    state, now = State(num_ranks=3, retries=retries), 1e3
    for batch in history:
        state, _ = step(state, batch)
    state, decisions = step(state, [Called(at_s=now, timeout_s=5.0)])
    for _ in range(20):
        if any(isinstance(d, GiveUp | Finish) for d in decisions) or state.phase == "over":
            return
        seen: list[Observation] = []
        for decision in decisions:
            match decision:
                case Wait(until_s=until_s):
                    assert until_s is not None, "nobody answers: it must not wait without end"
                    now = max(now, until_s)
                    seen.append(Tick(at_s=now))
                case DumpStacks():
                    seen.append(Dumped(at_s=now))
                case KillGroup():
                    seen.append(Ended(at_s=now))
                case Restart(pause_s=pause_s):
                    now += pause_s
                    seen.append(Called(at_s=now, timeout_s=5.0))
                case Proceed():
                    seen.append(Called(at_s=now, timeout_s=5.0))
        state, decisions = step(state, seen or [Tick(at_s=now)])
    pytest.fail(f"no end after 20 steps: {state}")
