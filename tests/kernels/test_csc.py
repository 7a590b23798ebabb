import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from penstock.kernels import csc, reference_csc

NAMES = ["count_buckets", "scatter_by_bucket", "unique_sorted", "merge_sorted", "row_ends", "join_sorted", "mix_keys"]
few = hnp.arrays(np.uint64, st.integers(0, 60), elements=st.integers(0, 40))
wide = hnp.arrays(np.uint64, st.integers(0, 60), elements=st.integers(0, 2**64 - 1))


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_the_same_signature(name: str) -> None:
    ours, twin = getattr(csc, name), getattr(reference_csc, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(twin).parameters)


@given(wide, st.integers(0, 56))
def test_buckets_equal_the_reference(keys: NDArray[np.uint64], shift: int) -> None:
    results = []
    for module in (csc, reference_csc):
        counts = np.zeros(256, np.int64)
        module.count_buckets(keys, shift, 255, counts)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        out = np.zeros(len(keys), np.int64)
        module.scatter_by_bucket(keys, np.arange(len(keys)), shift, 255, starts, out)
        results.append((counts, starts, out))
    for ours, twin in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, twin)
    assert counts.sum() == len(keys)


@given(few, st.data())
def test_merging_equals_the_reference(keys: NDArray[np.uint64], data: st.DataObject) -> None:
    keys = np.sort(keys)
    weights = data.draw(hnp.arrays(np.float32, len(keys), elements=st.floats(-8, 8, width=32)))
    results: list[list[Any]] = []
    for module in (csc, reference_csc):
        distinct, merged, sums = keys.copy(), keys.copy(), weights.copy()
        n, m = module.unique_sorted(distinct), module.merge_sorted(merged, sums)
        results.append([n, m, distinct[:n], merged[:m], sums[:m]])
    for ours, twin in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, twin)


@given(few, st.integers(0, 4), st.integers(1, 50))
def test_row_ends_equal_the_reference(keys: NDArray[np.uint64], bits: int, num_rows: int) -> None:
    keys = np.sort(keys)
    base = 2**33  # beyond 32 bits: an edge offset of a huge graph
    ours, twin = np.empty(num_rows, np.int64), np.empty(num_rows, np.int64)
    end = csc.row_ends(keys, bits, 0, 0, base, ours)
    assert end == reference_csc.row_ends(keys, bits, 0, 0, base, twin)
    np.testing.assert_array_equal(ours, twin)
    halves = np.empty(num_rows, np.int64)
    cut = num_rows // 2
    middle = csc.row_ends(keys, bits, 0, 0, base, halves[:cut])
    csc.row_ends(keys, bits, cut, middle, base, halves[cut:])
    np.testing.assert_array_equal(halves, twin)


@given(st.one_of(few, wide), st.one_of(few, wide))
def test_join_equals_the_reference(keys: NDArray[np.uint64], queries: NDArray[np.uint64]) -> None:
    keys, queries = np.unique(keys), np.sort(np.concatenate([queries, keys[::3]]))
    ours, twin = np.empty(len(queries), np.int64), np.empty(len(queries), np.int64)
    assert csc.join_sorted(keys, queries, 0, ours) == reference_csc.join_sorted(keys, queries, 0, twin)
    np.testing.assert_array_equal(ours, twin)
    assert (ours >= 0).sum() >= len(keys[::3])


@given(hnp.arrays(np.int64, st.integers(0, 60)))
def test_mixed_keys_equal_the_reference(ids: NDArray[np.int64]) -> None:
    ours, twin = np.empty(len(ids), np.uint64), np.empty(len(ids), np.uint64)
    csc.mix_keys(ids, ours)
    reference_csc.mix_keys(ids, twin)
    np.testing.assert_array_equal(ours, twin)
    assert len(np.unique(ours)) == len(np.unique(ids))
