"""Feed a trainer from packs: read extents ahead, gather rows from tiers and extents, admit rows, hand out batches.

Nothing is decided here; the plan lies in the extents. One thread reads (`storage.extents`), one verifies and assembles,
the consumer computes. Memory is the host tier, a ring of extents (two or more, as many as the budget holds) and two
batches; the payloads of two items, some percent of their features, come on top.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.engine.buffers import GROWTH, BatchBuffer, make_batch
from penstock.engine.device_tier import DeviceTier, gather_on_device, on_stream, side_stream
from penstock.engine.minibatch import MiniBatch
from penstock.engine.prefetch import Counters, Feed
from penstock.storage.budget import Size, format_bytes, num_threads, parse_memory
from penstock.storage.errors import DoesNotFit, FormatError, Outgrown
from penstock.storage.extents import (
    ExtentStream,
    LoadedExtent,
    PackWindow,
    Slot,
    delete_windows,
    holders_before,
    item_of,
    verify_extent,
    wait_for_window,
)
from penstock.storage.graph import GraphStore
from penstock.storage.pack import Extent, PackSetMeta, feed_memory, open_packset, read_pack_index, read_wrap
from penstock.storage.paths import AnyPath
from penstock.storage.pipe import PipeClosed
from penstock.storage.table import RowSource, StoredRows
from penstock.storage.tiers import HostTier, place_rows, restore

logger = logging.getLogger(__name__)

_MAX_SLOTS = 4  # more extents in flight did not make the feed faster on the reference machine


class PackSource:
    """Assembles the items of a pack set, step by step; a `prefetch.Source`."""

    def __init__(
        self,
        packs: Path,
        meta: PackSetMeta,
        rows: RowSource,
        steps: range,
        slots: list[Slot],
        *,
        device: torch.device,
        threads: int,
        producer_check: Callable[[], None] | None,
        start_over: Callable[[int], tuple[PackSetMeta, list[Slot]]] | None,
    ) -> None:
        self._packs, self._rows, self._steps, self._device = packs, rows, steps, device
        self._threads, self._check, self._start_over = threads, producer_check, start_over
        self._copies = side_stream(device)
        self._stream: ExtentStream | None = None
        self._restored_bytes, self._past_read_s, self._stopped = 0, 0.0, False
        self.counters = Counters()
        self._take(meta, slots)

    def _take(self, meta: PackSetMeta, slots: list[Slot]) -> None:
        self._meta, self._slots = meta, slots
        self._host = HostTier(meta.host_slots, meta.row_format)
        with on_stream(self._copies):
            self._on_device = DeviceTier(meta.device_slots, meta.row_format, self._device)

    def assemble(self, step: int, buffer: BatchBuffer) -> MiniBatch:
        """Wait for a step's extent, make its batch, and update the host tier."""
        with on_stream(self._copies):
            stream, loaded = self._load(step)
            started = time.perf_counter()
            extent = verify_extent(loaded)
            self._check_codes(extent)
            batch = self._gather(extent, loaded.slot, step, buffer)
            stream.release(loaded.slot)
            self._wrap_after(loaded.item)
        self.counters.assemble_s += time.perf_counter() - started
        self.counters.read_s = self._past_read_s + stream.read_s
        self.counters.bytes_read = self._restored_bytes + stream.bytes_read
        return batch

    def _load(self, step: int) -> tuple[ExtentStream, LoadedExtent]:
        """Wait for a step's extent; where windows have outgrown what they were sized for, from packs sized anew."""
        while True:
            try:
                stream = self._stream or self._open()
                return stream, stream.get()
            except Outgrown as reason:
                if self._start_over is None:
                    raise
                logger.warning("rolling windows start anew at step %d: %s", step, reason)
            if self._stream is not None:
                self._stream.close()
                self._restored_bytes += self._stream.bytes_read
                self._past_read_s += self._stream.read_s
            self._stream, self._steps = None, range(step, self._steps.stop)
            del self._host, self._on_device, self._slots  # before there are others
            self._take(*self._start_over(step))

    def _gather(self, extent: Extent, slot: Slot, step: int, buffer: BatchBuffer) -> MiniBatch:
        head = extent.head
        item = buffer.keep_payload(slot.buffer[head.payload_offset : head.payload_offset + head.payload_bytes])
        place = place_rows(slot.buffer, extent, self._meta.row_format)
        if self._on_device.num_slots == 0 and self._on_device.rows.device.type == "cpu":
            rows = buffer.host_rows(len(extent.source))
            self._host.gather(extent.source, place, rows, self._threads)
            features = torch.from_numpy(rows)
        else:
            features = gather_on_device(extent.source, place, self._host, self._on_device, buffer, self._threads)
        self._host.admit(extent.admit_rows, extent.admit_slots, place)
        self._count(extent)
        return make_batch(item, step, step // self._meta.items_per_epoch, features)

    def _count(self, extent: Extent) -> None:
        device, host = self._meta.device_slots, self._meta.device_slots + self._meta.host_slots
        on_device = int(np.count_nonzero(extent.source < device)) if device else 0
        on_host = int(np.count_nonzero(extent.source < host)) - on_device
        self.counters.device_rows += on_device
        self.counters.host_rows += on_host
        self.counters.pack_rows += len(extent.source) - on_device - on_host

    def _check_codes(self, extent: Extent) -> None:
        """The kernels trust these numbers; a checksum only says that they are what the packer wrote."""
        rows = extent.head.num_rows + extent.head.num_shared
        first = self._meta.device_slots + self._meta.host_slots
        for codes, limit in ((extent.source, first + rows), (extent.admit_rows, rows)):
            if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < limit:
                raise FormatError(
                    f"item {extent.head.item} names row {int(codes.min())} or {int(codes.max())} of {limit}; pack again"
                )
        if extent.head.row_bytes != self._meta.row_format.row_bytes:
            raise FormatError(f"item {extent.head.item} has rows of {extent.head.row_bytes} bytes; pack again")

    def _wrap_after(self, item: int) -> None:
        """After the last item of a lap, bring the rows back to where the first window expects them."""
        if self._meta.mode == "reuse" and item == self._meta.num_items - 1:
            index = read_pack_index(self._packs, self._meta.num_windows - 1)
            self._host.wrap(read_wrap(self._packs, index))

    def _open(self) -> ExtentStream:
        """Restore the tiers as they are before the first step, then start to read."""
        first = item_of(self._meta, self._steps.start)
        window = first // self._meta.window_items
        index = wait_for_window(self._packs, window, self._check, lambda: self._stopped)
        with PackWindow(self._packs, index) as opened:
            on_device = opened.residents()[: self._meta.device_slots]
            on_host = holders_before(opened, first, self._meta.device_slots, self._slots[0])
        self._check_slot_counts(on_device, on_host)
        self._restored_bytes += restore(self._on_device, on_device, self._rows)
        self._restored_bytes += restore(self._host, on_host, self._rows)
        self._stream = ExtentStream(self._packs, self._meta, self._steps, self._slots, producer_check=self._check)
        if self._stopped:  # `close` may have come before there was a stream to close
            self._stream.close()
            raise PipeClosed
        return self._stream

    def _check_slot_counts(self, on_device: NDArray[np.int64], on_host: NDArray[np.int64]) -> None:
        if (len(on_device), len(on_host)) != (self._meta.device_slots, self._meta.host_slots):
            raise FormatError(
                f"{self._packs}: residents fill {len(on_device)} device and {len(on_host)} host slots, "
                f"the pack set has {self._meta.device_slots} and {self._meta.host_slots}; pack again"
            )

    def ready_event(self) -> Any:
        """The event behind the copies of the last batch; None on the CPU."""
        return None if self._copies is None else self._copies.record_event()

    def close(self) -> None:
        """Stop reading."""
        self._stopped = True
        if self._stream is not None:
            self._stream.close()


def make_slots(meta: PackSetMeta, host_memory: int) -> list[Slot]:
    """Allocate the ring within the budget; DoesNotFit names the smallest that would do."""
    sizes = {"host_slots": meta.host_slots, "row_bytes": meta.row_format.row_bytes, "width": meta.width}
    needs = feed_memory(max_extent_bytes=meta.max_extent_bytes, max_inputs=meta.max_inputs, **sizes)
    if needs > host_memory:
        raise DoesNotFit(
            f"host memory {format_bytes(host_memory)} does not hold the {format_bytes(needs)} that feeding these packs "
            f"takes (host tier, two extents, two batches); give --host-memory at least {needs} bytes, or pack for less"
        )
    room = host_memory - feed_memory(max_extent_bytes=0, max_inputs=meta.max_inputs, **sizes)
    if meta.max_extent_bytes == 0:  # rolling: the windows are not there yet
        return [Slot(0, limit=room // 2) for _ in range(2)]
    count = min(_MAX_SLOTS, room // meta.max_extent_bytes)
    return [Slot(meta.max_extent_bytes, limit=room // count) for _ in range(count)]


def batches_bytes(max_inputs: int, width: int, payload_bytes: int) -> int:
    """What two batches take: features [max_inputs, width] in float32, and payloads."""
    return 2 * (max_inputs * width * 4 + int(payload_bytes * GROWTH))


def feed_peak_bytes(
    *,
    host_slots: int,
    row_bytes: int,
    width: int,
    max_inputs: int,
    max_extent_bytes: int,
    payload_bytes: int,
    host_memory: int,
    rolling: bool,
) -> dict[str, int]:
    """What an open feed holds at most, by component: `make_slots` takes as large a ring as the budget allows."""
    sizes = {"host_slots": host_slots, "row_bytes": row_bytes, "width": width, "max_inputs": max_inputs}
    room = host_memory - feed_memory(max_extent_bytes=0, **sizes)
    count = 2 if rolling else max(2, min(_MAX_SLOTS, room // max(1, max_extent_bytes)))
    return {
        "host tier": host_slots * row_bytes,
        "extents": count * max_extent_bytes,
        "batches": batches_bytes(max_inputs, width, payload_bytes),
    }


def open_pack_feed(
    packs: AnyPath,
    graph: GraphStore | RowSource,
    *,
    start_step: int = 0,
    stop_step: int,
    host_memory: Size,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    producer_check: Callable[[], None] | None = None,
    start_over: Callable[[int], None] | None = None,
    delete_behind: bool = False,
    auto_release: bool = True,
) -> Feed:
    """Open an iterator of the mini-batches of steps start_step <= s < stop_step; also a context manager.

    Step s is item s % num_items of a `reuse` pack set, item s of a `rolling` one. `producer_check` raises when the
    process that makes rolling windows is gone; without it, a missing window is an error at once. Where it raises
    Outgrown, `start_over(step)` makes the folder hold larger ones from a step on. `delete_behind`
    deletes windows behind the feed: as soon as their last batch is given back, or, without `auto_release`, when
    `feed.release(step)` says that nothing before `step` is wanted again. Of `graph` only the rows are read that fill
    the tiers before the first step.

    Raises FormatError where packs are damaged or of another graph, DoesNotFit where `host_memory` is too small.
    """
    packs, host_memory = Path(packs), parse_memory(host_memory)
    meta = open_packset(packs)
    rows = StoredRows(graph) if isinstance(graph, GraphStore) else graph
    if meta.graph != rows.fingerprint:
        where_from = graph.path if isinstance(graph, GraphStore) else f"{rows.fingerprint}, which rows come from"
        raise FormatError(f"{packs} was packed from another graph than {where_from}; pack again")
    slots, where = make_slots(meta, host_memory), torch.device(device)
    current, replacing = [meta], threading.Lock()  # windows are numbered otherwise once they are sized anew

    def take_over(step: int) -> tuple[PackSetMeta, list[Slot]]:
        assert start_over is not None
        slots.clear()
        with replacing:
            start_over(step)
            current[0] = open_packset(packs)
        return current[0], make_slots(current[0], host_memory)

    def open_source(steps: range) -> PackSource:
        return PackSource(
            packs,
            current[0],
            rows,
            steps,
            slots if current[0] is meta else make_slots(current[0], host_memory),
            device=where,
            threads=num_threads() if threads is None else threads,
            producer_check=producer_check,
            start_over=None if start_over is None else take_over,
        )

    def release(step: int) -> None:
        with replacing:
            if delete_behind and meta.mode == "rolling":
                delete_windows(packs, step // current[0].window_items)

    return Feed(
        open_source,
        lambda: BatchBuffer(meta.max_inputs, meta.width, where),
        start_step,
        stop_step,
        release=release,
        auto_release=auto_release,
    )
