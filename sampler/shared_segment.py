"""The shared layout: rows that several items of a window miss are stored once, at the head of the window's file.

DiskGNN (SIGMOD 2025) calls it the disk cache: rows are ordered by two min-hashes of the set of items that miss them
(Broder, 1997), so that rows used together lie together and an item reads few runs. Different from it: rows may have any
width and straddle pages, runs are coalesced over small gaps, and nothing is padded to a page.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.plan import min_hashes, page_runs, split_item, split_shared, tally
from penstock.sampler.recording import PlanArrays, Recording, SharedArrays
from penstock.sampler.scratch import ItemArrays
from penstock.storage.directio import PAGE, page_up
from penstock.storage.pack import ExtentHead, layout_extent

GAP_PAGES = 8  # reading 32 KiB in vain costs about as much as one more read
_RUN_BYTES, _OFFSET_BYTES = 16, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRecording:
    """A recording whose extents use shared segments.

    `segment_rows` per window; `read_bytes` and `num_runs` of all items together; `max_extent_bytes` with shared pages.
    """

    arrays: PlanArrays
    heads: tuple[ExtentHead, ...]
    segment_rows: tuple[int, ...]
    read_bytes: int
    num_runs: int
    max_extent_bytes: int


def windows_of(num_items: int, window_items: int) -> list[range]:
    """The items of every window."""
    return [range(lo, min(lo + window_items, num_items)) for lo in range(0, num_items, window_items)]


def shared_pack_bytes(recording: Recording, window_items: int, num_nodes: int) -> int:
    """Upper bound of the size of all window files in the shared layout with windows of this many items."""
    table, total = np.zeros(num_nodes, np.int32), 0
    for items in windows_of(len(recording.heads), window_items):
        for item in items:
            tally(recording.arrays.missing.get(item), table)
        row_bytes = recording.heads[items[0]].row_bytes
        num_shared = int(np.count_nonzero(table > 1))
        refs = int(table.sum(dtype=np.int64)) - int(np.count_nonzero(table == 1))
        private = sum(recording.heads[item].num_rows for item in items) - refs
        fixed = sum(recording.heads[item].rows_offset + PAGE for item in items)
        total += fixed + page_up((num_shared + private) * row_bytes) + refs * (_RUN_BYTES + _OFFSET_BYTES)
        table[:] = 0
    return total


class _Sharer:
    """Rewrites one recording; holds the table int32 [N] that says which rows of the current window are shared."""

    def __init__(self, recording: Recording, window_items: int, num_nodes: int, base: int, scratch: Path) -> None:
        self.recording, self.base = recording, base
        old, num_items = recording.arrays, len(recording.heads)
        self.windows = windows_of(num_items, window_items)
        self.table = np.zeros(num_nodes, np.int32)
        self.missing = ItemArrays(scratch / "private.bin", old.missing.dtype, num_items)
        self.runs = ItemArrays(scratch / "runs.bin", "<i8", num_items)
        self.offsets = ItemArrays(scratch / "offsets.bin", "<i8", num_items)
        self.rows = ItemArrays(scratch / "segment.bin", old.missing.dtype, len(self.windows))
        self.heads: list[ExtentHead] = []
        self.read_bytes, self.num_runs, self.max_bytes = 0, 0, 0

    def window(self, window: int) -> None:
        """Find and order the shared rows of a window, then rewrite its items."""
        items, missing = self.windows[window], self.recording.arrays.missing
        for item in items:
            tally(missing.get(item), self.table)
        shared_ids: NDArray[Any] = np.empty(np.count_nonzero(self.table > 1), missing.dtype)
        found = 0
        for item in items:
            found = split_shared(missing.get(item), self.table, shared_ids, found)
        position, order = self._order(window, shared_ids)
        self.rows.put(window, shared_ids[order])
        for item in items:
            self._item(item, position)
        for item in items:
            self.table[missing.get(item)] = 0

    def _order(self, window: int, shared_ids: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        items = self.windows[window]
        ranks = [np.random.default_rng((window, n)).permutation(len(items)).astype(np.int32) for n in range(2)]
        first = np.full(len(shared_ids), len(items), np.int32)
        second = first.copy()
        for n, item in enumerate(items):
            min_hashes(self.recording.arrays.missing.get(item), self.table, ranks[0][n], ranks[1][n], first, second)
        order = np.lexsort((shared_ids, second, first))
        position = np.empty(len(order), np.int64)
        position[order] = np.arange(len(order))
        return position, order

    def _item(self, item: int, position: NDArray[np.int64]) -> None:
        old, head = self.recording.arrays, self.recording.heads[item]
        missing, shift = old.missing.get(item), max(1, head.num_rows).bit_length()
        private, private_rows = np.empty_like(missing), np.empty(len(missing), np.int32)
        keys = np.empty(len(missing), np.int64)
        num_private = split_item(missing, self.table, position, shift, private, private_rows, keys)
        keys = np.sort(keys[: len(missing) - num_private])
        renumbered = np.empty(len(missing), np.int32)
        renumbered[private_rows[:num_private]] = np.arange(num_private)
        renumbered[keys & ((1 << shift) - 1)] = num_private + np.arange(len(keys))
        runs, offsets = np.empty((len(keys), 2), np.int64), np.empty(len(keys), np.int64)
        num_runs = page_runs(keys >> shift, head.row_bytes, PAGE, GAP_PAGES, runs, offsets)

        source, admits = old.source.get(item).copy(), old.admits.get(item).reshape(2, -1).copy()
        is_miss = source >= self.base
        source[is_miss] = self.base + renumbered[source[is_miss] - self.base]
        admits[0] = renumbered[admits[0]]
        old.source.put(item, source)
        old.admits.put(item, admits.reshape(-1))
        self.missing.put(item, private[:num_private])
        self.runs.put(item, runs[:num_runs].reshape(-1))
        self.offsets.put(item, offsets)
        new = layout_extent(
            item=head.item,
            payload_bytes=head.payload_bytes,
            num_inputs=head.num_inputs,
            num_admits=head.num_admits,
            num_runs=num_runs,
            num_shared=len(keys),
            num_rows=num_private,
            row_bytes=head.row_bytes,
        )
        self.heads.append(new)
        item_bytes = new.extent_bytes + int(runs[:num_runs, 1].sum()) * PAGE
        self.read_bytes, self.num_runs = self.read_bytes + item_bytes, self.num_runs + num_runs + 1
        self.max_bytes = max(self.max_bytes, item_bytes)


def share_rows(
    recording: Recording, *, window_items: int, residents_every: int, num_nodes: int, base: int, scratch: Path
) -> SharedRecording:
    """Rewrite a private recording into the shared layout; its `source` and `admits` files are changed in place.

    `base` is the number of device and host slots; `residents_every` how many old windows make a new one.
    """
    sharer = _Sharer(recording, window_items, num_nodes, base, scratch)
    for window in range(len(sharer.windows)):
        sharer.window(window)
    recording.arrays.missing.delete()
    arrays = replace(
        recording.arrays,
        missing=sharer.missing,
        residents=recording.arrays.residents[::residents_every],
        shared=SharedArrays(runs=sharer.runs, offsets=sharer.offsets, rows=sharer.rows),
    )
    return SharedRecording(
        arrays=arrays,
        heads=tuple(sharer.heads),
        segment_rows=tuple(int(n) for n in sharer.rows.counts),
        read_bytes=sharer.read_bytes,
        num_runs=sharer.num_runs,
        max_extent_bytes=sharer.max_bytes,
    )
