import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from penstock.kernels import reference_runs, runs

NAMES = ["encode_bfloat16", "decode_bfloat16", "spread_runs"]
MODULES = [runs, reference_runs]
EDGES = [
    0,
    0x80000000,
    1,
    0x7F7FFFFF,
    0x7F7F8000,
    0xFF7FFFFF,
    0x7F7F7FFF,
    0x7F800000,
    0xFF800000,
    0x7F800001,
    0x7FFFFFFF,
    0xFFFFFFFF,
]
words = hnp.arrays(np.uint32, st.integers(0, 40), elements=st.integers(0, 2**32 - 1) | st.sampled_from(EDGES))


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_the_same_signature(name: str) -> None:
    ours, twin = (inspect.signature(getattr(module, name)).parameters for module in MODULES)
    assert list(ours) == list(twin)


@given(bits=words, cut=st.integers(0, 40))
def test_rounds_as_torch_does_but_for_infinity_and_equals_the_reference(bits: NDArray[np.uint32], cut: int) -> None:
    lo, hi = min(cut, len(bits)) // 2, len(bits)
    results = []
    for module in MODULES:
        rows, back = np.full(len(bits), 7, np.uint16), np.full(len(bits), 9, np.uint32)
        module.encode_bfloat16(bits, rows, lo, hi)
        module.decode_bfloat16(rows, back, lo, hi)
        assert (rows[:lo] == 7).all() and (back[:lo] == 9).all()
        results.append((rows, back))
    for ours, twin in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, twin)
    values, back = bits[lo:].view(np.float32), results[0][1][lo:].view(np.float32)
    wanted = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    largest = np.float32(torch.finfo(torch.bfloat16).max)
    wanted = np.where(np.isfinite(values) & np.isinf(wanted), np.copysign(largest, values), wanted)
    np.testing.assert_array_equal(back, wanted)
    np.testing.assert_array_equal(np.isnan(back), np.isnan(values))


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    dtype=st.sampled_from([np.float32, np.float64]),
    chosen=st.booleans(),
    cut=st.integers(0, 6),
)
def test_spreads_rows_as_the_reference_does(sizes: list[int], dtype: type, chosen: bool, cut: int) -> None:
    """Runs lie in another order than rows, with gaps between them that nothing may touch."""
    rng = np.random.default_rng(sum(sizes))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(np.array(sizes[::-1]) + 1)])[:-1][::-1].astype(np.int64)
    rows: NDArray[Any] = rng.standard_normal((max(1, offsets[-1]), 3)).astype(dtype)
    which = rng.integers(0, len(rows), offsets[-1]) if chosen else None
    outs: list[NDArray[Any]] = [np.full((sum(sizes) + len(sizes), 3), np.nan, dtype) for _ in MODULES]
    for module, out in zip(MODULES, outs, strict=True):
        module.spread_runs(rows, which, offsets, starts, out, min(cut, len(sizes)), len(sizes))
    np.testing.assert_array_equal(outs[0], outs[1])
    assert np.isnan(outs[0]).any(axis=1).sum() == len(outs[0]) - sum(sizes[min(cut, len(sizes)) :])
