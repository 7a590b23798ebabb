"""Feed a trainer with all features in memory: what out-of-core training is compared with, bit by bit and in time.

It uses the same kernels, buffers and prefetching thread as the pack feed, so that a comparison measures data movement
and nothing else.
"""

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.engine.buffers import BatchBuffer, make_batch
from penstock.engine.device_tier import side_stream
from penstock.engine.minibatch import MiniBatch
from penstock.engine.prefetch import Counters, Feed
from penstock.storage.budget import num_threads
from penstock.storage.errors import FormatError
from penstock.storage.graph import GraphStore
from penstock.storage.rows import RowDtype, RowFormat
from penstock.storage.table import FeatureTable
from penstock.storage.tiers import as_words, gather_table
from penstock.storage.trace import Trace, TraceWindow

_PIECE_ROWS = 1 << 16


def load_features(graph: GraphStore, row_format: RowFormat) -> NDArray[Any]:
    """Read the whole feature table into memory, as the words that the gather kernels want."""
    rows = np.empty((graph.num_nodes, row_format.row_bytes), np.uint8)
    with FeatureTable(graph, row_format) as table:
        for lo in range(0, graph.num_nodes, _PIECE_ROWS):
            hi = min(lo + _PIECE_ROWS, graph.num_nodes)
            table.gather(np.arange(lo, hi), rows[lo:hi])
    return as_words(rows.reshape(-1), row_format)


class MemorySource:
    """Assembles the items of a trace from a table in memory; a `prefetch.Source`."""

    def __init__(
        self, trace: Trace, table: NDArray[Any], row_format: RowFormat, device: torch.device, threads: int
    ) -> None:
        self._trace, self._table, self._row_format = trace, table, row_format
        self._device, self._threads, self._copies = device, threads, side_stream(device)
        self._window: TraceWindow | None = None
        self.counters = Counters()

    def assemble(self, step: int, buffer: BatchBuffer) -> MiniBatch:
        """Make a step's batch."""
        started = time.perf_counter()
        meta = self._trace.meta
        window, position = divmod(step % meta.num_items, meta.window_items)
        if self._window is None or self._window.index.window != window:
            self._window = self._trace.window(window)
        item = buffer.keep_payload(self._window.payload(position))
        rows = buffer.host_rows(len(item.input_ids))
        gather_table(self._table, item.input_ids, self._row_format, rows, self._threads)
        batch = self._to_device(item, step, rows, buffer)
        self.counters.host_rows += len(rows)
        self.counters.assemble_s += time.perf_counter() - started
        return batch

    def _to_device(self, item: Any, step: int, rows: NDArray[np.float32], buffer: BatchBuffer) -> MiniBatch:
        epoch = step // self._trace.meta.items_per_epoch
        if self._copies is None:
            return make_batch(item, step, epoch, torch.from_numpy(rows).to(self._device))
        with torch.cuda.stream(self._copies):
            features = buffer.device_rows(len(rows))
            features.copy_(torch.from_numpy(rows), non_blocking=True)
            return make_batch(item, step, epoch, features)

    def ready_event(self) -> Any:
        """The event behind the copies of the last batch; None on the CPU."""
        return None if self._copies is None else self._copies.record_event()

    def close(self) -> None:
        """Nothing runs in the background."""


def open_memory_feed(
    graph: GraphStore,
    trace: Trace,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    row_dtype: RowDtype | None = None,
    device: torch.device | str = "cpu",
    threads: int | None = None,
) -> Feed:
    """Open an iterator of the mini-batches of steps start_step <= s < stop_step; also a context manager.

    Step s is item s % num_items; by default it goes once over all items. Features go through `row_dtype` (None: as
    stored), so that batches equal those of packs of that dtype. Takes memory for the whole table. FormatError where the
    trace is of another graph, or of a
    release that sampled less (see `Trace.indexes`).
    """
    if trace.meta.graph != graph.fingerprint:
        raise FormatError(f"{trace.path} was sampled from another graph than {graph.path}; sample again")
    row_format = RowFormat(dtype=row_dtype or graph.meta.feature_dtype, width=graph.meta.num_features)
    stop = trace.meta.num_items if stop_step is None else stop_step
    where, count = torch.device(device), num_threads() if threads is None else threads
    max_inputs = max((max(index.num_inputs) for index in trace.indexes()), default=0)
    table = load_features(graph, row_format)

    def open_source(steps: range) -> MemorySource:
        return MemorySource(trace, table, row_format, where, count)

    return Feed(open_source, lambda: BatchBuffer(max_inputs, row_format.width, where), start_step, stop)
