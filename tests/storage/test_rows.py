import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from penstock.kernels.pack import encode_row
from penstock.storage.history.values import Values
from penstock.storage.rows import ROW_DTYPES, RowDtype, RowFormat, decode_rows, encode_rows

tables = hnp.arrays(
    np.float32, st.tuples(st.integers(0, 6), st.integers(1, 9)), elements=st.floats(-60000, 60000, width=32)
)


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@given(values=tables)
def test_rows_come_back_as_precisely_as_their_dtype(dtype: RowDtype, values: NDArray[np.float32]) -> None:
    row_format = RowFormat(dtype=dtype, width=values.shape[1])
    rows = encode_rows(values, row_format)
    assert rows.dtype == row_format.array_dtype and rows.shape == (len(values), row_format.array_width)
    assert rows.nbytes == len(values) * row_format.row_bytes
    decoded = decode_rows(rows, row_format)
    assert decoded.dtype == np.float32
    if dtype == "float32":
        np.testing.assert_array_equal(decoded, values)
    elif dtype == "int8":
        step = np.abs(values).max(axis=1, keepdims=True, initial=0) / 127
        assert (np.abs(decoded - values) <= 0.501 * step + 1e-37).all()
    else:
        wanted = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(decoded, wanted)
    raw = np.ascontiguousarray(rows).view(np.uint8).reshape(len(values), row_format.row_bytes)
    np.testing.assert_array_equal(decode_rows(raw, row_format), decoded)


def test_float16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"magnitude 70000 exceeds float16's 65504; use bfloat16"):
        encode_rows(np.array([[1.0, -70000.0]], np.float32), RowFormat(dtype="float16", width=2))


def test_no_encoder_makes_a_finite_number_infinite() -> None:
    words = np.array([0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0x7FC12345, 0x7F800001], np.uint32)
    values = words.view(np.float32)[None]
    row_format = RowFormat(dtype="bfloat16", width=values.shape[1])
    ingested = encode_rows(values, row_format)
    packed, moved = np.empty(2 * values.size, np.uint8), np.empty(values.size, np.uint16)
    assert encode_row(values[0], ROW_DTYPES.index("bfloat16"), packed)
    Values(dtype="bfloat16").encode(values, moved)
    assert [f"{n:04x}" for n in ingested[0]] == ["7f7f", "ff7f", "7f7f", "7f7f", "7f80", "7fc1", "7fc0"]
    np.testing.assert_array_equal(packed.view("<u2"), ingested[0])
    np.testing.assert_array_equal(moved, ingested[0])


def test_a_row_of_zeros_stays_zero_in_int8() -> None:
    row_format = RowFormat(dtype="int8", width=3)
    assert row_format.row_bytes == 7
    assert not decode_rows(encode_rows(np.zeros((2, 3), np.float32), row_format), row_format).any()
