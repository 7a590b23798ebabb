import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.kernels import partition, reference_partition

NAMES = ["stream_nodes", "settle_nodes", "mark_readers", "collect_edges"]


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_the_same_signature(name: str) -> None:
    ours, twin = getattr(partition, name), getattr(reference_partition, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(twin).parameters)


class Case:
    """A random window of a random graph in groups; the window starts at `first`."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.rng, self.num_nodes = rng, int(rng.integers(1, 40))
        self.first = int(rng.integers(self.num_nodes))
        degrees = rng.integers(0, 6, rng.integers(0, self.num_nodes - self.first + 1))
        self.indptr = np.concatenate([[0], np.cumsum(degrees)]).astype(np.int64)
        self.indices = rng.integers(0, self.num_nodes, self.indptr[-1]).astype(np.int32 if seed % 2 else np.int64)
        self.num_bins, self.num_groups = int(rng.integers(1, 6)), int(rng.integers(1, 4))
        self.groups = rng.integers(0, self.num_groups, self.num_nodes).astype(np.int32)

    @property
    def window(self) -> tuple[NDArray[np.int64], NDArray[Any], int]:
        return self.indptr, self.indices, self.first

    def both(self, name: str, *arguments: Any) -> list[Any]:
        """Call both twins on copies; results and written arrays, which must be equal, of the first."""
        results = []
        for module in (partition, reference_partition):
            copies = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
            call: Callable[..., Any] = getattr(module, name)
            results.append([call(*self.window, *copies), *copies])
        for ours, twin in zip(*results, strict=True):
            np.testing.assert_array_equal(ours, twin)
        return results[0]


@given(seed=st.integers(0, 10**6), fennel=st.booleans())
def test_streaming_equals_the_reference(seed: int, fennel: bool) -> None:
    case = Case(seed)
    labels = case.rng.integers(-1, case.num_bins, case.num_nodes).astype(np.int32)
    capacity = -(-np.bincount(case.groups, minlength=case.num_groups) // case.num_bins) + case.rng.integers(0, 2)
    sizes, counts = np.zeros((case.num_groups, case.num_bins), np.int64), np.zeros(case.num_bins, np.int64)
    alpha = case.rng.random(case.num_groups)
    *_, placed, filled, _ = case.both("stream_nodes", case.groups, capacity, alpha, fennel, labels, sizes, counts)
    rows = slice(case.first, case.first + len(case.indptr) - 1)
    assert (placed[rows] >= 0).all() and (filled <= capacity[:, None]).all()
    assert filled.sum() == len(case.indptr) - 1


@given(seed=st.integers(0, 10**6))
def test_settling_equals_the_reference(seed: int) -> None:
    case = Case(seed)
    labels = (case.rng.integers(0, case.num_bins, case.num_nodes) // 2).astype(np.int32)
    sizes = np.zeros((case.num_groups, case.num_bins), np.int64)
    np.add.at(sizes, (case.groups, labels), 1)
    capacity = -(-sizes.sum(axis=1) // case.num_bins)
    counts = np.zeros(case.num_bins, np.int64)
    *_, moved, filled, _ = case.both("settle_nodes", case.groups, capacity, labels, sizes, counts)
    again = np.zeros_like(filled)
    np.add.at(again, (case.groups, moved), 1)
    np.testing.assert_array_equal(filled, again)
    if len(case.indptr) - 1 == case.num_nodes:
        assert (filled <= capacity[:, None]).all()


@given(seed=st.integers(0, 10**6), num_parts=st.integers(1, 20))
def test_readers_equal_the_reference(seed: int, num_parts: int) -> None:
    case = Case(seed)
    parts = case.rng.integers(0, num_parts, case.num_nodes).astype(np.int32)
    readers = np.zeros((case.num_nodes, -(-num_parts // 8)), np.uint8)
    (cut, part_cut), *_, marked = case.both("mark_readers", parts, case.groups, readers)
    assert 0 <= part_cut <= len(case.indices) and (part_cut > 0) == bool(marked.any()) and cut <= len(case.indices)


@given(seed=st.integers(0, 10**6))
def test_collecting_equals_the_reference(seed: int) -> None:
    case = Case(seed)
    rows = np.arange(case.first, case.first + len(case.indptr) - 1)
    edges = np.bincount(case.groups[rows], weights=np.diff(case.indptr), minlength=case.num_groups).astype(np.int64)
    cursors = np.concatenate([[0], np.cumsum(edges)[:-1]])
    cursors[case.rng.random(case.num_groups) < 0.3] = -1
    out = np.full(len(case.indices), -7, np.float32)
    results = []
    for module in (partition, reference_partition):
        at, to = cursors.copy(), out.copy()
        module.collect_edges(case.indptr, np.arange(len(out), dtype=np.float32), case.first, case.groups, at, to)
        results.append((at, to))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert (results[0][1] >= 0).sum() == edges[cursors >= 0].sum()
