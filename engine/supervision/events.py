"""What the failure policy is told, and what it decides: plain values. See `policy`, which alone relates them."""

from dataclasses import dataclass
from typing import Literal

# own: an error of the rank's own, which a restart cannot mend; lost: it died; silent: it did not move in time; peer: it
# lost another; feeder: one cannot be replaced any more
Kind = Literal["own", "lost", "silent", "peer", "feeder"]
_MENDABLE: frozenset[Kind] = frozenset({"lost", "silent", "peer"})


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a group ends: what became of a rank, or of a feeder, and when."""

    kind: Kind
    member: int
    at_s: float

    @property
    def is_mendable(self) -> bool:
        """Whether a new group may do better."""
        return self.kind in _MENDABLE


# observations; `at_s` is seconds on one clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """A call began on all ranks; no rank may be silent for longer than `timeout_s`."""

    at_s: float
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """A rank moved at `at_s`; `slot` is the logical time of what it does next, comparable among ranks."""

    at_s: float
    rank: int
    slot: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A rank did what it was called for."""

    at_s: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A rank raised (`own`, `peer`), or is no more (`lost`)."""

    at_s: float
    rank: int
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Dumped:
    """Stacks were collected: some ranks are `frozen` by a signal, some are seen `waiting` for others."""

    at_s: float
    frozen: frozenset[int] = frozenset()
    waiting: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """No process of the group is left."""

    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested:
    """SIGTERM, or a node that will be taken away."""

    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FeederFailed:
    """A feeder died, or is too slow for those that it feeds."""

    at_s: float
    feeder: int
    is_dead: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passed."""

    at_s: float


Observation = Called | Beat | Answered | Failed | Dumped | Ended | StopRequested | FeederFailed | Tick


# decisions


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing until something is seen, or until `until_s`, where that is a time; then tick."""

    until_s: float | None


@dataclass(frozen=True, slots=True)
class Proceed:
    """All ranks have answered: hand the answers on."""


@dataclass(frozen=True, slots=True)
class DumpStacks:
    """Collect the stacks of `ranks`, of which `culprit` seems to have stopped first, and tell with Dumped."""

    ranks: tuple[int, ...]
    culprit: int


@dataclass(frozen=True, slots=True)
class KillGroup:
    """End every process of the group, and tell with Ended."""

    cause: Cause


@dataclass(frozen=True, slots=True)
class Restart:
    """After `pause_s` open a new group, with a rendezvous of its own, from the newest checkpoint; tell with Called."""

    attempt: int
    pause_s: float


@dataclass(frozen=True, slots=True)
class ReplaceFeeder:
    """Start another feeder in the place of this one; what it owed is built anew."""

    feeder: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Raise the cause."""

    cause: Cause


@dataclass(frozen=True, slots=True)
class Finish:
    """End with this exit code."""

    code: int


Decision = Wait | Proceed | DumpStacks | KillGroup | Restart | ReplaceFeeder | GiveUp | Finish
