"""Planning kernels against plain NumPy, and the tier they keep against its definition."""

import inspect
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.kernels import plan, reference_plan

NAMES = sorted(name for name, value in vars(plan).items() if hasattr(value, "py_func") and not name.startswith("_"))
NUM_NODES = 12


def both(name: str, *arguments: Any) -> None:
    """Run a kernel and its twin on copies; what they return and every array must be equal."""
    results = []
    for module in (plan, reference_plan):
        copies = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        results.append((getattr(module, name)(*copies), copies))
    assert results[0][0] == results[1][0]
    for fast, plain in zip(results[0][1], results[1][1], strict=True):
        assert np.array_equal(fast, plain)


def distinct(size: int = NUM_NODES) -> st.SearchStrategy[NDArray[np.int32]]:
    return st.lists(st.integers(0, size - 1), unique=True).map(lambda v: np.array(v, np.int32))


def ints(low: int, high: int, size: int = NUM_NODES) -> st.SearchStrategy[NDArray[np.int32]]:
    return st.lists(st.integers(low, high), min_size=size, max_size=size).map(lambda v: np.array(v, np.int32))


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_the_same_signature(name: str) -> None:
    fast, plain = getattr(plan, name), getattr(reference_plan, name)
    assert list(inspect.signature(fast).parameters) == list(inspect.signature(plain).parameters)


@given(distinct(), ints(0, 5), ints(-1, 9))
def test_simple_kernels_equal_their_twins(ids: NDArray[Any], counts: NDArray[Any], place: NDArray[Any]) -> None:
    for dtype in (np.int32, np.int64):
        typed = ids.astype(dtype)
        both("count_accesses", typed, 3, 5, counts, counts[::-1].copy())
        both("next_uses", typed, 3, counts, np.zeros(len(ids), np.int32))
        both("look_up", typed, place, 5, np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int64))
        both("histogram_of", typed, counts, place, np.zeros(6, np.int64))
        both("tally", typed, counts)
        both("mark_blocks", typed, 30, 64, np.zeros(6, np.uint8))
    both("histogram", counts, place, np.zeros(6, np.int64))
    for threshold in range(1, 6):
        both("select_top", counts, place, threshold, 2, np.zeros(NUM_NODES, np.int64))


@given(distinct())
def test_misses_are_ranked_by_node_id(ids: NDArray[Any]) -> None:
    source, keys = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int64)
    plan.look_up(ids, np.full(NUM_NODES, -1, np.int32), 4, source, keys)
    keys.sort()
    both("rank_misses", keys, 4, 7, source, np.zeros(len(ids), np.int64))
    missing = np.zeros(len(ids), np.int64)
    plan.rank_misses(keys, 4, 7, source, missing)
    assert np.array_equal(missing, np.sort(ids)) and np.array_equal(missing[source - 7], ids)


@given(distinct(), ints(-9, 3), st.permutations(range(8)))
def test_shared_kernels_equal_their_twins(ids: NDArray[Any], table: NDArray[Any], order: list[int]) -> None:
    both("split_shared", ids, table, np.zeros(NUM_NODES, np.int32), 0)
    hashes = np.full(8, 5, np.int32)
    both("min_hashes", ids, table, 2, 3, hashes, hashes[::-1].copy())
    empty = np.zeros(len(ids), np.int64)
    both("split_item", ids, table, np.array(order), 4, empty.astype(np.int32), empty.astype(np.int32), empty)


@given(
    st.lists(st.integers(0, 60), unique=True).map(lambda v: np.array(sorted(v), np.int64)),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_page_runs_cover_every_row(positions: NDArray[Any], row_bytes: int, gap: int) -> None:
    runs, offsets = np.zeros((len(positions), 2), np.int64), np.zeros(len(positions), np.int64)
    both("page_runs", positions, row_bytes, 16, gap, runs, offsets)
    segment = np.arange(61 * row_bytes + 16)
    count = plan.page_runs(positions, row_bytes, 16, gap, runs, offsets)
    laid = np.concatenate([segment[16 * p : 16 * (p + n)] for p, n in runs[:count]] or [segment[:0]])
    for position, offset in zip(positions, offsets, strict=True):
        assert np.array_equal(laid[offset : offset + row_bytes], segment[position * row_bytes :][:row_bytes])


class Tier:
    """The state of a host tier, before any item; lists 0 to `never`."""

    def __init__(self, num_device: int, num_host: int, never: int, module: ModuleType) -> None:
        self.place = np.full(NUM_NODES, -1, np.int32)
        self.place[:num_device] = np.arange(num_device)
        self.nodes, self.links = np.full(num_host, -1, np.int64), np.full((num_host, 4), -1, np.int32)
        self.heads, self.rows = np.zeros(never + 1, np.int32), np.zeros(num_host, np.int32)
        self.num_device, self.module = num_device, module
        module.hang_slots(np.arange(num_host), np.full(num_host, never, np.int32), self.heads, self.links)

    def after(self, item: int, ids: NDArray[Any], uses: NDArray[Any]) -> tuple[list[int], list[int]]:
        base = self.num_device + len(self.nodes)
        source = self.place[ids].copy()
        misses = np.flatnonzero(source < 0)
        source[misses] = base + np.argsort(np.argsort(ids[misses]))
        rows, slots = np.zeros(len(self.nodes), np.int32), np.zeros(len(self.nodes), np.int32)
        state = (self.num_device, self.place, self.nodes, self.heads, self.links, self.rows, rows, slots)
        admits = self.module.keep_nearest(item, ids, uses, source, *state)
        return rows[:admits].tolist(), slots[:admits].tolist()


@given(st.lists(distinct(), min_size=1, max_size=6), st.integers(0, 5), st.integers(0, 3))
def test_the_tier_keeps_the_nearest_rows_and_equals_its_twin(
    items: list[NDArray[Any]], num_host: int, num_device: int
) -> None:
    never = len(items)
    fast, plain = (Tier(num_device, num_host, never, module) for module in (plan, reference_plan))
    held: dict[int, int] = {}  # node -> next use, of all rows worth keeping
    for number, ids in enumerate(items):
        uses = np.array([next((t for t in range(number + 1, never) if i in items[t]), never) for i in ids], np.int32)
        before = fast.nodes.copy()
        admitted = fast.after(number, ids, uses)
        assert admitted == plain.after(number, ids, uses)
        for name in ("place", "nodes", "heads", "links"):
            assert np.array_equal(getattr(fast, name), getattr(plain, name))
        misses = np.sort([i for i in ids if i >= num_device and i not in before])
        for row, slot in zip(*admitted, strict=True):
            before[slot] = misses[row]
        assert np.array_equal(before, fast.nodes)  # the admissions are what changed
        held |= {int(i): int(u) for i, u in zip(ids, uses, strict=True) if i >= num_device}
        nearest = sorted(u for u in held.values() if u < never)[:num_host]
        held = {i: u for i, u in held.items() if i in fast.nodes}
        assert sorted(u for u in held.values() if u < never) == nearest
