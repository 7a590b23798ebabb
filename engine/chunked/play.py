"""Play the lists of all ranks against each other: who waits for whom, and when what happens.

Receives block; sends do not, unless `depth` bounds those of a lane that the receiver has not yet taken. What ranks of
one stage do together (they exchange rows inside) starts when the last of them is there; a STEP, of all replicas.
`validate` plays a list to prove that it ends, `simulate` to say when.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.schedule import Action, EpochPlan, Kind

TOGETHER = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.ENTER, Kind.REFRESH, Kind.STEP})
Span = tuple[float, float]
Seconds = Callable[[int, Action], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What came of it. `spans[rank]` has (start, end) of every action done, waiting included for RECV and SEND.

    `stuck` has the position of every rank that could not go on; empty where all lists ended.
    """

    spans: tuple[tuple[Span, ...], ...]
    stuck: dict[int, int]


@dataclass(slots=True)
class _Lane:
    """One (source, destination, phase): when each tensor arrives, and when it was taken."""

    arrivals: list[float] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)


class _Player:
    def __init__(
        self, plan: EpochPlan, layout: Layout, seconds: Seconds, travel: Seconds, latency_s: float, depth: int | None
    ) -> None:
        self.plan, self.layout, self.depth = plan, layout, depth
        self.seconds, self.travel, self.latency_s = seconds, travel, latency_s
        self.clock = [0.0] * layout.num_ranks
        self.spans: list[list[Span]] = [[] for _ in range(layout.num_ranks)]
        self.lanes: dict[tuple[int, int, str], _Lane] = defaultdict(_Lane)
        self.wire_free: dict[tuple[int, int], float] = defaultdict(float)

    def action(self, rank: int) -> Action | None:
        """What a rank does next; None at its end."""
        actions, position = self.plan.actions[rank], len(self.spans[rank])
        return actions[position] if position < len(actions) else None

    def advance(self, rank: int) -> bool:
        """Do a rank's next action where it need not wait for an action of another that is not done."""
        action = self.action(rank)
        if action is None:
            return False
        if action.kind is Kind.SEND:
            return self._send(rank, action)
        if action.kind is Kind.RECV:
            return self._receive(rank, action)
        ranks = self._together(rank, action)
        if any(self.action(other) != action for other in ranks):
            return False
        start = max(self.clock[other] for other in ranks)
        end = start + max(self.seconds(other, action) for other in ranks)
        for other in ranks:
            self._finish(other, start, end)
        return True

    def _together(self, rank: int, action: Action) -> tuple[int, ...]:
        """The ranks that do an action at once; replicas of which the plan has no lists are left out."""
        if action.kind not in TOGETHER:
            return (rank,)
        if action.kind is not Kind.STEP:
            return self.layout.same_stage(rank)
        replicas = [other for other in self.layout.same_place(rank) if other == rank or self.plan.actions[other]]
        return tuple(peer for other in replicas for peer in self.layout.same_stage(other))

    def _finish(self, rank: int, start: float, end: float) -> None:
        self.clock[rank] = end
        self.spans[rank].append((start, end))

    def _send(self, rank: int, action: Action) -> bool:
        lane, start, post = self.lanes[rank, action.peer, action.phase], self.clock[rank], self.clock[rank]
        if self.depth is not None and (waits_for := len(lane.arrivals) - self.depth) >= 0:
            if waits_for >= len(lane.taken):
                return False
            post = max(post, lane.taken[waits_for])
        left = max(post, self.wire_free[rank, action.peer]) + self.travel(rank, action)
        self.wire_free[rank, action.peer] = left
        lane.arrivals.append(left + self.latency_s)
        self._finish(rank, start, post)
        return True

    def _receive(self, rank: int, action: Action) -> bool:
        lane = self.lanes[action.peer, rank, action.phase]
        if len(lane.taken) >= len(lane.arrivals):
            return False
        end = max(self.clock[rank], lane.arrivals[len(lane.taken)])
        lane.taken.append(end)
        self._finish(rank, self.clock[rank], end)
        return True


def play(
    plan: EpochPlan,
    layout: Layout,
    seconds: Seconds,
    travel: Seconds,
    *,
    latency_s: float = 0.0,
    depth: int | None = None,
) -> Played:
    """Play a plan to its end, or until no rank can go on.

    `seconds(rank, action)` is what an action takes, but for RECV and SEND; `travel(rank, action)` for how long a SEND
    keeps the wire to its peer busy. What depends on what is fixed, so the order of playing changes no time.
    """
    player = _Player(plan, layout, seconds, travel, latency_s, depth)
    moved = True
    while moved:
        moved = False
        for rank in range(layout.num_ranks):
            while player.advance(rank):
                moved = True
    stuck = {rank: len(player.spans[rank]) for rank in range(layout.num_ranks) if player.action(rank) is not None}
    return Played(spans=tuple(tuple(spans) for spans in player.spans), stuck=stuck)
