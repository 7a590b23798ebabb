"""The external sort, with buffers so small that everything must be cut, and with huge ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.storage.ingest.edges import KeyLayout, plan_layout
from penstock.storage.ingest.spill import BucketWriter, Sorter, bucket_bits
from penstock.storage.ingest.topology import merged_runs


def _sort(
    folder: Path, keys: NDArray[np.uint64], values: NDArray[Any] | None, key_bits: int, merge: bool = False
) -> tuple[NDArray[np.uint64], NDArray[Any] | None]:
    dtype = None if values is None else values.dtype
    sorter = Sorter(0, dtype)  # the least there is: 1024 records
    with BucketWriter(folder / "x", 4, dtype) as writer:
        for lo in range(0, len(keys), 777):
            part = None if values is None else values[lo : lo + 777]
            writer.append(keys[lo : lo + 777], key_bits - 2, keys[lo : lo + 777], part)
    out: list[tuple[NDArray[np.uint64], Any]] = []
    for bucket in writer.buckets:
        runs = sorter.runs(bucket, key_bits - 2)
        for run_keys, run_values in merged_runs(runs) if merge else runs:
            assert len(run_keys) <= sorter.capacity
            out.append((run_keys.copy(), None if run_values is None else run_values.copy()))
    all_keys = np.concatenate([k for k, _ in out]) if out else keys[:0]
    return all_keys, None if values is None else np.concatenate([v for _, v in out])


@pytest.mark.parametrize("skew", ["even", "one node", "one edge", "few"])
@pytest.mark.parametrize("weighted", [False, True])
def test_any_skew_is_sorted_stably(tmp_path: Path, skew: str, weighted: bool) -> None:
    rng = np.random.default_rng(2)
    size, bits = 20_000, 34
    keys = {
        "even": rng.integers(0, 2**bits, size),
        "one node": (77 << 17) | rng.integers(0, 2**17, size),
        "one edge": np.full(size, (77 << 17) | 5),
        "few": rng.integers(0, 2**bits, 7)[rng.integers(0, 7, size)],
    }[skew].astype(np.uint64)
    values = np.arange(size, dtype=np.int32) if weighted else None
    got_keys, got_values = _sort(tmp_path, keys, values, bits)
    order = np.argsort(keys, kind="stable")
    np.testing.assert_array_equal(got_keys, keys[order])
    if got_values is not None:
        np.testing.assert_array_equal(got_values, order)


@pytest.mark.parametrize("weighted", [False, True])
def test_duplicates_merge_also_when_they_fill_several_runs(tmp_path: Path, weighted: bool) -> None:
    rng = np.random.default_rng(3)
    keys = np.concatenate([np.full(5000, 9), rng.integers(0, 3000, 20_000), np.full(3000, 4095)]).astype(np.uint64)
    rng.shuffle(keys)
    weights = rng.random(len(keys)).astype(np.float32) if weighted else None
    got_keys, got_weights = _sort(tmp_path, keys, weights, 12, merge=True)
    wanted, inverse = np.unique(keys, return_inverse=True)
    np.testing.assert_array_equal(got_keys, wanted)
    if weights is not None:
        totals = np.zeros(len(wanted))
        np.add.at(totals, inverse, weights.astype(np.float64))
        np.testing.assert_array_equal(got_weights, totals.astype(np.float32))  # to the bit: order and width are fixed


@given(st.integers(1, 2**38), st.integers(0, 2**42), st.integers(1024, 2**32), st.data())
def test_keys_hold_any_id(num_nodes: int, num_records: int, capacity: int, data: st.DataObject) -> None:
    layout = plan_layout(num_nodes, num_records, capacity)
    assert layout.key_bits <= 64 and 0 <= layout.range_bits <= 12
    ends = st.integers(0, num_nodes - 1)
    src, dst = (np.array(data.draw(st.lists(ends, min_size=4, max_size=4)), np.int64) for _ in range(2))
    keys = layout.keys(src, dst)
    ranges = dst >> layout.local_bits
    assert ranges.max() < 1 << layout.range_bits
    assert keys.dtype == np.uint64
    back = (keys >> np.uint64(layout.source_bits)).astype(np.int64) + (ranges << layout.local_bits)
    np.testing.assert_array_equal(back, dst)
    np.testing.assert_array_equal((keys & np.uint64((1 << layout.source_bits) - 1)).astype(np.int64), src)


@pytest.mark.parametrize(
    ("records", "capacity", "bits"), [(0, 1000, 0), (600, 1000, 0), (700, 1000, 1), (10**9, 1000, 8)]
)
def test_the_number_of_buckets_follows_the_budget(records: int, capacity: int, bits: int) -> None:
    assert bucket_bits(records, capacity) == bits


def test_a_layout_is_reversible_from_its_two_numbers() -> None:
    layout = plan_layout(2**33, 10**11, 10**8)
    assert layout == KeyLayout(source_bits=33, range_bits=layout.range_bits)
    assert layout.key_bits == 66 - layout.range_bits <= 64
