"""Which rank is the slowest, by how much, and at what: from how long each was busy and what it waited for.

One window of time says little: of ranks that do the same, one is always the slowest. A rank is named where it was
slower in the mean of several windows, by more than they differ among each other.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from statistics import fmean, median, stdev
from typing import Any

_TOLERANCE = 0.1  # of the median: ranks that do the same differ by a few percent, even on one machine
_WINDOWS = 4  # that say something together
_ERRORS = 3.0  # standard errors of the mean that a rank has to be slower: one of many ranks is two of them by chance
COMPUTE = "compute"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTimes:
    """Where a rank's time went: `busy_s` without waiting for other ranks, of that `waits` by cause (disk, feeder)."""

    rank: int
    host: str
    busy_s: float
    waits: Mapping[str, float] = field(default_factory=dict)

    def by_cause(self) -> dict[str, float]:
        """Seconds by cause; what waited for nothing is computing."""
        return {**self.waits, COMPUTE: max(0.0, self.busy_s - sum(self.waits.values()))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """The slowest rank: `ratio` of its busy time to the median of all, `excess_s` more than that, mostly at `cause`."""

    rank: int
    host: str
    busy_s: float
    ratio: float
    excess_s: float
    cause: str
    cause_excess_s: float

    def to_json(self) -> dict[str, Any]:
        """For result.json."""
        return asdict(self)

    def __str__(self) -> str:
        """For logs."""
        return (
            f"rank {self.rank} on {self.host} is the slowest: busy for {self.busy_s:.1f} s, {self.ratio:.2f} times the "
            f"median rank ({self.excess_s:.1f} s more), mostly at {self.cause} ({self.cause_excess_s:.1f} s more)"
        )


def find_straggler(times: Sequence[RankTimes]) -> Straggler | None:
    """The slowest rank of one window; None where it is within 10 % of the median, or alone.

    Of two ranks the median is the faster one's time: between them there is no middle.
    """
    if len(times) < 2:
        return None
    slowest = max(times, key=lambda found: (found.busy_s, -found.rank))
    others = [found for found in times if found is not slowest]
    middle = min(median(found.busy_s for found in times), max(found.busy_s for found in others))
    excess_s = slowest.busy_s - middle
    if excess_s <= _TOLERANCE * middle:
        return None
    spent = slowest.by_cause()
    known = [found.by_cause() for found in others]
    excesses = {cause: value - median(each.get(cause, 0.0) for each in known) for cause, value in spent.items()}
    cause = max(excesses, key=lambda name: (excesses[name], name))
    return Straggler(
        rank=slowest.rank,
        host=slowest.host,
        busy_s=slowest.busy_s,
        ratio=slowest.busy_s / max(middle, 1e-9),
        excess_s=excess_s,
        cause=cause,
        cause_excess_s=excesses[cause],
    )


class StragglerWatch:
    """The last `keep` windows of what ranks did; used by one thread."""

    def __init__(self, keep: int = 1000) -> None:
        self._windows: deque[dict[int, RankTimes]] = deque(maxlen=keep)

    def add(self, times: Sequence[RankTimes]) -> None:
        """Take a window; ranks of another group than before begin anew."""
        window = {found.rank: found for found in times}
        if self._windows and self._windows[-1].keys() != window.keys():
            self._windows.clear()
        self._windows.append(window)

    def find(self) -> Straggler | None:
        """The rank that holds the others up, beyond noise; None where there is none, or too little was seen."""
        if len(self._windows) < _WINDOWS:
            return None
        found = find_straggler([self._sum(rank) for rank in self._windows[-1]])
        if found is None:
            return None
        excesses = [_excess(window, found.rank) for window in self._windows]
        error = stdev(excesses) / sqrt(len(excesses))
        return found if fmean(excesses) > _ERRORS * error else None

    def _sum(self, rank: int) -> RankTimes:
        """A rank over all windows."""
        own = [window[rank] for window in self._windows]
        causes = {cause for each in own for cause in each.waits}
        waits = {cause: sum(each.waits.get(cause, 0.0) for each in own) for cause in sorted(causes)}
        return RankTimes(rank=rank, host=own[-1].host, busy_s=sum(each.busy_s for each in own), waits=waits)


def _excess(window: Mapping[int, RankTimes], rank: int) -> float:
    """By what share of the median of the others a rank was busy longer than it."""
    middle = median(found.busy_s for found in window.values() if found.rank != rank)
    return (window[rank].busy_s - middle) / max(middle, 1e-9)
