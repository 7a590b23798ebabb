"""Which rank is the slowest, by how much, and at what: from how long each was busy and what it waited for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

_TOLERANCE = 0.1  # of the median: ranks that do the same differ by a few percent, even on one machine
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
    """The rank that holds the others up; None where the slowest is within 10 % of the median, or alone.

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
