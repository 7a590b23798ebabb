"""Replay a trace under a policy: for every item where each of its rows is, which are missing, and which are admitted.

A *lap* is one pass over the items of a trace. Where packs are cycled, the last use of a row in a lap is followed by its
first use in the next, so laps are replayed from an empty tier until one ends with the rows it began with; that lap is
the plan.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.plan import count_accesses, look_up, next_uses, rank_misses
from penstock.sampler.policies import POLICIES, Belady, Fixed, Policy, PolicyName, top_rows

MAX_LAPS = 3  # later ones differed by 0.1 % of the tier, if at all
InputIds = Callable[[int], NDArray[Any]]
_NO_USES = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What one item needs. `source` int32 [M] codes of `storage.pack`; `missing` ascending node ids of extent rows.

    Arrays are views of buffers that the next item overwrites.
    """

    item: int
    source: NDArray[np.int32]
    missing: NDArray[Any]
    admit_rows: NDArray[np.int32]
    admit_slots: NDArray[np.int32]


class FutureUses(Protocol):
    """A store of one int32 array per item: when each of its inputs is used next."""

    def put(self, item: int, values: NDArray[np.int32]) -> None:
        """Keep an item's array."""

    def get(self, item: int) -> NDArray[np.int32]:
        """Return it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """Per node how many items read it, int32 [N], and when it is read first (`never` where it is not), int32 [N]."""

    counts: NDArray[np.int32]
    first: NDArray[np.int32]
    never: int


def take_census(ids: InputIds, num_items: int, num_nodes: int, *, never: int) -> Census:
    """Count all accesses, in one pass over the items."""
    counts, first = np.zeros(num_nodes, np.int32), np.full(num_nodes, never, np.int32)
    for item in range(num_items):
        count_accesses(ids(item), item, never, counts, first)
    return Census(counts=counts, first=first, never=never)


def find_next_uses(ids: InputIds, num_items: int, table: NDArray[np.int32], future: FutureUses, scratch: int) -> None:
    """Store every item's next uses, in one backward pass; `table` int32 [N] is what follows the last item.

    It ends as the first use of each node. `scratch` is the largest number of inputs of an item.
    """
    out = np.empty(scratch, np.int32)
    for item in range(num_items - 1, -1, -1):
        item_ids = ids(item)
        next_uses(item_ids, item, table, out[: len(item_ids)])
        future.put(item, out[: len(item_ids)])


def cyclic_future(ids: InputIds, num_items: int, census: Census, future: FutureUses, scratch: int) -> None:
    """Next uses where item T is item 0 again: the last use of a row is followed by its first, T later.

    Needs `census.never` = 2 T, and leaves `census.first` as it was.
    """
    census.first[census.first < census.never] += num_items
    find_next_uses(ids, num_items, census.first, future, scratch)


class Tiers:
    """The device tier and the host tier during planning: who is where, as the items go by.

    Owns `place` int32 [N]. Device rows are the most accessed and stay, or are the first of `kept` int64 [K], node ids
    (-1 for none) from device slot 0 on; those behind them are what a static host tier holds.
    """

    def __init__(
        self,
        counts: NDArray[np.int32],
        *,
        policy: PolicyName,
        num_device: int,
        num_host: int,
        max_inputs: int,
        kept: NDArray[np.int64] | None = None,
    ) -> None:
        self.place = np.full(len(counts), -1, np.int32)
        self.device = np.full(num_device, -1, np.int64)
        if kept is None:
            top = top_rows(counts, self.place, num_device)
            self.device[: len(top)] = top
            self.place[top] = np.arange(len(top), dtype=np.int32)
            self.policy: Policy = POLICIES[policy](self.place, counts, num_device, num_host)
        else:
            slots = np.flatnonzero(kept >= 0)
            self.place[kept[slots]] = slots.astype(np.int32)
            self.device[:] = kept[:num_device]
            is_fixed = len(kept) > num_device
            self.policy = (
                Fixed(kept[num_device:].copy())
                if is_fixed
                else POLICIES[policy](self.place, counts, num_device, num_host)
            )
        self._base = num_device + len(self.policy.nodes)
        self.reserve(max_inputs)

    def reserve(self, max_inputs: int) -> None:
        """Make room for items of up to `max_inputs` inputs."""
        self._shift = max(1, max_inputs).bit_length()
        self._source, self._keys = np.empty(max_inputs, np.int32), np.empty(max_inputs, np.int64)
        self._missing = np.empty(max_inputs, np.int64)

    def residents(self) -> NDArray[np.int64]:
        """Node id per slot, device slots first, -1 for empty ones."""
        return np.concatenate([self.device, self.policy.nodes])

    def host_set(self) -> NDArray[np.int64]:
        """The rows in the host tier, ascending."""
        return np.sort(self.policy.nodes[self.policy.nodes >= 0])

    def replay(self, ids: InputIds, items: range, future: FutureUses | None) -> Iterator[Move]:
        """Go through `items` in order; each `Move` must be used before the next is asked for."""
        for item in items:
            item_ids = ids(item)
            source = self._source[: len(item_ids)]
            keys = self._keys[: look_up(item_ids, self.place, self._shift, source, self._keys)]
            keys.sort()
            missing = self._missing[: len(keys)]
            rank_misses(keys, self._shift, self._base, source, missing)
            uses = _NO_USES if future is None else future.get(item)
            rows, slots = self.policy.after(item, item_ids, uses, source)
            yield Move(item=item, source=source, missing=missing, admit_rows=rows, admit_slots=slots)

    def next_lap(self, num_items: int) -> None:
        """Go from the end of a lap to the start of the next: what was `T + t` is now `t`."""
        never = 2 * num_items
        uses = self.policy.next_uses()
        self.policy.start(np.where(uses < never, uses - num_items, never).astype(np.int32), never)


@dataclass(frozen=True, slots=True, kw_only=True)
class LapCounts:
    """Missing rows and admissions per item of a settled lap, int64 [T] each, and whether it had settled."""

    misses: NDArray[np.int64]
    admits: NDArray[np.int64]
    settled: bool


def settle(
    tiers: Tiers, ids: InputIds, num_items: int, future: FutureUses | None, *, max_laps: int = MAX_LAPS
) -> LapCounts:
    """Replay laps until one ends with the rows it began with, at most `max_laps`; counts the last one."""
    misses, admits = np.zeros(num_items, np.int64), np.zeros(num_items, np.int64)
    never = 2 * num_items
    tiers.policy.start(np.full(len(tiers.policy.nodes), never, np.int32), never)
    settled = False
    for lap in range(max_laps):
        before = tiers.host_set()
        for move in tiers.replay(ids, range(num_items), future):
            misses[move.item], admits[move.item] = len(move.missing), len(move.admit_rows)
        settled = np.array_equal(before, tiers.host_set())
        if future is None or settled or lap == max_laps - 1:
            break
        tiers.next_lap(num_items)
    if isinstance(tiers.policy, Belady):
        tiers.policy.renumber()
    if future is not None:
        tiers.next_lap(num_items)
    return LapCounts(misses=misses, admits=admits, settled=settled or future is None)
