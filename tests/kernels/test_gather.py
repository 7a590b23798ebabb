import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.kernels import gather, reference_gather
from penstock.storage.rows import ROW_DTYPES, RowDtype, RowFormat, decode_rows, encode_rows

WORDS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16, "int8": np.uint8}
PUBLIC = [*(f"gather_{dtype}" for dtype in ROW_DTYPES), "admit_rows", "move_rows"]


@pytest.mark.parametrize("name", PUBLIC)
def test_twins_have_one_signature(name: str) -> None:
    ours, twin = (inspect.signature(getattr(module, name)).parameters for module in (gather, reference_gather))
    assert list(ours) == list(twin)


def make_rows(seed: int, count: int, row_format: RowFormat) -> NDArray[np.uint8]:
    """Encode random values: of any magnitude, subnormals and zeros among them."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, row_format.width)) * 10.0 ** rng.integers(-8, 4, (count, row_format.width))
    values[rng.random(values.shape) < 0.1] = 0
    rows = np.ascontiguousarray(encode_rows(values.astype(np.float32), row_format))
    return rows.view(np.uint8).reshape(count, row_format.row_bytes)


@given(
    dtype=st.sampled_from(ROW_DTYPES),
    width=st.integers(1, 19),
    counts=st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)),
    wanted=st.lists(st.integers(0, 2**31 - 1), max_size=30),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_gathers_decode_as_storage_does(
    dtype: RowDtype, width: int, counts: tuple[int, int, int], wanted: list[int], seed: int
) -> None:
    slots, private, shared = counts
    row_format = RowFormat(dtype=dtype, width=width)
    word = np.dtype(WORDS[dtype])
    row_words = row_format.row_bytes // word.itemsize
    rows = make_rows(seed, sum(counts), row_format)
    codes = np.array(wanted if sum(counts) else [], np.int32) % max(1, sum(counts))
    order = np.random.default_rng(seed).permutation(shared)
    # Shared rows lie in another order than they are numbered, two words apart, behind the private ones.
    tier = rows[:slots].reshape(-1).view(word)
    shared_at = 5 + private * row_words + order * (row_words + 2)
    extent = np.zeros(5 + private * row_words + shared * (row_words + 2), word)
    extent[5 : 5 + private * row_words] = rows[slots : slots + private].reshape(-1).view(word)
    for k, at in enumerate(shared_at):
        extent[at : at + row_words] = rows[slots + private + k].view(word)
    expected = decode_rows(rows[codes], row_format)
    for module in (gather, reference_gather):
        out = np.full((len(codes), width), 7, np.uint32)
        middle = len(codes) // 3
        for lo, hi in ((0, middle), (middle, len(codes))):
            kernel = getattr(module, f"gather_{dtype}")
            kernel(codes, slots, private, tier, extent, 5, shared_at, row_words, out, lo, hi)
        np.testing.assert_array_equal(out, expected.view(np.uint32))


@pytest.mark.parametrize(("width", "shift"), [(128, 0), (128, 4), (16, 0), (100, 0)])
def test_outputs_larger_than_caches_are_right_too(width: int, shift: int) -> None:
    """They are streamed where rows are whole cache lines."""
    rng = np.random.default_rng(width)
    num_rows = (3 << 20) // width
    tier = rng.integers(0, 2**32, 500 * width, dtype=np.uint32)
    extent = rng.integers(0, 2**32, 40 * width + 7, dtype=np.uint32)
    codes, shared_at = rng.integers(0, 540, num_rows).astype(np.int32), 7 + width * np.arange(30, 40)
    raw = np.zeros((2, num_rows * width * 4 + 128), np.uint8)
    starts = [-row.ctypes.data % 64 + shift for row in raw]
    outs = [
        row[at : at + num_rows * width * 4].view(np.uint32).reshape(num_rows, width)
        for row, at in zip(raw, starts, strict=True)
    ]
    for lo, hi in ((0, 1000), (1000, num_rows)):
        for module, out in zip((gather, reference_gather), outs, strict=True):
            module.gather_float32(codes, 500, 30, tier, extent, 7, shared_at, width, out, lo, hi)
    np.testing.assert_array_equal(outs[0], outs[1])


def every_half() -> NDArray[np.uint16]:
    return np.arange(1 << 16, dtype=np.uint16)


def test_every_float16_decodes_exactly() -> None:
    halves = every_half()
    out = np.empty((1, 1 << 16), np.uint32)
    none = np.empty(0, np.int64)
    gather.gather_float16(np.zeros(1, np.int32), 1, 0, halves, halves[:0], 0, none, 1 << 16, out, 0, 1)
    expected = halves.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(out.view(np.float32)[0], expected)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(out[0][finite], expected.view(np.uint32)[finite])


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 12), private=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_admissions_land_in_their_slots(seed: int, count: int, private: int) -> None:
    rng = np.random.default_rng(seed)
    extent = rng.integers(0, 255, 200, dtype=np.uint8)
    shared_at = rng.integers(0, 190, 6)
    rows = rng.integers(0, private + 6, count).astype(np.int32)
    slots = rng.permutation(12)[:count].astype(np.int32)
    tiers = [np.zeros(12 * 7, np.uint8) for _ in range(2)]
    for module, tier in zip((gather, reference_gather), tiers, strict=True):
        module.admit_rows(rows, slots, private, tier, extent, 3, shared_at, 7)
    np.testing.assert_array_equal(tiers[0], tiers[1])


@given(data=st.data(), slots=st.integers(1, 14), row_words=st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_moves_are_simultaneous(data: Any, slots: int, row_words: int) -> None:
    targets = data.draw(st.lists(st.integers(0, slots - 1), unique=True))
    sources = data.draw(st.lists(st.integers(0, slots - 1), min_size=len(targets), max_size=len(targets)))
    check_moves(np.array(sources, np.int32), np.array(targets, np.int32), slots, row_words)


def check_moves(sources: NDArray[np.int32], targets: NDArray[np.int32], slots: int, row_words: int) -> None:
    tiers = [np.arange(slots * row_words, dtype=np.uint32) for _ in range(2)]
    spare, origin = np.empty(row_words, np.uint32), np.full(slots, -1, np.int32)
    readers = np.zeros(slots, np.int32)
    for module, tier in zip((gather, reference_gather), tiers, strict=True):
        module.move_rows(tier, sources, targets, row_words, spare, origin, readers)
    np.testing.assert_array_equal(tiers[0], tiers[1])
    assert (origin == -1).all() and (readers == 0).all()


def test_a_cycle_that_feeds_a_chain_is_moved_right() -> None:
    check_moves(np.array([1, 2, 0, 0, 3], np.int32), np.array([0, 1, 2, 3, 4], np.int32), 6, 2)
