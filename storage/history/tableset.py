"""The tables of one rank: where each lies, what they take, and their counters."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penstock.storage.budget import format_bytes
from penstock.storage.directio import DirectFile
from penstock.storage.errors import DoesNotFit
from penstock.storage.history.disk import Disk, DiskStore
from penstock.storage.history.layout import plan_layout
from penstock.storage.history.store import ArrayStore, RunStore
from penstock.storage.history.tables import MessageTable, RowStore, RunTable
from penstock.storage.history.transfers import MIN_BUFFERS, Buffers, IoThreads
from penstock.storage.history.values import HistoryDtype

TableKind = Literal["runs", "messages", "rows"]
_NUM_BUFFERS: dict[TableKind, int] = {"runs": 2, "messages": 1, "rows": 1}
_SUFFIX = ".history"


def _stored_dtype(kind: TableKind, dtype: HistoryDtype) -> HistoryDtype:
    """Own rows are never rounded: what is recomputed from them has to come out as it did the first time."""
    return "float32" if kind == "rows" and dtype == "bfloat16" else dtype


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TableBytes:
    """What a table takes in memory, or on disk; there, all tables of a rank share buffers of at least `buffers`."""

    memory: int
    disk: int
    buffers: int


class HistorySet:
    """Makes tables; made and closed by `open_history`. Used by one thread, as its tables are."""

    def __init__(
        self,
        path: Path,
        run_sizes: NDArray[Any],
        own_sizes: NDArray[Any],
        *,
        config: HistoryConfig,
        memory: int,
        io: IoThreads,
        files: ExitStack,
    ) -> None:
        self.path, self.config, self.memory = path, config, memory
        self._sizes: dict[TableKind, NDArray[Any]] = {
            "runs": run_sizes,
            "messages": run_sizes.T,
            "rows": np.diag(own_sizes),
        }
        self._io, self._files, self._table_bytes, self.disk_bytes = io, files, 0, 0
        self._disk = Disk(io=io, buffers=Buffers(io=io, poison=config.poison))
        self._stores: dict[str, RunStore] = {}

    @staticmethod
    def table_bytes(kind: TableKind, sizes: NDArray[Any], width: int, dtype: HistoryDtype) -> TableBytes:
        """Predict a table of `kind` with runs of `sizes` [K, K] (writer, reader); for rows, sizes on the diagonal."""
        stored = _stored_dtype(kind, dtype)
        plain, paged = (plan_layout(sizes, width, stored, paged=paged) for paged in (False, True))
        return TableBytes(
            memory=_NUM_BUFFERS[kind] * plain.buffer_bytes,
            disk=_NUM_BUFFERS[kind] * paged.buffer_bytes,
            buffers=MIN_BUFFERS * paged.transfer_bytes,
        )

    @property
    def resident_bytes(self) -> int:
        """Memory of tables and transfer buffers. Pages of mapped tables are the system's, and not counted."""
        return self._table_bytes + self._disk.buffers.num_bytes

    @property
    def read_bytes(self) -> int:
        """Bytes read from disk, padding included, since the set was opened; those of mapped tables are not known."""
        return self._io.counters.read_bytes

    @property
    def written_bytes(self) -> int:
        """Bytes written to disk, as `read_bytes`."""
        return self._io.counters.written_bytes

    @property
    def stall_s(self) -> float:
        """Seconds that calls waited for the disk or for a transfer buffer."""
        return self._io.counters.stall_s

    def run_table(self, name: str, width: int) -> RunTable:
        """Make a table for rows of `width` that chunks leave for the halos of others; `name` is unique in the set."""
        gamma = self.config.ema_gamma if self.config.push == "ema" else 1.0
        return RunTable(name, self._place(name, "runs", width), gamma=gamma, poison=self.config.poison)

    def message_table(self, name: str, width: int) -> MessageTable:
        """Make a table for gradients of `width` that chunks leave for the owners of their halos."""
        return MessageTable(name, self._place(name, "messages", width))

    def row_store(self, name: str, width: int) -> RowStore:
        """Make a table for own rows of `width`, in float32 where histories are bfloat16."""
        return RowStore(name, self._place(name, "rows", width))

    def flush(self) -> None:
        """Wait until all that was pushed is in its file."""
        self._io.flush()

    def _place(self, name: str, kind: TableKind, width: int) -> RunStore:
        """Decide where a table lies, and make its buffers there."""
        if name in self._stores:
            raise ValueError(f"there is a history table {name} already; give each its own name")
        for store in self._stores.values():  # transfer buffers may grow, so nothing may hold one
            store.forget()
        needs = self.table_bytes(kind, self._sizes[kind], width, self.config.dtype)
        storage = self.config.storage if self.config.storage != "auto" else self._choose(needs)
        dtype = _stored_dtype(kind, self.config.dtype)
        layout = plan_layout(self._sizes[kind], width, dtype, paged=storage == "disk")
        path = self.path / f"{name}{_SUFFIX}"
        if storage == "disk":
            self._keep_buffers(name, layout.transfer_bytes)
            file = self._files.enter_context(DirectFile(path, "write"))
            self._stores[name] = DiskStore(layout, _NUM_BUFFERS[kind], file, self._disk)
            self.disk_bytes += needs.disk
        elif storage == "mmap":
            self._stores[name] = ArrayStore(layout, _NUM_BUFFERS[kind], path)
            self.disk_bytes += needs.memory
        else:
            self._keep_in_memory(name, needs.memory)
            self._stores[name] = ArrayStore(layout, _NUM_BUFFERS[kind])
        return self._stores[name]

    def _choose(self, needs: TableBytes) -> Literal["memory", "disk"]:
        """Memory, as long as there is room for the buffers that this table or a later one wants on disk."""
        buffers = max(needs.buffers, MIN_BUFFERS * self._disk.buffers.size, self._disk.buffers.num_bytes)
        return "memory" if self._table_bytes + needs.memory + buffers <= self.memory else "disk"

    def _keep_in_memory(self, name: str, num_bytes: int) -> None:
        need = self._table_bytes + num_bytes
        if need > self.memory:
            raise DoesNotFit(
                f"history tables up to {name} take {format_bytes(need)} in memory, and {format_bytes(self.memory)} are "
                "given; raise the host budget, or let them lie on disk (history_storage auto)",
                host_bytes=need,
            )
        self._table_bytes = need
        self._disk.buffers.fit(0, self.memory - need)

    def _keep_buffers(self, name: str, transfer_bytes: int) -> None:
        size, left = max(self._disk.buffers.size, transfer_bytes), self.memory - self._table_bytes
        need = MIN_BUFFERS * size
        if need > left:
            raise DoesNotFit(
                f"history table {name} on disk needs {MIN_BUFFERS} transfer buffers of {format_bytes(size)}, and "
                f"{format_bytes(left)} of {format_bytes(self.memory)} are left; raise the host budget to at least "
                f"{format_bytes(self._table_bytes + need)}, or train with more chunks",
                host_bytes=self._table_bytes + need,
            )
        self._disk.buffers.fit(size, left)


@contextmanager
def open_history(
    path: Path,
    run_sizes: NDArray[Any],
    own_sizes: NDArray[Any],
    *,
    config: HistoryConfig,
    memory: int,
    io_delay_s: float = 0.0,
) -> Iterator[HistorySet]:
    """Make a set whose tables have runs of `run_sizes` [K, K] (writer, reader) and chunks of `own_sizes` [K] rows.

    `memory` bytes are for tables and transfer buffers together. `path` is a folder of this set alone: its history
    files are deleted at the end, and what a killed run left there at the start. Transfers are `io_delay_s` late.
    """
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    _delete(path)
    try:
        with ExitStack() as files, IoThreads(io_delay_s) as io:  # threads end before files are closed
            yield HistorySet(path, run_sizes, own_sizes, config=config, memory=memory, io=io, files=files)
    finally:
        _delete(path)
        if made and not any(path.iterdir()):
            path.rmdir()


def _delete(path: Path) -> None:
    for file in path.glob(f"*{_SUFFIX}"):
        file.unlink()
