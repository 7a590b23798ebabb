"""What drives ranks: a backend calls one method on all of them at once and gives their answers, or the first error.

| backend | ranks are | data plane |
|---|---|---|
| `threads` | threads of this process | queues |
| `processes` | child processes of this one | gloo, or NCCL on CUDA |
| `ray` (`penstock.cluster`) | Ray actors, one call per epoch | gloo, or NCCL on CUDA |

All of them carry out the same lists with the same arithmetic, so on CPU they end with the same bits.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from penstock.engine.chunked.layout import Layout
from penstock.storage.errors import TryAgain

POLL_S = 0.05
Poll = Callable[[], None]


class WorkerSpec(Protocol):
    """What a backend needs to know of a rank; a frozen dataclass that pickles. See spec.RankSpec."""

    @property
    def rank(self) -> int: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def scratch(self) -> Path: ...
    @property
    def threads(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def timeout_s(self) -> float: ...
    @property
    def place(self) -> str: ...


AnySpec = TypeVar("AnySpec", bound=WorkerSpec)


class RankFailed(RuntimeError):
    """A rank raised, died or fell silent; the message says which, where, why and at what.

    Training goes on from the last checkpoint.
    """


class NodeLost(TryAgain, RankFailed):
    """A rank went with its node. A new group may find another node, and so may a new run."""


class NoRoomYet(TryAgain, RankFailed):
    """The cluster has no room for all ranks, not yet or not any more: nodes may come."""


class Backend(Protocol):
    """Ranks that wait for calls; a context manager that ends them behind it."""

    def call(
        self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None, poll: Poll | None = None
    ) -> list[Any]:
        """Call `Rank.<method>(*arguments[rank])` on every rank at once (no arguments: none) and wait for all answers.

        `poll` is called every 50 ms meanwhile, in this thread; what it raises ends the wait. The first error wins:
        errors of a rank's own are raised as they are (ValueError, DoesNotFit, ...); that a rank died, lost a peer or
        did not move for `timeout_s` is a RankFailed with its number. After an error the backend can only be left.
        """


OpenBackend = Callable[[Sequence[Any]], AbstractContextManager[Backend]]


class Board:
    """How far every rank is, in a file that all of them map: `done` and `total` actions, and when (ns, monotonic)."""

    def __init__(self, path: Path, num_ranks: int) -> None:
        self.path = path.absolute()
        if not path.is_file() or path.stat().st_size != num_ranks * 24:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(num_ranks * 24))
        self._rows: np.memmap[Any, np.dtype[np.int64]] = np.memmap(path, np.int64, mode="r+", shape=(num_ranks, 3))

    def heartbeat(self, rank: int) -> Callable[[int, int], None]:
        """The function that one rank calls after every action."""
        row = self._rows[rank]

        def beat(done: int, total: int) -> None:
            row[0], row[1], row[2] = done, total, time.monotonic_ns()

        return beat

    def done(self) -> tuple[int, int]:
        """Actions done and in all, over all ranks."""
        return int(self._rows[:, 0].sum()), int(self._rows[:, 1].sum())

    def read(self) -> list[tuple[int, int, int]]:
        """Done, total and time of every rank."""
        return [(int(a), int(b), int(c)) for a, b, c in self._rows]

    def reset(self) -> None:
        """Before a call."""
        self._rows[:] = 0


def open_board(specs: Sequence[WorkerSpec]) -> Board:
    """The board of a run's ranks, in their scratch folder."""
    return Board(specs[0].scratch / "heartbeats", len(specs))


def spread_over_gpus(specs: Sequence[AnySpec]) -> tuple[list[AnySpec], int]:
    """Let ranks take this machine's GPUs in turn, where they want one; returns how many there are, 0 for the CPU.

    ValueError where a GPU is wanted and there is none.
    """
    if not specs[0].device.startswith("cuda"):
        return list(specs), 0
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"device={specs[0].device}, but this machine has no CUDA device; set device to cpu")
    return [replace(spec, device=f"cuda:{spec.rank % count}") for spec in specs], count  # type: ignore[type-var]
