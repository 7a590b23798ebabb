"""The kernels of `csc`, as obviously as NumPy allows."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Counts = NDArray[np.int64]


def _buckets(keys: Keys, shift: int, mask: int) -> Counts:
    return ((keys >> np.uint64(shift)) & np.uint64(mask)).astype(np.int64)


def count_buckets(keys: Keys, shift: int, mask: int, counts: Counts) -> None:
    counts += np.bincount(_buckets(keys, shift, mask), minlength=mask + 1)


def scatter_by_bucket(
    keys: Keys, values: NDArray[Any], shift: int, mask: int, starts: Counts, out: NDArray[Any]
) -> None:
    buckets = _buckets(keys, shift, mask)
    for bucket in range(mask + 1):
        members = values[buckets == bucket]
        out[starts[bucket] : starts[bucket] + len(members)] = members
        starts[bucket] += len(members)


def unique_sorted(keys: Keys) -> int:
    distinct = np.unique(keys)
    keys[: len(distinct)] = distinct
    return len(distinct)


def merge_sorted(keys: Keys, weights: NDArray[np.float32]) -> int:
    distinct, inverse = np.unique(keys, return_inverse=True)
    totals = np.zeros(len(distinct))
    np.add.at(totals, inverse, weights.astype(np.float64))
    keys[: len(distinct)] = distinct
    weights[: len(distinct)] = totals
    return len(distinct)


def row_ends(keys: Keys, bits: int, first_row: int, start: int, base: int, out: Counts) -> int:
    rows = np.arange(first_row, first_row + len(out)).astype(np.uint64)
    ends = np.searchsorted(keys >> np.uint64(bits), rows, side="right")
    out[:] = base + ends
    return int(ends[-1]) if len(out) else start


def join_sorted(keys: Keys, queries: Keys, start: int, out: Counts) -> int:
    where = np.searchsorted(keys, queries)
    for m, position in enumerate(where):
        out[m] = position if position < len(keys) and keys[position] == queries[m] else -1
    return int(where[-1]) if len(queries) else start


def mix_keys(ids: Counts, out: Keys) -> None:
    x = ids.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    out[:] = x ^ (x >> np.uint64(31))
