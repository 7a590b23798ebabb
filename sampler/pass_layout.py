"""Where the bytes of a packing pass go: regions of window files, and how memory is split.

Shared segments are written in buckets: consecutive rows of the segment whose bytes are whole pages and fit a buffer.
The scan fills a bucket sorted by node id; `segment_order` then puts its rows in their places.
"""

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.sampler.part_reader import part_buffer_bytes
from penstock.sampler.plan import Plan
from penstock.sampler.shared_segment import windows_of
from penstock.sampler.streams import NUM_STAGES, Region, stage_for
from penstock.storage.blocks import BLOCK_BYTES, block_down
from penstock.storage.budget import GIB, KIB, MIB, format_bytes
from penstock.storage.directio import PAGE, page_down, page_up
from penstock.storage.errors import DoesNotFit

_STREAM_BYTES = 2 * PAGE  # per stream: its tail, digest and bounds, and the tail again while a journal is written
GATHERERS = 2  # threads that copy rows; fixed, so that nothing depends on the machine
_SMALLEST_PART = 16 * MIB  # below it, tables are not cut for the sake of overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLayout:
    """The regions of a pass in file order, and per window the size of its file and of its shared segment."""

    windows: tuple[int, ...]
    regions: tuple[Region, ...]
    file_bytes: dict[int, int]
    shared_bytes: dict[int, int]

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(self.file_bytes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PassMemory:
    """Sizes of the buffers of a pass."""

    part_rows: int
    buffer_bytes: int
    stage_bytes: int
    bucket_rows: int


def plan_windows(plan: Plan) -> list[range]:
    """The items of every window of a plan, both numbered from its first."""
    return windows_of(len(plan.heads), plan.meta.window_items)


def split_memory(plan: Plan, num_streams: int, host_memory: int) -> PassMemory:
    """Give each buffer its share; DoesNotFit, naming the smallest --host-memory, where they cannot work."""
    table, row_bytes = plan.table, plan.meta.row_format.row_bytes
    widest = max(table.row_bytes, row_bytes)
    stage = stage_for(widest, min(4 * MIB, max(64 * KIB, page_down(host_memory // 32))))
    convert = 0 if plan.stored == plan.meta.row_format else GATHERERS * -(-stage // row_bytes) * table.row_bytes
    unit_bytes = math.lcm(row_bytes, PAGE) if any(plan.segment_rows) else 0
    prefix = page_up(max(head.rows_offset for head in plan.heads))
    least = max(part_buffer_bytes(table, 1), prefix, unit_bytes)
    fixed = num_streams * _STREAM_BYTES + NUM_STAGES * stage + convert
    if fixed + 2 * least > host_memory:
        raise DoesNotFit(
            f"packing needs --host-memory {fixed + 2 * least} or more for its buffers "
            f"({format_bytes(fixed + 2 * least)}), it got {format_bytes(host_memory)}"
        )
    room = (host_memory - fixed) // 2
    wanted = min(room, GIB, max(_SMALLEST_PART, table.num_bytes // 12))
    part_rows = min(table.num_rows, max(1, (block_down(wanted) - BLOCK_BYTES) // table.row_bytes))
    buffer_bytes = max(part_buffer_bytes(table, part_rows), least)
    bucket_rows = buffer_bytes // unit_bytes * (unit_bytes // row_bytes) if unit_bytes else 0
    return PassMemory(part_rows=int(part_rows), buffer_bytes=buffer_bytes, stage_bytes=stage, bucket_rows=bucket_rows)


def lay_out(plan: Plan, windows: Sequence[int], bucket_rows: int) -> PassLayout:
    """Place segments and extents of these windows in their files."""
    row_bytes, all_windows = plan.meta.row_format.row_bytes, plan_windows(plan)
    regions: list[Region] = []
    file_bytes, shared_bytes = {}, {}
    for window in windows:
        num_shared = plan.segment_rows[window]
        for first in range(0, num_shared, max(1, bucket_rows)):
            rows = min(bucket_rows, num_shared - first)
            regions.append(
                Region(window=window, offset=first * row_bytes, prefix_bytes=0, num_rows=rows, item=-1, first_row=first)
            )
        offset = shared_bytes[window] = page_up(num_shared * row_bytes)
        for item in all_windows[window]:
            head = plan.heads[item]
            regions.append(
                Region(
                    window=window,
                    offset=offset,
                    prefix_bytes=head.rows_offset,
                    num_rows=head.num_rows,
                    item=item,
                    first_row=0,
                )
            )
            offset += head.extent_bytes
        file_bytes[window] = offset
    return PassLayout(windows=tuple(windows), regions=tuple(regions), file_bytes=file_bytes, shared_bytes=shared_bytes)


def split_passes(plan: Plan, windows: Sequence[int], host_memory: int) -> list[list[int]]:
    """Group windows into passes: as many as file handles and a sixteenth of memory for their streams allow."""
    handles = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most_files = max(1, min(1024, handles // 2 if handles > 0 else 1024))
    most_items = max(1, host_memory // 16 // _STREAM_BYTES)
    passes: list[list[int]] = []
    items = 0
    for window in windows:
        count = len(plan_windows(plan)[window])
        if not passes or len(passes[-1]) >= most_files or items + count > most_items:
            passes.append([])
            items = 0
        passes[-1].append(window)
        items += count
    return passes


def part_bounds(ids: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Where each part's run of a stream's ascending ids begins, int32 [parts + 1]."""
    return np.searchsorted(ids, starts).astype(np.int32)
