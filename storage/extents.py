"""Read extents, whole, in order, ahead of their use, into a ring of reused aligned buffers.

One thread loads extent after extent, and cuts each into four reads that are in flight together: with both cores of the
reference machine busy, four gave 1.2 times the bytes per second of one; on a quiet machine it makes no difference.
Checksums are left to the consumer (`verify_extent`), so that they overlap the next read; only an extent that names
shared pages is verified before they are read. Those pages are compared with theirs each time that they come.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.kernels.parallel import split
from penstock.storage.directio import PAGE, DirectFile, aligned_buffer, page_up
from penstock.storage.errors import DoesNotFit, FormatError
from penstock.storage.pack import (
    WINDOW_FILES,
    Extent,
    PackIndex,
    PackSetMeta,
    decode_extent,
    page_sums,
    read_pack_index,
    read_pages,
    read_residents,
)
from penstock.storage.pipe import Pipe, PipeClosed, join_worker, start_worker
from penstock.storage.spans import TRACE
from penstock.storage.trace import window_name, withdraw_window

_POLL_S = 0.02  # how often a rolling reader looks for the next window
_READ_THREADS = 4


@lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    """Threads of their own: a gather on the kernels' threads must not queue behind a read."""
    return ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="penstock-pread")


def item_of(meta: PackSetMeta, step: int) -> int:
    """The item that a step trains on: reused packs go round, rolling ones go on."""
    return step % meta.num_items if meta.mode == "reuse" else step


class Slot:
    """One buffer of the ring; it grows, up to `limit`, where an extent is larger than any before (`rolling` only)."""

    def __init__(self, num_bytes: int, *, limit: int) -> None:
        self.buffer, self._limit = aligned_buffer(num_bytes), limit

    def reserve(self, num_bytes: int, keep: int = 0) -> None:
        """Make room; the first `keep` bytes stay. DoesNotFit where it takes more than the limit."""
        if num_bytes > max(self._limit, len(self.buffer)):
            raise DoesNotFit(
                f"an extent takes {num_bytes} bytes of memory, the feed's ring has {self._limit} for each; "
                f"raise --host-memory by {2 * (num_bytes - self._limit)} bytes"
            )
        if num_bytes > len(self.buffer):
            old, self.buffer = self.buffer, aligned_buffer(num_bytes)
            self.buffer[:keep] = old[:keep]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedExtent:
    """An extent in memory: `slot.buffer` holds its `num_bytes` and behind them the shared pages it needs.

    `pages` are the checksums of the segment's pages; where they are not None, the extent alone is verified already.
    """

    step: int
    item: int
    slot: Slot
    num_bytes: int
    shared_bytes: int
    xxh3: str
    path: Path
    window: int
    pages: NDArray[np.uint64] | None = None

    def damaged(self, what: str) -> FormatError:
        """The error to raise; the window is taken back."""
        return withdraw_window(self.path.parent, self.window, f"{self.path}: {what}")


class PackWindow(AbstractContextManager["PackWindow"]):
    """An open window of a pack set."""

    def __init__(self, packs: Path, index: PackIndex) -> None:
        self.index, self.packs = index, packs
        self.path = packs / window_name(index.window, "pack")
        self._pages = read_pages(packs, index) if index.shared_bytes else None
        self._file = DirectFile(self.path, "read")

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._file.close()

    def residents(self) -> NDArray[np.int64]:
        """Node id per slot, device slots first, at the window's start; -1 where empty."""
        return read_residents(self.packs, self.index)

    def load(self, step: int, item: int, slot: Slot) -> LoadedExtent:
        """Read an item's extent and its shared pages into a slot."""
        offset, num_bytes, xxh3 = self._entry(item)
        slot.reserve(page_up(num_bytes))
        parts = split(page_up(num_bytes) // PAGE, _READ_THREADS)
        self._read_all([(lo * PAGE, offset + lo * PAGE, (hi - lo) * PAGE) for lo, hi in parts], slot.buffer)
        loaded = LoadedExtent(
            step=step,
            item=item,
            slot=slot,
            num_bytes=num_bytes,
            shared_bytes=0,
            xxh3=xxh3,
            path=self.path,
            window=self.index.window,
        )
        if self._pages is None:
            return loaded
        verify_extent(loaded)  # the page runs in it are about to be followed
        return self._load_shared(replace(loaded, pages=self._pages))

    def _load_shared(self, loaded: LoadedExtent) -> LoadedExtent:
        runs = decode_extent(loaded.slot.buffer[: loaded.num_bytes]).shared_runs
        ends = loaded.num_bytes + PAGE * np.cumsum(runs[:, 1])
        shared_bytes = int(PAGE * runs[:, 1].sum())
        loaded.slot.reserve(loaded.num_bytes + shared_bytes, keep=loaded.num_bytes)
        self._read_all(
            [
                (end - PAGE * pages, PAGE * first, PAGE * pages)
                for (first, pages), end in zip(runs.tolist(), ends.tolist(), strict=True)
            ],
            loaded.slot.buffer,
        )
        return replace(loaded, shared_bytes=shared_bytes)

    def _read_all(self, reads: list[tuple[int, int, int]], buffer: NDArray[np.uint8]) -> None:
        """Do reads of (place in the buffer, offset in the file, bytes), some at a time; the first error is raised."""

        futures = [
            _readers().submit(self._file.read_into, buffer[at:], offset, num_bytes) for at, offset, num_bytes in reads
        ]
        wait(futures)  # all of them, even after an error: they write into a buffer that is about to be reused
        try:
            for future in futures:
                future.result()
        except FormatError as error:
            raise withdraw_window(self.packs, self.index.window, str(error).partition(";")[0]) from error

    def _entry(self, item: int) -> tuple[int, int, str]:
        position = item - self.index.first_item
        if not 0 <= position < len(self.index.offsets):
            last = self.index.first_item + len(self.index.offsets) - 1
            raise FormatError(f"{self.path} holds items {self.index.first_item}..{last}, not {item}; pack again")
        return self.index.offsets[position], self.index.bytes[position], self.index.xxh3[position]


def verify_extent(loaded: LoadedExtent) -> Extent:
    """Compare an extent and its shared pages with their checksums, then view it.

    FormatError where it is damaged or another item's; its window is then taken back, to be packed again.
    """
    if loaded.pages is None:
        found = xxhash.xxh3_64_hexdigest(loaded.slot.buffer[: loaded.num_bytes].data)
        if found != loaded.xxh3:
            raise loaded.damaged(f"the extent of item {loaded.item} has checksum {found}, its index says {loaded.xxh3}")
    extent = decode_extent(loaded.slot.buffer[: loaded.num_bytes])
    if extent.head.item != loaded.item:
        raise loaded.damaged(f"the extent of item {loaded.item} says it is item {extent.head.item}")
    if loaded.pages is not None:
        _verify_pages(loaded, loaded.pages, extent.shared_runs)
    return extent


def _verify_pages(loaded: LoadedExtent, pages: NDArray[np.uint64], runs: NDArray[np.int64]) -> None:
    at, view = loaded.num_bytes, loaded.slot.buffer.data
    for first, count in runs.tolist():
        found = page_sums(view[at : at + count * PAGE])
        wrong = np.flatnonzero(found != pages[first : first + count])
        if len(wrong):
            page = first + int(wrong[0])
            raise loaded.damaged(f"page {page} of the shared segment, which item {loaded.item} reads, is not as packed")
        at += count * PAGE


def wait_for_window(
    packs: Path, window: int, check: Callable[[], None] | None, stopped: Callable[[], bool]
) -> PackIndex:
    """Read a window's index; waits for it while `check`, which raises if the producer died, lets it.

    Without a `check` nobody is expected to produce, so a missing window is a FormatError at once. PipeClosed once
    `stopped` says so.
    """
    while check is not None and not (packs / window_name(window, "json")).is_file():
        if stopped():
            raise PipeClosed
        check()
        time.sleep(_POLL_S)
    return read_pack_index(packs, window)


class ExtentStream:
    """A thread that loads the extents of consecutive steps into a ring of slots; `close` stops it.

    One consumer calls `get` and hands each slot back with `release`. Numbers it reports are written by the thread only.
    """

    def __init__(
        self,
        packs: Path,
        meta: PackSetMeta,
        steps: range,
        slots: list[Slot],
        *,
        producer_check: Callable[[], None] | None = None,
    ) -> None:
        self._packs, self._meta, self._steps, self._check = packs, meta, steps, producer_check
        self._free: Pipe[Slot] = Pipe(len(slots))
        self._loaded: Pipe[LoadedExtent] = Pipe(len(slots))
        for slot in slots:
            self._free.put(slot)
        self.bytes_read, self.read_s = 0, 0.0
        self._thread = start_worker("penstock-read", self._run, self._loaded)

    def get(self) -> LoadedExtent:
        """Wait for the next extent; raises what the thread raised."""
        return self._loaded.get()

    def release(self, slot: Slot) -> None:
        """Hand a slot back; nothing may look at its bytes any more."""
        self._free.put(slot)

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._free.close()
        self._loaded.close()
        join_worker(self._thread)

    def _run(self) -> None:
        for window, steps in self._by_window():
            index = wait_for_window(self._packs, window, self._check, lambda: self._loaded.closed)
            with PackWindow(self._packs, index) as opened:
                for step in steps:
                    slot = self._free.get()
                    self._load(opened, step, slot)

    def _by_window(self) -> Iterator[tuple[int, range]]:
        """Consecutive steps of one window at a time; cycled packs go round."""
        step = self._steps.start
        while step < self._steps.stop:
            item = item_of(self._meta, step)
            window = item // self._meta.window_items
            last = (window + 1) * self._meta.window_items
            if self._meta.mode == "reuse":
                last = min(last, self._meta.num_items)
            end = min(self._steps.stop, step + last - item)
            yield window, range(step, end)
            step = end

    def _load(self, opened: PackWindow, step: int, slot: Slot) -> None:
        started = time.perf_counter()
        loaded = opened.load(step, item_of(self._meta, step), slot)
        ended = time.perf_counter()
        self.read_s += ended - started
        TRACE.add("feed-read", f"item {step}", started, ended, bytes=loaded.num_bytes + loaded.shared_bytes)
        self.bytes_read += loaded.num_bytes + loaded.shared_bytes
        self._loaded.put(loaded)


def holders_before(window: PackWindow, item: int, num_device: int, slot: Slot) -> NDArray[np.int64]:
    """Node id per host slot just before `item`: the window's residents, then the admissions of its earlier items.

    Reads and verifies those extents through `slot`.
    """
    nodes = window.residents()[num_device:]
    for earlier in range(window.index.first_item, item):
        loaded = window.load(earlier, earlier, slot)
        extent = verify_extent(loaded)
        if extent.head.num_admits:
            first = num_device + len(nodes)
            missing = np.flatnonzero(extent.source >= first)
            ids = np.empty(extent.head.num_rows + extent.head.num_shared, np.int64)
            ids[extent.source[missing] - first] = extent.item.input_ids[missing]
            nodes[extent.admit_slots] = ids[extent.admit_rows]
    return nodes


def delete_windows(packs: Path, before: int) -> None:
    """Delete all windows below `before`; an index goes first, so that no half of a window is ever taken for whole."""
    for path in sorted(packs.glob("window-*.json")):
        window = int(path.stem.removeprefix("window-"))
        if window < before:
            for suffix in WINDOW_FILES:
                (packs / window_name(window, suffix)).unlink(missing_ok=True)
