"""Row formats: how a node's feature vector lies in bytes.

Everything that moves rows treats them as opaque strings of `row_bytes`; only ingest encodes and only the last gather
before the model decodes. float32 and float16 are IEEE, bfloat16 is the upper half of a float32, int8 is `width` signed
bytes followed by one float32 scale (value = byte * scale), so a row never needs a second table.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.runs import encode_bfloat16

RowDtype = Literal["float32", "float16", "bfloat16", "int8"]
ROW_DTYPES: tuple[RowDtype, ...] = get_args(RowDtype)
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormat:
    """`width` features of `dtype` per row."""

    dtype: RowDtype
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, scale included."""
        return self.width * _ITEM_BYTES[self.dtype] + (_SCALE_BYTES if self.dtype == "int8" else 0)

    @property
    def array_dtype(self) -> np.dtype[Any]:
        """The dtype of the `.npy` that holds such rows (bfloat16 as uint16, int8 rows as bytes)."""
        return np.dtype({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "u1"}[self.dtype])

    @property
    def array_width(self) -> int:
        """Columns of that `.npy`."""
        return self.row_bytes // self.array_dtype.itemsize


def encode_rows(values: NDArray[np.float32], row_format: RowFormat) -> NDArray[Any]:
    """Turn float32 [n, width] into rows [n, array_width] of the format's dtype.

    bfloat16 rounds to nearest even, never to infinity; int8 takes scale = max|row| / 127. ValueError where a value
    overflows float16.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    if row_format.dtype == "float32":
        return values
    if row_format.dtype == "float16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.isinf(half).any():
            worst = float(np.abs(values).max())
            raise ValueError(f"a feature of magnitude {worst:g} exceeds float16's 65504; use bfloat16 or float32")
        return half
    if row_format.dtype == "bfloat16":
        rounded = np.empty(values.shape, np.uint16)
        encode_bfloat16(values.view(np.uint32).reshape(-1), rounded.reshape(-1), 0, values.size)
        return rounded
    scale = np.abs(values).max(axis=1, initial=0.0, keepdims=True).astype(np.float32) / np.float32(127)
    safe = np.where(scale > 0, scale, np.float32(1))
    rows = np.empty((len(values), row_format.row_bytes), np.uint8)
    rows[:, : row_format.width] = np.rint(values / safe).astype(np.int8).view(np.uint8)
    rows[:, row_format.width :] = scale.astype("<f4").view(np.uint8)
    return rows


def decode_rows(rows: NDArray[Any], row_format: RowFormat) -> NDArray[np.float32]:
    """Undo `encode_rows` into fresh float32 [n, width]; `rows` may also be the raw bytes [n, row_bytes]."""
    if rows.dtype == np.uint8 and row_format.dtype != "int8":
        rows = np.ascontiguousarray(rows).view(row_format.array_dtype)
    if row_format.dtype == "bfloat16":
        return (rows.astype(np.uint32) << 16).view(np.float32)
    if row_format.dtype == "int8":
        scale = np.ascontiguousarray(rows[:, row_format.width :]).view("<f4")
        values: NDArray[np.float32] = np.ascontiguousarray(rows[:, : row_format.width]).view(np.int8) * scale
        return values
    return rows.astype(np.float32)
