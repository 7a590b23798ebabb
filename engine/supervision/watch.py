"""Watches one call on all ranks: tells the failure policy what is seen, and carries out what it decides."""

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from penstock.engine.chunked.backend import Board, RankFailed, WorkerSpec
from penstock.engine.chunked.failures import during
from penstock.engine.chunked.transport import PeerLost
from penstock.engine.supervision.events import (
    Answered,
    Beat,
    Called,
    Cause,
    Dumped,
    DumpStacks,
    Failed,
    KillGroup,
    Kind,
    Observation,
    Tick,
    Wait,
)
from penstock.engine.supervision.policy import State, step
from penstock.engine.supervision.slots import SlotOf, slots_of
from penstock.engine.supervision.stacks import excerpt, is_frozen, waits_for_others

START_S = 120.0  # at least, for ranks to open: interpreters may read torch from a cold disk
Collect = Callable[[Sequence[int]], dict[int, str]]  # the stacks of ranks


def kind_of(error: BaseException) -> Kind:
    """What an error says of its rank: it lost a peer, is lost itself, or has an error of its own."""
    return "peer" if isinstance(error, PeerLost) else "lost" if isinstance(error, RankFailed) else "own"


class Watch:
    """Gathers what the ranks answer to one call, and the error that ends it; used by one thread.

    `timeout_s` is for how long a rank may not move while others wait for it, the specs' where it is none. `where`
    tells of a rank where it runs. What the board says of `far` ranks may be old.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        board: Board,
        method: str,
        arguments: Sequence[tuple[Any, ...]],
        *,
        collect: Collect,
        where: Callable[[int], str],
        timeout_s: float | None = None,
        far: Collection[int] = (),
    ) -> None:
        self._specs, self._board, self._method, self._arguments = specs, board, method, arguments
        self._collect, self._where, self._far = collect, where, far
        self._timeout_s = specs[0].timeout_s if timeout_s is None else timeout_s
        self._state, self._began_s = State(num_ranks=len(specs)), time.monotonic()
        self._values: dict[int, Any] = {}
        self._errors: dict[int, BaseException] = {}
        self._stacks: dict[int, str] = {}
        self._cause: Cause | None = None
        self._due_s: float | None = None
        self._see([Called(at_s=self._began_s, timeout_s=self._timeout_s)])

    def add(self, rank: int, value: Any) -> None:
        """Take a rank's value."""
        self._values[rank] = value
        self._see([Answered(at_s=time.monotonic(), rank=rank)])

    def fail(self, rank: int, error: BaseException) -> None:
        """Take a rank's error."""
        self._errors.setdefault(rank, error)
        self._see([Failed(at_s=time.monotonic(), rank=rank, kind=kind_of(error))])

    def tick(self) -> None:
        """Look at the clock. To be called when all that ranks have answered was taken, or an answer may be late."""
        now_s = time.monotonic()
        if self._due_s is None or now_s < self._due_s:
            return
        seen: list[Observation] = []
        rows = self._board.read()
        for rank in self._state.pending:
            done, _, at_ns = rows[rank]
            slot = self._slot_of(rank, done)
            seen.append(Beat(at_s=max(self._began_s, at_ns / 1e9), rank=rank, slot=slot))
        self._see([*seen, Tick(at_s=now_s)])

    @cached_property
    def _slot_of(self) -> SlotOf:
        return slots_of(self._specs[0].layout, self._arguments)

    @property
    def has_failed(self) -> bool:
        """Whether any rank has failed."""
        return bool(self._errors)

    @property
    def is_over(self) -> bool:
        """Whether to wait no longer: all are there, or an error is that does not merely follow from another."""
        return self._state.phase != "calling"

    def values(self) -> list[Any]:
        """The values by rank; raises the error that explains the others, with the number of its rank."""
        if self._cause is None:
            return [self._values[rank] for rank in range(len(self._specs))]
        rank = self._cause.member
        error = self._errors[rank]
        if isinstance(error, PeerLost):
            raise RankFailed(f"rank {rank}: {error}") from error
        if not isinstance(error, RankFailed):
            with contextlib.suppress(AttributeError):  # Python 3.10 has no notes
                error.add_note(f"in rank {rank} ({self._where(rank)})")
        raise error

    def _see(self, seen: Sequence[Observation]) -> None:
        """Take a step of the policy, and carry out what it decides: the caller of `values` ends the group."""
        self._state, decisions = step(self._state, seen)
        for decision in decisions:
            match decision:
                case Wait(until_s=until_s):
                    self._due_s = until_s
                case DumpStacks(ranks=ranks):
                    self._dump(ranks)
                case KillGroup(cause=cause):
                    self._cause = cause
                    if cause.kind == "silent":
                        self._errors[cause.member] = self._silence(cause.member)

    def _dump(self, ranks: Sequence[int]) -> None:
        """Look where all ranks are; only `ranks`, which have not answered, may be at fault."""
        self._stacks = self._collect(range(len(self._specs)))
        found = {rank: text for rank, text in self._stacks.items() if rank in ranks}
        frozen = frozenset(rank for rank, text in found.items() if is_frozen(text))
        waiting = frozenset(rank for rank, text in found.items() if waits_for_others(text))
        self._see([Dumped(at_s=time.monotonic(), frozen=frozen, waiting=waiting)])

    def _silence(self, rank: int) -> RankFailed:
        """Say which rank did not move, since when, at what, and where its threads are."""
        spec, moved_s = self._specs[rank], self._state.members[rank].moved_s
        silent_s = time.monotonic() - moved_s
        since = datetime.fromtimestamp(time.time() - silent_s, timezone.utc)
        is_current = rank not in self._far
        at = during(spec, self._method, self._arguments[rank], self._board, is_current=is_current)
        return RankFailed(
            f"{spec.place} did not move for {silent_s:.1f} s, since {since:%H:%M:%S} UTC, more than "
            f"timeout_s={self._timeout_s:g} ({self._where(rank)}); {at}. Run again, it goes on from the last "
            f"checkpoint; raise timeout_s if its steps take longer. {self._write_stacks()}Its own:\n"
            f"{excerpt(self._stacks.get(rank, 'unknown'))}"
        )

    def _write_stacks(self) -> str:
        """Write all stacks to one file, and say where; a disk that is full must not hide what happened."""
        path: Path = self._specs[0].scratch / "stacks.txt"
        parts = (
            f"== {self._specs[rank].place}, {self._where(rank)}\n{text.strip()}\n"
            for rank, text in sorted(self._stacks.items())
        )
        with contextlib.suppress(OSError):
            path.write_text("\n".join(parts))
            return f"The stacks of all ranks are in {path}. "
        return ""
