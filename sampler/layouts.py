"""Choose where packs go: private extents if they fit the disk, else shared segments or rolling windows by time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from penstock.sampler.estimate import DiskRates, Layout, sequential_s
from penstock.sampler.journal import journal_bytes
from penstock.sampler.recording import PlanArrays, Recording
from penstock.sampler.shared_segment import share_rows, shared_pack_bytes
from penstock.storage.blocks import BLOCK_BYTES
from penstock.storage.budget import format_bytes
from penstock.storage.directio import PAGE
from penstock.storage.errors import DoesNotFit
from penstock.storage.pack import ExtentHead, PackMode

Mode = Literal["auto", "reuse", "rolling"]

# A rolling set keeps one window being read, one ready and one being packed, and the trace of two; 20 % for variation.
_PACKED_WINDOWS, _TRACED_WINDOWS, _MARGIN = 3, 2, 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A layout and what it costs over all items of the trace; `scan_bytes` of the feature table per packing."""

    mode: PackMode
    layout: Layout
    arrays: PlanArrays
    heads: tuple[ExtentHead, ...]
    segment_rows: tuple[int, ...]
    window_items: int
    pack_bytes: int
    disk_bytes: int
    read_bytes: int
    max_extent_bytes: int
    scan_bytes: int
    read_s: float
    pack_s: float

    @property
    def total_s(self) -> float:
        """Reading all items once; in rolling mode packing them too."""
        return self.read_s + (self.pack_s if self.mode == "rolling" else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the choice depends on. `slots` are those of both tiers; `max_extent_bytes` is what host memory allows,
    `largest_extent_bytes` what an item takes that misses all its rows.
    """

    mode: Mode
    disk_bytes: int
    max_extent_bytes: int
    largest_extent_bytes: int
    window_items: int
    items_per_epoch: int
    num_nodes: int
    slots: int
    rates: DiskRates
    scratch: Path
    planning_bytes: int  # scratch files that are gone before packing


def _residents_bytes(terms: Terms, windows: int) -> int:
    return windows * (PAGE + 8 * terms.slots)


def _private(recording: Recording, terms: Terms) -> Choice:
    heads = recording.heads
    pack_bytes = sum(head.extent_bytes for head in heads)
    windows = -(-len(heads) // terms.window_items)
    scan_bytes = int(recording.arrays.needed.sum(dtype="int64")) * BLOCK_BYTES
    return Choice(
        mode="reuse",
        layout="private",
        arrays=recording.arrays,
        heads=heads,
        segment_rows=(0,) * windows,
        window_items=terms.window_items,
        pack_bytes=pack_bytes,
        disk_bytes=_disk_bytes(recording, terms, pack_bytes, windows),
        read_bytes=pack_bytes,
        max_extent_bytes=max(head.extent_bytes for head in heads),
        scan_bytes=scan_bytes,
        read_s=sequential_s(pack_bytes, len(heads), terms.rates),
        pack_s=_pack_s(scan_bytes, pack_bytes, terms.rates),
    )


def _disk_bytes(recording: Recording, terms: Terms, pack_bytes: int, windows: int) -> int:
    packing = pack_bytes + _residents_bytes(terms, windows) + journal_bytes(len(recording.heads))
    return recording.arrays.num_bytes + max(terms.planning_bytes, packing)


def _pack_s(scan_bytes: int, pack_bytes: int, rates: DiskRates) -> float:
    return scan_bytes / rates.read_bytes_per_s + pack_bytes / rates.write_bytes_per_s


def _shared_windows(recording: Recording, terms: Terms) -> tuple[int, int]:
    """How many old windows to merge so that shared segments fit, and the disk that takes; the last tried if none."""
    merged = 1
    while True:
        window_items = merged * terms.window_items
        pack_bytes = shared_pack_bytes(recording, window_items, terms.num_nodes)
        windows = -(-len(recording.heads) // window_items)
        disk_bytes = _disk_bytes(recording, terms, pack_bytes, windows)
        # the rewritten missing rows, runs and offsets are scratch beside the old ones
        disk_bytes += 32 * sum(head.num_rows for head in recording.heads)
        if disk_bytes <= terms.disk_bytes or windows == 1:
            return merged, disk_bytes
        merged *= 2


def _share(recording: Recording, terms: Terms, merged: int) -> Choice:
    window_items = merged * terms.window_items
    shared = share_rows(
        recording,
        window_items=window_items,
        residents_every=merged,
        num_nodes=terms.num_nodes,
        base=terms.slots,
        scratch=terms.scratch,
    )
    row_bytes = recording.heads[0].row_bytes
    segments = sum(-(-rows * row_bytes // PAGE) * PAGE for rows in shared.segment_rows)
    pack_bytes = segments + sum(head.extent_bytes for head in shared.heads)
    scan_bytes = int(shared.arrays.needed.sum(dtype="int64")) * BLOCK_BYTES
    windows = len(shared.segment_rows)
    return Choice(
        mode="reuse",
        layout="shared",
        arrays=shared.arrays,
        heads=shared.heads,
        segment_rows=shared.segment_rows,
        window_items=window_items,
        pack_bytes=pack_bytes,
        disk_bytes=shared.arrays.num_bytes
        + pack_bytes
        + _residents_bytes(terms, windows)
        + journal_bytes(len(shared.heads)),
        read_bytes=shared.read_bytes,
        max_extent_bytes=shared.max_extent_bytes,
        scan_bytes=scan_bytes,
        read_s=sequential_s(shared.read_bytes, shared.num_runs, terms.rates),
        pack_s=_pack_s(scan_bytes, pack_bytes + 2 * segments, terms.rates),  # segments are sorted in place
    )


def rolling_item_bytes(extent_bytes: float, payload_bytes: float, num_inputs: float) -> float:
    """Disk that one item of a window's length costs a rolling set, with its share of waiting and coming windows."""
    plan_bytes = 16 * num_inputs  # source, next use of two windows, missing ids
    return _MARGIN * (_PACKED_WINDOWS * extent_bytes + _TRACED_WINDOWS * payload_bytes + plan_bytes)


def rolling_fixed_bytes(slots: int, largest_extent_bytes: int) -> int:
    """Disk that a rolling set takes however short its windows are; each may hold an item that misses all."""
    return _PACKED_WINDOWS * (PAGE + 8 * slots + largest_extent_bytes) + (1 << 16)


def _roll(private: Choice, terms: Terms) -> tuple[Choice | None, int]:
    """Rolling windows, None where not even windows of one item fit, and the disk that those would need."""
    count = len(private.heads)
    item_bytes = rolling_item_bytes(
        private.pack_bytes / count,
        sum(head.payload_bytes for head in private.heads) / count,
        sum(head.num_inputs for head in private.heads) / count,
    )
    fixed = rolling_fixed_bytes(terms.slots, terms.largest_extent_bytes)
    window_items = min(int((terms.disk_bytes - fixed) // item_bytes), terms.items_per_epoch)
    if window_items < 1:
        return None, fixed + int(item_bytes) + 1
    windows = -(-count // window_items)
    choice = Choice(
        mode="rolling",
        layout="private",
        arrays=private.arrays,
        heads=private.heads,
        segment_rows=private.segment_rows,
        window_items=window_items,
        pack_bytes=private.pack_bytes,
        disk_bytes=fixed + int(window_items * item_bytes),
        read_bytes=private.read_bytes,
        max_extent_bytes=private.max_extent_bytes,
        scan_bytes=private.scan_bytes * windows,
        read_s=private.read_s,
        pack_s=_pack_s(private.scan_bytes * windows, private.pack_bytes, terms.rates),
    )
    return choice, choice.disk_bytes


def choose_layout(recording: Recording, terms: Terms) -> Choice:
    """Pick what fits and reads soonest; DoesNotFit, naming the smallest --disk that would do, where nothing fits."""
    private = _private(recording, terms)
    if terms.mode != "rolling" and private.disk_bytes <= terms.disk_bytes:
        return private
    rolling, rolling_disk = _roll(private, terms) if terms.mode != "reuse" else (None, 2**62)
    if terms.mode == "rolling" and rolling is not None:
        return rolling
    shared_disk = 2**62
    if terms.mode != "rolling":
        merged, shared_disk = _shared_windows(recording, terms)
        if shared_disk <= terms.disk_bytes:
            shared = _share(recording, terms, merged)
            lacking = shared.max_extent_bytes - terms.max_extent_bytes
            if lacking > 0 and rolling is None:
                raise DoesNotFit(
                    f"shared segments need {format_bytes(shared.max_extent_bytes)} per item in flight, --host-memory "
                    f"leaves {format_bytes(terms.max_extent_bytes)}; use {2 * lacking} bytes more of --host-memory, "
                    f"or --disk {private.disk_bytes}",
                    disk_bytes=private.disk_bytes,
                )
            if rolling is None or (lacking <= 0 and shared.total_s <= rolling.total_s):
                return shared
    if rolling is not None:
        return rolling
    smallest = min(shared_disk, rolling_disk, private.disk_bytes if terms.mode != "rolling" else 2**62)
    raise DoesNotFit(
        f"packs need {format_bytes(private.disk_bytes)} of disk, --disk allows {format_bytes(terms.disk_bytes)} "
        f"({terms.disk_bytes} bytes); use --disk {smallest} or more, a narrower row dtype or more --host-memory",
        disk_bytes=smallest,
    )
