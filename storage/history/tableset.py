"""The tables of one rank: where each lies, what they take, and their counters."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penstock.storage.budget import format_bytes
from penstock.storage.errors import DoesNotFit
from penstock.storage.history.layout import RunLayout, plan_layout
from penstock.storage.history.store import ArrayStore, RunStore
from penstock.storage.history.tables import MessageTable, RowStore, RunTable
from penstock.storage.history.values import HistoryDtype

Place = Literal["memory", "mmap", "disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryConfig:
    """Where histories lie (`auto`: in memory while they fit, then on disk) and what they hold.

    `push` copies fresh rows to past ones, or makes past ones a moving average with weight `ema_gamma` of the fresh.
    `poison` fills what is dead with NaN, so that its use shows; for tests, as it costs a pass over every buffer.
    """

    storage: Literal["auto", "memory", "mmap", "disk"] = "auto"
    dtype: HistoryDtype = "float32"
    push: Literal["copy", "ema"] = "copy"
    ema_gamma: float = 0.9
    poison: bool = False


class HistorySet:
    """Makes tables; made and closed by `open_history`. Used by one thread, as its tables are."""

    def __init__(
        self, path: Path, run_sizes: NDArray[Any], own_sizes: NDArray[Any], config: HistoryConfig, memory: int
    ) -> None:
        self.path, self.config, self.memory = path, config, memory
        self._run_sizes, self._own_sizes = run_sizes, own_sizes
        self.resident_bytes = 0  # of tables in memory and of transfer buffers
        self.disk_bytes = 0

    def run_table(self, name: str, width: int) -> RunTable:
        """Make a table for rows of `width` that chunks leave for the halos of others; `name` is unique in the set."""
        gamma = self.config.ema_gamma if self.config.push == "ema" else 1.0
        return RunTable(name, self._store(name, self._run_sizes, width, 2), gamma=gamma, poison=self.config.poison)

    def message_table(self, name: str, width: int) -> MessageTable:
        """Make a table for gradients of `width` that chunks leave for the owners of their halos."""
        return MessageTable(name, self._store(name, self._run_sizes.T, width, 1))

    def row_store(self, name: str, width: int) -> RowStore:
        """Make a table for own rows of `width`."""
        return RowStore(name, self._store(name, np.diag(self._own_sizes), width, 1))

    def _store(self, name: str, sizes: NDArray[Any], width: int, num_buffers: int) -> RunStore:
        layout = plan_layout(sizes, width, self.config.dtype, paged=False)
        if self.config.storage == "mmap":
            self.disk_bytes += num_buffers * layout.buffer_bytes
            return ArrayStore(layout, num_buffers, self.path / f"{name}.history")
        return self._in_memory(name, layout, num_buffers)

    def _in_memory(self, name: str, layout: RunLayout, num_buffers: int) -> RunStore:
        need = self.resident_bytes + num_buffers * layout.buffer_bytes
        if need > self.memory:
            raise DoesNotFit(
                f"history tables up to {name} take {format_bytes(need)} in memory, and {format_bytes(self.memory)} are "
                f"given; raise the host budget, or let them lie on disk (history_storage auto)",
                host_bytes=need,
            )
        self.resident_bytes = need
        return ArrayStore(layout, num_buffers)


@contextmanager
def open_history(
    path: Path, run_sizes: NDArray[Any], own_sizes: NDArray[Any], *, config: HistoryConfig, memory: int
) -> Iterator[HistorySet]:
    """Make a set whose tables have runs of `run_sizes` [K, K] (writer, reader) and chunks of `own_sizes` [K] rows.

    `memory` bytes are for tables and transfer buffers together. Files in `path` are deleted at the end.
    """
    yield HistorySet(path, run_sizes, own_sizes, config, memory)
