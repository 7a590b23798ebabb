"""Write a settled replay down: sources, missing rows and admissions per item, residents per window, and the wrap.

This is the plan proper, in scratch files; the packer turns it into packs without deciding anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.plan import mark_blocks
from penstock.sampler.accesses import Accesses
from penstock.sampler.movement import FutureUses, Tiers
from penstock.sampler.scratch import ItemArrays
from penstock.storage.blocks import BLOCK_BYTES, BlockSums
from penstock.storage.pack import ExtentHead, layout_extent


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedArrays:
    """The shared layout: per item page runs int64 [2 r] and row offsets int64 [s], per window the segment's rows.

    `rows` are node ids in segment order, one array per window.
    """

    runs: ItemArrays
    offsets: ItemArrays
    rows: ItemArrays


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanArrays:
    """The bulk of a plan, in scratch files; numbered by item from the plan's first.

    `source` int32 [M]; `missing` node ids of the private extent rows, ascending; `admits` int32 [2 n], rows then slots.
    `needed` uint8 marks the blocks of `BLOCK_BYTES` of the feature table that some missing row touches.
    """

    source: ItemArrays
    missing: ItemArrays
    admits: ItemArrays
    needed: NDArray[np.uint8]
    residents: tuple[NDArray[np.int64], ...]
    wrap: NDArray[np.int32]
    shared: SharedArrays | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the scratch files."""
        files = [self.source, self.missing, self.admits]
        if self.shared is not None:
            files += [self.shared.runs, self.shared.offsets, self.shared.rows]
        return sum(file.num_bytes for file in files)

    def delete(self) -> None:
        """Remove the scratch files."""
        files = [self.source, self.missing, self.admits]
        if self.shared is not None:
            files += [self.shared.runs, self.shared.offsets, self.shared.rows]
        for file in files:
            file.delete()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A plan's arrays, its extents without shared rows, and rows served by the tiers over all its items."""

    arrays: PlanArrays
    heads: tuple[ExtentHead, ...]
    device_hits: int
    host_hits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The feature table as stored: rows start at byte `offset` of `path`, in blocks with these checksums."""

    path: Path
    offset: int
    num_rows: int
    row_bytes: int
    sums: BlockSums | None = None

    @property
    def num_bytes(self) -> int:
        """Size of all rows."""
        return self.num_rows * self.row_bytes

    @property
    def num_blocks(self) -> int:
        """Blocks of `BLOCK_BYTES` that cover all rows."""
        return -(-self.num_bytes // BLOCK_BYTES)


def record(
    tiers: Tiers,
    accesses: Accesses,
    items: range,
    future: FutureUses | None,
    *,
    window_starts: Sequence[int],
    table: Table,
    row_bytes: int,
    scratch: Path,
    cyclic: bool,
) -> Recording:
    """Replay `items` (from 0) and write what happens to `scratch`; `window_starts` are those that open a window.

    With `cyclic` the last item also brings back what the tier held before the first.
    """
    num_inputs, id_type = accesses.num_inputs[: len(items)], np.dtype("<i4" if table.num_rows < 2**31 else "<i8")
    source = ItemArrays(scratch / "source.bin", "<i4", len(items), num_inputs)
    missing = ItemArrays(scratch / "missing.bin", id_type, len(items))
    admits = ItemArrays(scratch / "admits.bin", "<i4", len(items))
    needed = np.zeros(table.num_blocks, np.uint8)
    residents: list[NDArray[np.int64]] = []
    wrap = np.empty((2, 0), np.int32)
    heads: list[ExtentHead] = []
    num_device, base = len(tiers.device), len(tiers.device) + len(tiers.policy.nodes)
    device_hits, hits = 0, 0
    if 0 in window_starts:
        residents.append(tiers.residents())
    for move in tiers.replay(accesses.ids, items, future):
        codes, rows, pairs = move.source, move.missing, np.stack([move.admit_rows, move.admit_slots])
        if cyclic and move.item == items[-1]:
            codes, rows, pairs, wrap = _close_lap(residents[0][num_device:], tiers, codes, rows, pairs)
        source.put(move.item, codes)
        missing.put(move.item, rows)
        admits.put(move.item, pairs.reshape(-1))
        mark_blocks(rows, table.row_bytes, BLOCK_BYTES, needed)
        device_hits += int(np.count_nonzero(codes < num_device))
        hits += int(np.count_nonzero(codes < base))
        heads.append(
            layout_extent(
                item=accesses.first_item + move.item,
                payload_bytes=int(accesses.payload_bytes[move.item]),
                num_inputs=len(codes),
                num_admits=pairs.shape[1],
                num_runs=0,
                num_shared=0,
                num_rows=len(rows),
                row_bytes=row_bytes,
            )
        )
        if move.item + 1 in window_starts:
            residents.append(tiers.residents())
    arrays = PlanArrays(
        source=source, missing=missing, admits=admits, needed=needed, residents=tuple(residents), wrap=wrap
    )
    return Recording(arrays=arrays, heads=tuple(heads), device_hits=device_hits, host_hits=hits - device_hits)


def _close_lap(
    start: NDArray[np.int64],
    tiers: Tiers,
    source: NDArray[np.int32],
    missing: NDArray[np.int64],
    admits: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Make the last item of a lap end where the first began: `start` int64 [H] is the row in each host slot then.

    Rows that got lost come as extra rows of the extent (which stays sorted) and are admitted; rows that sit in another
    slot are moved by the wrap; admissions of rows that the start does not have are dropped.
    """
    end = tiers.policy.nodes
    base = len(tiers.device) + len(end)
    wanted = np.sort(start[start >= 0])
    lost = np.setdiff1d(wanted, end[end >= 0], assume_unique=True)
    rows = np.union1d(missing, lost)
    codes = source.copy()
    is_miss = codes >= base
    codes[is_miss] = base + np.searchsorted(rows, missing)[codes[is_miss] - base]

    home = _Slots(start)
    kept = np.isin(end, wanted) & (end >= 0)
    now = np.where(kept, end, -1)
    free = np.flatnonzero(now < 0)
    # a lost row goes straight home where home is free, else to any slot that is free and nobody's home first
    at_home = home.of(lost)
    direct = now[at_home] < 0
    now[at_home[direct]] = lost[direct]
    left = np.flatnonzero(now < 0)
    left = left[np.argsort(start[left] >= 0, kind="stable")]
    now[left[: np.count_nonzero(~direct)]] = lost[~direct]
    filled = free[now[free] >= 0]

    stay = np.isin(admits[1], np.flatnonzero(kept))
    old_rows = np.searchsorted(rows, missing[admits[0][stay]])
    pairs = np.stack(
        [
            np.concatenate([old_rows, np.searchsorted(rows, now[filled])]).astype(np.int32),
            np.concatenate([admits[1][stay], filled]).astype(np.int32),
        ]
    )
    return codes, rows, pairs, _moves(now, home)


class _Slots:
    """Find the slot of a row."""

    def __init__(self, nodes: NDArray[np.int64]) -> None:
        self._order = np.argsort(nodes, kind="stable")
        self._sorted = nodes[self._order]

    def of(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._order[np.searchsorted(self._sorted, nodes)]


def _moves(now: NDArray[np.int64], home: _Slots) -> NDArray[np.int32]:
    """The moves that bring the row of each slot home."""
    slots = np.flatnonzero(now >= 0)
    targets = home.of(now[slots])
    away = slots != targets
    return np.stack([slots[away], targets[away]]).astype(np.int32)
