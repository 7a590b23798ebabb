"""How many rows the tiers hold under the budgets.

The host budget must hold the host tier, two extents and two batches, and extents shrink as the tier grows. The miss
counts of a static tier are known for every size from one pass over the trace; they pick a first size, which replays
of the real policy then correct until memory is neither exceeded nor left unused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.plan import histogram, histogram_of
from penstock.sampler.accesses import Accesses
from penstock.sampler.movement import Census, FutureUses, InputIds, LapCounts, Tiers, settle
from penstock.sampler.policies import PolicyName
from penstock.storage.budget import format_bytes
from penstock.storage.errors import DoesNotFit
from penstock.storage.pack import feed_memory, layout_extent
from penstock.storage.rows import RowFormat

_MAX_REPLAYS = 4
_SLACK = 0.03  # of the budget: less unused memory than that is not worth another replay
ROLLING_MARGIN = 1.25  # later windows may hold larger items than those planned on
ROLLING_SHARE = 0.75  # of host memory is for feeding; the rest is the producer's, which samples and packs meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemSizes:
    """What is known of the items before planning: inputs and payload bytes, int64 [T] each, and the packed rows."""

    num_inputs: NDArray[np.int64]
    payload_bytes: NDArray[np.int64]
    row_format: RowFormat
    margin: float = 1.0  # over the largest item seen, where larger ones may come
    known_inputs: int = 0  # of the largest item that is known to come and not among these, and its payload
    known_payload_bytes: int = 0

    @property
    def max_inputs(self) -> int:
        """Inputs of the largest item."""
        return max(self.known_inputs, int(self.num_inputs.max(initial=0)))

    @property
    def _known_extent_bytes(self) -> int:
        """The extent of the largest item that is known to come, which may miss and admit all its rows."""
        return layout_extent(
            item=0,
            payload_bytes=self.known_payload_bytes,
            num_inputs=self.known_inputs,
            num_admits=self.known_inputs,
            num_runs=0,
            num_shared=0,
            num_rows=self.known_inputs,
            row_bytes=self.row_format.row_bytes,
        ).extent_bytes

    def extent_bytes(self, misses: NDArray[np.int64], admits: NDArray[np.int64]) -> NDArray[np.int64]:
        """Size of every item's extent, int64 [T], shared rows not counted."""
        rows = zip(self.payload_bytes, self.num_inputs, admits, misses, strict=True)
        sizes = [
            layout_extent(
                item=0,
                payload_bytes=int(payload),
                num_inputs=int(inputs),
                num_admits=int(num_admits),
                num_runs=0,
                num_shared=0,
                num_rows=int(num_rows),
                row_bytes=self.row_format.row_bytes,
            ).extent_bytes
            for payload, inputs, num_admits, num_rows in rows
        ]
        return np.array(sizes, np.int64)

    @property
    def largest_extent_bytes(self) -> int:
        """Size of the largest extent if nothing is in a tier."""
        largest = int(self.extent_bytes(self.num_inputs, np.zeros_like(self.num_inputs)).max(initial=0))
        return max(largest, self._known_extent_bytes) if self.known_inputs else largest

    def memory(self, host_slots: int, max_extent_bytes: int) -> int:
        """Host memory that feeding these items takes."""
        if self.known_inputs:
            max_extent_bytes = max(max_extent_bytes, self._known_extent_bytes)
        return feed_memory(
            host_slots=host_slots,
            row_bytes=self.row_format.row_bytes,
            max_extent_bytes=int(max_extent_bytes * self.margin),
            max_inputs=int(self.max_inputs * self.margin),
            width=self.row_format.width,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MissCurve:
    """A static host tier at every size that takes in all rows of some access count.

    `slots` int64 [C] ascending from 0; `extents` int64 [C] the largest extent then.
    """

    slots: NDArray[np.int64]
    extents: NDArray[np.int64]


def miss_curve(ids: InputIds, sizes: ItemSizes, counts: NDArray[np.int32], device: NDArray[np.int32]) -> MissCurve:
    """Replay the static policy at all sizes at once; `device` int32 [N] is negative for rows not in the device tier."""
    width = int(counts.max(initial=0)) + 1
    totals, of_item = np.zeros(width, np.int64), np.zeros(width, np.int64)
    histogram(counts, device, totals)
    totals[0] = 0
    slots = np.concatenate([[0], np.cumsum(totals[:0:-1])])  # size c holds all rows with count > width - 1 - c
    extents = np.zeros(len(slots), np.int64)
    base = sizes.extent_bytes(np.zeros_like(sizes.num_inputs), np.zeros_like(sizes.num_inputs))
    for item in range(len(sizes.num_inputs)):
        of_item[:] = 0
        histogram_of(ids(item), counts, device, of_item)
        misses = of_item.sum() - np.concatenate([[0], np.cumsum(of_item[:0:-1])])
        np.maximum(extents, base[item] + misses * (sizes.row_format.row_bytes + 2), out=extents)
    return MissCurve(slots=slots, extents=extents)


def _fitting_slots(curve: MissCurve, sizes: ItemSizes, host_bytes: int) -> int:
    """The largest static tier that fits, interpolated between the sizes of the curve; the leanest if none does."""
    need = _needs(curve, sizes)
    fits = np.flatnonzero(need <= host_bytes)
    if len(fits) == 0:
        return _leanest(curve, sizes)
    last = int(fits[-1])
    if last == len(need) - 1:
        return int(curve.slots[last])
    share = (host_bytes - need[last]) / (need[last + 1] - need[last])
    return int(curve.slots[last] + share * (curve.slots[last + 1] - curve.slots[last]))


def choose_host_slots(
    replay: Callable[[int], LapCounts],
    *,
    sizes: ItemSizes,
    curve: MissCurve,
    host_bytes: int,
    movable: bool,
    share: float = 1.0,
) -> int:
    """Find the largest host tier that fits with its extents; `replay(slots)` counts misses under the real policy.

    `movable` False means no host tier; only `share` of the budget is for feeding. Raises DoesNotFit, naming the
    smallest --host-memory that would do: that of the leanest static size, or of none, which do not depend on the
    budget.
    """

    budget, host_bytes = host_bytes, int(host_bytes * share)

    def need(slots: int) -> int:
        counts = replay(slots)
        return sizes.memory(slots, int(sizes.extent_bytes(counts.misses, counts.admits).max(initial=0)))

    best, slots, largest = -1, _fitting_slots(curve, sizes, host_bytes), int(curve.slots[-1])
    for _ in range(_MAX_REPLAYS if movable else 0):
        spare = host_bytes - need(slots)
        if spare >= 0:
            best = max(best, slots)
        following = min(max(0, slots + spare // sizes.row_format.row_bytes), largest)
        if following == slots or 0 <= spare < _SLACK * host_bytes or (spare < 0 <= best):
            break
        slots = following
    if best >= 0:
        return best
    smallest = 2**62
    for slots in [_leanest(curve, sizes), 0] if movable else [0]:
        smallest = min(smallest, found := need(slots))
        if found <= host_bytes:
            return slots
    raise DoesNotFit(
        f"--host-memory {format_bytes(budget)} ({budget} bytes) cannot hold two extents and two batches of the "
        f"largest item; use --host-memory {ceil(smallest / share)} or more, a smaller batch size or smaller fanouts",
        host_bytes=ceil(smallest / share),
    )


def _needs(curve: MissCurve, sizes: ItemSizes) -> NDArray[np.int64]:
    pairs = zip(curve.slots.tolist(), curve.extents.tolist(), strict=True)
    return np.array([sizes.memory(slots, extent) for slots, extent in pairs], np.int64)


def _leanest(curve: MissCurve, sizes: ItemSizes) -> int:
    return int(curve.slots[int(_needs(curve, sizes).argmin())])


def settle_with(
    ids: InputIds,
    sizes: ItemSizes,
    census: Census,
    future: FutureUses | None,
    *,
    policy: PolicyName,
    num_device: int,
    num_host: int,
) -> tuple[Tiers, LapCounts]:
    """Make the tiers, run them in, and count a lap."""
    tiers = Tiers(census.counts, policy=policy, num_device=num_device, num_host=num_host, max_inputs=sizes.max_inputs)
    return tiers, settle(tiers, ids, len(sizes.num_inputs), future)


def device_slots(device_bytes: int, row_format: RowFormat, census: Census) -> int:
    """Rows of the device tier, which holds them decoded to float32; never more than are read at all."""
    return min(device_bytes // (4 * row_format.width), int(np.count_nonzero(census.counts)))


def choose_slots(
    accesses: Accesses,
    sizes: ItemSizes,
    census: Census,
    future: FutureUses | None,
    *,
    policy: PolicyName,
    num_device: int,
    host_bytes: int,
    rolling: bool,
    share: float = ROLLING_SHARE,
) -> int:
    """Rows of the host tier that the budget allows; DoesNotFit where not even none does.

    Rolling tiers start empty wherever training is, so that an item may miss all; and the producer needs its share: only
    `share` is for feeding.
    """
    device = Tiers(census.counts, policy="none", num_device=num_device, num_host=0, max_inputs=sizes.max_inputs)
    if policy == "none":
        curve = MissCurve(slots=np.zeros(1, np.int64), extents=np.zeros(1, np.int64))
    else:
        curve = miss_curve(accesses.ids, sizes, census.counts, device.place)
    del device

    def replay(slots: int) -> LapCounts:
        if rolling:
            return LapCounts(misses=sizes.num_inputs, admits=np.minimum(sizes.num_inputs, slots), settled=True)
        name: PolicyName = policy if slots > 0 else "none"
        used = future if name == "belady" else None
        return settle_with(accesses.ids, sizes, census, used, policy=name, num_device=num_device, num_host=slots)[1]

    return choose_host_slots(
        replay,
        sizes=sizes,
        curve=curve,
        host_bytes=host_bytes,
        movable=policy != "none",
        share=share if rolling else 1.0,
    )
