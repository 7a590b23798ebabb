"""Where the bytes of a packing pass go: regions of window files, and how memory is split.

Shared segments are written in buckets: consecutive rows of the segment whose bytes are whole pages and fit a buffer.
The scan fills a bucket sorted by node id; `segment_order` then puts its rows in their places.
"""

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.sampler.part_reader import part_buffer_bytes
from penstock.sampler.plan import Plan
from penstock.sampler.streams import NUM_STAGES, Region, stage_for
from penstock.storage.blocks import BLOCK_BYTES, block_down
from penstock.storage.budget import GIB, KIB, MIB, format_bytes
from penstock.storage.directio import PAGE, page_down, page_up
from penstock.storage.errors import DoesNotFit

_STREAM_BYTES = PAGE + 2048  # per stream: its tail, its digest's state, its region and its state for the journal
_ID_BYTES = 24  # per row of a bucket: its id, its place, and its id again while they are sorted
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


def window_items(plan: Plan, window: int) -> range:
    """The items of a window of a plan, both numbered from its first."""
    first = window * plan.meta.window_items
    return range(first, min(first + plan.meta.window_items, len(plan.heads)))


def fit_memory(plan: Plan, windows: Sequence[int], host_memory: int) -> PassMemory:
    """Size the buffers of a pass over these windows; DoesNotFit names a --host-memory that does."""
    enough = host_memory
    while True:
        try:
            memory = _fit(plan, windows, enough)
        except DoesNotFit as error:
            assert error.host_bytes is not None and error.host_bytes > enough
            enough = error.host_bytes
            continue
        if enough == host_memory:
            return memory
        raise DoesNotFit(
            f"packing needs --host-memory {enough} or more for its buffers ({format_bytes(enough)}), it got "
            f"{format_bytes(host_memory)}",
            host_bytes=enough,
        )


def _fit(plan: Plan, windows: Sequence[int], host_memory: int) -> PassMemory:
    num_streams = len(lay_out(plan, windows, 1 << 62).regions)
    while True:
        memory = split_memory(plan, num_streams, host_memory)
        found = len(lay_out(plan, windows, memory.bucket_rows or 1 << 62).regions)
        if found <= num_streams:
            return memory
        num_streams = found  # buckets are streams too, and there are more of them where buffers are small


def split_memory(plan: Plan, num_streams: int, host_memory: int) -> PassMemory:
    """Give each buffer its share; DoesNotFit with what would do for so many streams where they cannot work."""
    table, row_bytes = plan.table, plan.meta.row_format.row_bytes
    widest = max(table.row_bytes, row_bytes)
    stage = stage_for(widest, min(4 * MIB, max(64 * KIB, page_down(host_memory // 32))))
    convert = 0 if plan.stored == plan.meta.row_format else GATHERERS * -(-stage // row_bytes) * table.row_bytes
    unit_bytes = math.lcm(row_bytes, PAGE) if any(plan.segment_rows) else 0
    prefix = page_up(max(head.rows_offset for head in plan.heads))
    least = max(part_buffer_bytes(table, 1), prefix, unit_bytes)
    chunk = GATHERERS * (-(-stage // row_bytes) * _ID_BYTES + 8 * plan.stored.width)
    fixed = num_streams * _STREAM_BYTES + NUM_STAGES * stage + convert + chunk
    per_byte = 1 + _ID_BYTES / row_bytes if unit_bytes else 1.0  # both gatherers may order a bucket that fills a buffer
    smallest = fixed + math.ceil(2 * per_byte * least)
    if smallest > host_memory:
        raise DoesNotFit(
            f"packing needs --host-memory {smallest} or more for its buffers "
            f"({format_bytes(smallest)}), it got {format_bytes(host_memory)}",
            host_bytes=smallest,
        )
    room = int((host_memory - fixed) / 2 / per_byte)
    wanted = min(room, GIB, max(_SMALLEST_PART, table.num_bytes // 12))
    whole = table.num_bytes <= wanted  # else a part may begin and end within a block
    part_rows = table.num_rows if whole else max(1, (block_down(wanted) - BLOCK_BYTES) // table.row_bytes)
    part_rows = min(table.num_rows, part_rows)
    buffer_bytes = max(part_buffer_bytes(table, part_rows), least)
    bucket_rows = buffer_bytes // unit_bytes * (unit_bytes // row_bytes) if unit_bytes else 0
    return PassMemory(part_rows=int(part_rows), buffer_bytes=buffer_bytes, stage_bytes=stage, bucket_rows=bucket_rows)


def packing_bytes(plan: Plan, host_memory: int) -> int:
    """What packing a plan holds at most. DoesNotFit as in `split_memory`."""
    found = [0]
    if plan.mode == "rolling":
        return 0
    for windows in split_passes(plan, range(plan.meta.num_windows), host_memory):
        num_streams = len(lay_out(plan, windows, 1 << 62).regions)
        memory = split_memory(plan, num_streams, host_memory)
        found.append(2 * memory.buffer_bytes + NUM_STAGES * memory.stage_bytes + num_streams * _STREAM_BYTES)
    return max(found)


def lay_out(plan: Plan, windows: Sequence[int], bucket_rows: int) -> PassLayout:
    """Place segments and extents of these windows in their files."""
    row_bytes = plan.meta.row_format.row_bytes
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
        for item in window_items(plan, window):
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
    """Group windows into passes: as many as file handles and a sixteenth of memory for their streams allow.

    DoesNotFit where a single window needs more memory, before any is packed.
    """
    handles = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most_files = max(1, min(1024, handles // 2 if handles > 0 else 1024))
    most_items = max(1, host_memory // 16 // _STREAM_BYTES)
    passes: list[list[int]] = []
    items = 0
    for window in windows:
        count = len(window_items(plan, window))
        if not passes or len(passes[-1]) >= most_files or items + count > most_items:
            passes.append([])
            items = 0
        passes[-1].append(window)
        items += count
    fitting = [part for group in passes for part in _parts(plan, group, host_memory)]
    if lacking := [error for part in fitting if (error := _misfit(plan, part, host_memory)) is not None]:
        raise max(lacking, key=lambda error: error.host_bytes or 0)
    return fitting


def _parts(plan: Plan, group: list[int], host_memory: int) -> list[list[int]]:
    """A group as one pass, or each of its windows as one where memory is too small for their streams together."""
    return [group] if _misfit(plan, group, host_memory) is None else [[window] for window in group]


def _misfit(plan: Plan, windows: list[int], host_memory: int) -> DoesNotFit | None:
    try:
        fit_memory(plan, windows, host_memory)
    except DoesNotFit as error:
        return error
    return None
