"""Policies of the host tier: which rows it keeps after each item, when the future is known.

`belady` keeps the rows that are used next (see `kernels.plan`), `static` the rows that are used by most items (what
DiskGNN does), `none` nothing. A policy owns the host part of `place` (see `kernels.plan`) and the rows in its slots.
"""

from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.plan import hang_slots, histogram, keep_nearest, select_top

PolicyName = Literal["belady", "static", "none"]
Admissions = tuple[NDArray[np.int32], NDArray[np.int32]]
_NOTHING: Admissions = (np.empty(0, np.int32), np.empty(0, np.int32))


class Policy(Protocol):
    """What the planner asks of a host tier with `len(nodes)` slots; `nodes` int64 [H], -1 where a slot is empty."""

    nodes: NDArray[np.int64]
    needs_future: bool

    def start(self, uses: NDArray[np.int32], num_times: int) -> None:
        """Begin a lap or window: `uses` int32 [H] is when each slot's row is used next, `num_times` is never."""

    def after(
        self, item: int, ids: NDArray[Any], uses: NDArray[np.int32], source: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Move on past an item; returns the extent rows admitted and the host slots they go to."""

    def next_uses(self) -> NDArray[np.int32]:
        """When each slot's row is used next, int32 [H]."""


class Belady:
    """Keep the rows with the nearest next use. Deterministic, and independent of how slots are numbered."""

    needs_future = True

    def __init__(self, place: NDArray[np.int32], num_device: int, num_host: int) -> None:
        self.nodes = np.full(num_host, -1, np.int64)
        self._place, self._num_device = place, num_device
        self._links = np.full((num_host, 4), -1, np.int32)
        self._heads = np.full(1, -1, np.int32)
        self._rows = np.empty(num_host, np.int32)
        self._admit_rows, self._admit_slots = np.empty(num_host, np.int32), np.empty(num_host, np.int32)

    def start(self, uses: NDArray[np.int32], num_times: int) -> None:
        """Hang all slots into the lists of their next uses, ordered by node id so that slot numbers do not matter."""
        self._heads = np.full(num_times + 1, -1, np.int32)
        hang_slots(np.argsort(self.nodes, kind="stable"), uses, self._heads, self._links)

    def after(
        self, item: int, ids: NDArray[Any], uses: NDArray[np.int32], source: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Evict the farthest rows for misses that are used sooner."""
        admits = keep_nearest(
            item,
            ids,
            uses,
            source,
            self._num_device,
            self._place,
            self.nodes,
            self._heads,
            self._links,
            self._rows,
            self._admit_rows,
            self._admit_slots,
        )
        return self._admit_rows[:admits], self._admit_slots[:admits]

    def next_uses(self) -> NDArray[np.int32]:
        """The lists that slots hang in."""
        return self._links[:, 2].copy()

    def renumber(self) -> None:
        """Number the slots by ascending node id, empty ones last; call `start` after it."""
        order = np.argsort(np.where(self.nodes < 0, np.iinfo(np.int64).max, self.nodes), kind="stable")
        self.nodes[:], self._links[:] = self.nodes[order], self._links[order]
        full = np.flatnonzero(self.nodes >= 0)
        self._place[self.nodes[full]] = self._num_device + full.astype(np.int32)


class Fixed:
    """Keep the same rows for good."""

    needs_future = False

    def __init__(self, nodes: NDArray[np.int64]) -> None:
        self.nodes = nodes

    def start(self, uses: NDArray[np.int32], num_times: int) -> None:
        """Nothing changes."""

    def after(
        self, item: int, ids: NDArray[Any], uses: NDArray[np.int32], source: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Nothing is admitted."""
        return _NOTHING

    def next_uses(self) -> NDArray[np.int32]:
        """Unknown, and not needed."""
        return np.zeros(len(self.nodes), np.int32)


def top_rows(counts: NDArray[np.int32], place: NDArray[np.int32], num_rows: int) -> NDArray[np.int64]:
    """The `num_rows` most accessed nodes that have no place yet, ties to the lower id; ascending, never unaccessed."""
    totals = np.zeros(int(counts.max(initial=0)) + 1, np.int64)
    histogram(counts, place, totals)
    totals[0] = 0
    at_least = np.cumsum(totals[::-1])[::-1]  # nodes with this count or more
    num_rows = min(num_rows, int(at_least[0]))
    if num_rows <= 0:
        return np.empty(0, np.int64)
    threshold = int(np.flatnonzero(at_least >= num_rows)[-1])
    ties = num_rows - int(at_least[threshold] - totals[threshold])
    out = np.empty(num_rows, np.int64)
    select_top(counts, place, threshold, ties, out)
    return out


def make_belady(place: NDArray[np.int32], counts: NDArray[np.int32], device: int, host: int) -> Policy:
    """An empty Belady tier."""
    return Belady(place, device, host)


def make_static(place: NDArray[np.int32], counts: NDArray[np.int32], device: int, host: int) -> Policy:
    """The rows accessed most, placed."""
    nodes = np.full(host, -1, np.int64)
    top = top_rows(counts, place, host)
    nodes[: len(top)] = top
    place[top] = device + np.arange(len(top), dtype=np.int32)
    return Fixed(nodes)


def make_none(place: NDArray[np.int32], counts: NDArray[np.int32], device: int, host: int) -> Policy:
    """No host tier."""
    return Fixed(np.empty(0, np.int64))


# place, access counts, device slots, host slots -> policy
POLICIES = {"belady": make_belady, "static": make_static, "none": make_none}
