"""Packing kernels against NumPy, and against the encoding that storage defines."""

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from penstock.kernels import pack, reference_pack
from penstock.kernels.pack import BFLOAT16, FLOAT16, FLOAT32, INT8
from penstock.storage.rows import ROW_DTYPES, RowFormat, decode_rows, encode_rows

CODES = [FLOAT32, FLOAT16, BFLOAT16, INT8]
NAMES = ["gather_words", "scatter_words", "decode_row", "encode_row", "convert_rows"]
finite = st.floats(-60000, 60000, width=32)


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_the_same_signature(name: str) -> None:
    fast, plain = getattr(pack, name), getattr(reference_pack, name)
    assert list(inspect.signature(fast).parameters) == list(inspect.signature(plain).parameters)


@given(st.data())
def test_gather_and_scatter_equal_their_twins(data: st.DataObject) -> None:
    num_rows, words = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from(["u1", "u2", "u4", "u8"]))
    first = data.draw(st.integers(0, 1 << 40))
    ids = np.sort(np.array(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=30)), np.int64)) + first
    lo = data.draw(st.integers(0, len(ids)))
    hi = data.draw(st.integers(lo, len(ids)))
    table = np.random.default_rng(0).integers(0, 255, num_rows * words).astype(dtype)
    fast, plain = np.zeros(len(ids) * words, dtype), np.zeros(len(ids) * words, dtype)
    pack.gather_words(table, first, words, ids, fast, lo, hi)
    reference_pack.gather_words(table, first, words, ids, plain, lo, hi)
    assert np.array_equal(fast, plain)
    positions = np.random.default_rng(1).permutation(num_rows)
    fast, plain = np.zeros_like(table), np.zeros_like(table)
    pack.scatter_words(table, words, positions, fast, 0, num_rows)
    reference_pack.scatter_words(table, words, positions, plain, 0, num_rows)
    assert np.array_equal(fast, plain)


def test_every_half_decodes_as_in_numpy() -> None:
    halves = np.arange(1 << 16, dtype="<u2")
    values = np.empty(len(halves), np.float32)
    pack.decode_row(halves.view(np.uint8), FLOAT16, values)
    expected = halves.view("<f2").astype(np.float32)
    assert np.array_equal(values, expected, equal_nan=True)
    assert np.array_equal(np.signbit(values[expected == 0]), np.signbit(expected[expected == 0]))


def test_floats_round_to_half_as_in_numpy() -> None:
    """All ties between neighbouring halves, their neighbours, and random bits."""
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    near = [np.nextafter(ties, np.float32(side)) for side in (0, 1e9)]
    noise = np.random.default_rng(0).integers(0, 0x47000000, 200_000).astype(np.uint32).view(np.float32)
    values = np.concatenate([halves, ties, *near, noise]).astype(np.float32)
    values = np.concatenate([values, -values])
    row = np.empty(2 * len(values), np.uint8)
    assert pack.encode_row(values, FLOAT16, row)
    assert np.array_equal(row.view("<u2"), values.astype(np.float16).view("<u2"))


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e9, float("inf"), float("nan")])
def test_overflow_of_half_is_told(value: float) -> None:
    rows = np.array([[1.0], [value]], "<f4").view(np.uint8)
    out = np.empty((2, 2), np.uint8)
    scratch, error = np.empty((2, 1), np.float32), np.zeros(2)
    assert pack.convert_rows(rows, FLOAT32, out, FLOAT16, 1, scratch, error) == 1


@given(arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 9)), elements=finite))
def test_conversion_equals_its_twin_and_storage(values: NDArray[np.float32]) -> None:
    width = values.shape[1]
    for code, dtype in zip(CODES, ROW_DTYPES, strict=True):
        stored = RowFormat(dtype=dtype, width=width)
        rows = np.ascontiguousarray(encode_rows(values, stored)).view(np.uint8).reshape(-1, stored.row_bytes)
        for out_code, out_dtype in zip(CODES, ROW_DTYPES, strict=True):
            packed = RowFormat(dtype=out_dtype, width=width)
            results = []
            for module in (pack, reference_pack):
                out = np.zeros((len(rows), packed.row_bytes), np.uint8)
                scratch, error = np.empty((2, width), np.float32), np.zeros(2)
                assert module.convert_rows(rows, code, out, out_code, width, scratch, error) == len(rows)
                results.append((out, error))
            assert np.array_equal(results[0][0], results[1][0])
            assert np.array_equal(results[0][1], results[1][1])
            expected = encode_rows(decode_rows(rows, stored), packed)
            assert np.array_equal(results[0][0], np.ascontiguousarray(expected).view(np.uint8).reshape(out.shape))
