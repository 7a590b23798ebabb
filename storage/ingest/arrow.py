"""Arrow arrays of any encoding as plain numbers, lists and strings.

Tables come from many writers: dictionaries, views, run ends, extension types over a storage, decimals, half floats, and
columns of type null where a part has no value at all. `plain` takes the wrapping off; the rest gives NumPy.
"""

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from numpy.typing import NDArray

from penstock.storage.errors import DataError
from penstock.storage.ingest.source import Ids, Values

_SPLIT_NAMES = {"train": 0, "valid": 1, "val": 1, "validation": 1, "test": 2, "none": -1, "": -1}
_WRONG = -2


def plain_type(kind: pa.DataType) -> pa.DataType:
    """What `plain` makes of a type."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pt.is_dictionary(kind) or pt.is_run_end_encoded(kind):
            kind = kind.value_type
        else:
            return kind


def plain(column: pa.Array) -> pa.Array:
    """Take extension types, dictionaries and run ends off."""
    while True:
        if isinstance(column.type, pa.BaseExtensionType):
            column = column.storage
        elif pt.is_dictionary(column.type):
            column = column.dictionary_decode()
        elif pt.is_run_end_encoded(column.type):
            column = pc.run_end_decode(column)
        else:
            return column


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists, of whatever layout."""
    tests = (pt.is_list, pt.is_large_list, pt.is_fixed_size_list, pt.is_list_view, pt.is_large_list_view)
    return any(test(kind) for test in tests)


def is_number(kind: pa.DataType) -> bool:
    """Whether values are numbers, booleans among them, or all missing."""
    tests = (pt.is_integer, pt.is_floating, pt.is_boolean, pt.is_decimal, pt.is_null)
    return any(test(kind) for test in tests)


def is_text(kind: pa.DataType) -> bool:
    """Whether values are strings, or bytes that may be."""
    tests = (
        *(pt.is_string, pt.is_large_string, pt.is_string_view),
        *(pt.is_binary, pt.is_large_binary, pt.is_binary_view),
    )
    return any(test(kind) for test in tests)


def numbers(column: pa.Array) -> NDArray[Any]:
    """Numbers of an array, NaN where null; TypeError, naming the type, for anything else."""
    column = plain(column)
    kind = column.type
    if not is_number(kind):
        raise TypeError(str(kind))
    if pt.is_null(kind):
        return np.full(len(column), np.nan)
    if pt.is_decimal(kind) or (column.null_count and not pt.is_floating(kind)):
        column = column.cast(pa.float64(), safe=False)
    elif pt.is_float16(kind):
        column = column.cast(pa.float32())
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def texts(where: str, name: str, column: pa.Array) -> pa.Array:
    """Strings of an array for which `is_text` holds; DataError for bytes that are no UTF-8."""
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: {name} holds bytes that are no UTF-8 ({error}); write strings") from error


def first_null(where: str, first_row: int, name: str, column: pa.Array) -> None:
    """Raise DataError that names the first row that is null."""
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{where}, row {first_row + row}: {name} is null; fill it or drop the row")


def read_ids(where: str, first_row: int, name: str, column: pa.Array) -> Ids:
    """Integers as int64, strings as an Arrow array; DataError for nulls and other types."""
    column = plain(column)
    first_null(where, first_row, name, column)
    kind = column.type
    if pt.is_null(kind):  # of a part without rows
        return np.empty(0, np.int64)
    if is_text(kind):
        return texts(where, name, column)
    if not pt.is_integer(kind) and not (pt.is_decimal(kind) and kind.scale <= 0):
        raise DataError(
            f"{where}: {name} is of type {kind}; node ids are integers or strings: cast the column and write it again"
        )
    return _int64(where, first_row, name, column, "use strings")


def _int64(where: str, first_row: int, name: str, column: pa.Array, remedy: str) -> NDArray[np.int64]:
    """Whole numbers without nulls; DataError names the first that int64 does not hold."""
    try:
        values: NDArray[np.int64] = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        rows = (row for row, value in enumerate(column) if not -(2**63) <= int(value.as_py()) < 2**63)
        row = next(rows)
        value = int(column[row].as_py())
        raise DataError(f"{where}, row {first_row + row}: {name}={value} exceeds int64; {remedy}") from None
    return values


def read_labels(where: str, first_row: int, name: str, column: pa.Array) -> Values:
    """Classes: whole numbers as int64 with -1 where null, others as floats with NaN, strings as an Arrow array."""
    column = plain(column)
    kind = column.type
    if is_text(kind):
        return texts(where, name, column)
    if not is_number(kind):
        raise DataError(f"{where}: {name} is of type {kind}; give integers 0..C-1, -1 or null for unknown")
    if pt.is_null(kind):
        return np.full(len(column), -1, np.int64)
    if pt.is_boolean(kind):
        column = column.cast(pa.int64())
    if pt.is_integer(column.type) or (pt.is_decimal(kind) and kind.scale <= 0):
        known = column.drop_null() if column.null_count else column
        out = np.full(len(column), -1, np.int64)
        valid = slice(None) if known is column else column.is_valid().to_numpy(zero_copy_only=False)
        out[valid] = _int64(where, first_row, name, known, "give integers 0..C-1")
        return out
    return numbers(column)


def list_widths(column: pa.Array) -> NDArray[np.int64]:
    """Number of values of each list of a plain column, -1 where it is null."""
    widths: NDArray[Any] = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False)
    return widths.astype(np.int64)


def read_lists(
    where: str, first_row: int, name: str, column: pa.Array, width: int, nulls: Literal["refuse", "nan"] = "refuse"
) -> NDArray[Any]:
    """Numbers [n, width] of a list column; DataError names the first row of another width.

    With `nulls="nan"` a row that is null becomes NaN throughout, as a null in a list does.
    """
    column = plain(column)
    if pt.is_null(column.type):
        column = column.cast(pa.list_(pa.float32()))
    if nulls == "refuse":
        first_null(where, first_row, name, column)
    if not is_list(column.type):
        raise DataError(f"{where}: {name} is of type {column.type} here and holds lists elsewhere; give one type")
    widths = list_widths(column)
    wrong = np.flatnonzero((widths != width) & (widths >= 0))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{where}, row {first_row + row}: {name} has {int(widths[row])} values, others have {width}; "
            "give every node as many"
        )
    try:
        values = numbers(column.flatten()).reshape(-1, width)
    except TypeError as error:
        raise DataError(f"{where}: {name} holds lists of {error}; give numbers") from error
    if len(values) == len(column):
        return values
    out = np.full((len(column), width), np.nan)
    out[widths >= 0] = values
    return out


def read_splits(where: str, first_row: int, name: str, column: pa.Array) -> NDArray[np.int8]:
    """Codes of split names; DataError names the first that is none of ours."""
    column = plain(column)
    if pt.is_null(column.type):
        return np.full(len(column), -1, np.int8)
    if not is_text(column.type):
        raise DataError(
            f"{where}: {name} is of type {column.type}; give train, valid, test or none as text, or masks in columns "
            "of their own, called train_mask, valid_mask and test_mask"
        )
    column = texts(where, name, column)
    encoded = column.dictionary_encode()
    names = [str(text).strip().lower() for text in encoded.dictionary.to_pylist()]
    codes = np.array([_SPLIT_NAMES.get(text, _WRONG) for text in names] + [-1], np.int8)  # the last is for nulls
    out: NDArray[np.int8] = codes[encoded.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)]
    wrong = np.flatnonzero(out == _WRONG)
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{where}, row {first_row + row}: {name}={column[row].as_py()!r}; give train, valid, test or none"
        )
    return out


def read_flags(where: str, name: str, column: pa.Array) -> Values:
    """A mask as numbers with NaN where null, or as an Arrow array of strings; see `values.mask_flags`."""
    column = plain(column)
    if is_text(column.type):
        return texts(where, name, column)
    try:
        return numbers(column)
    except TypeError as error:
        raise DataError(f"{where}: {name} is of type {error}; a mask holds true and false, or 1 and 0") from error
