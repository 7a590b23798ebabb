"""What may stand in a column, wherever it comes from: rules for masks, labels, weights, features and ids.

Sources give numbers as NumPy arrays, with NaN where a value is missing, and strings as Arrow arrays.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from penstock.storage.errors import DataError
from penstock.storage.graph import UNKNOWN_FLAG, Split
from penstock.storage.ingest.source import SPLIT_CODES, EdgeChunk, LabelChunk, NodeChunk, Values

UNKNOWN = -1
NULLS_TO_ZERO = "let nulls be 0 (--set null_features=zero)"
SPLIT_ALIASES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "val", "validation"),
    "test": ("test",),
}
_TRUE, _FALSE = ("true", "t", "yes", "y", "1", "1.0"), ("false", "f", "no", "n", "0", "0.0", "", "nan", "null", "none")


def find_split_names(names: Any, suffix: str) -> dict[Split, str]:
    """Which of `names` say, as `train_mask` does, what is in a split; DataError where two say it of one split."""
    found: dict[Split, str] = {}
    for split, aliases in SPLIT_ALIASES.items():
        there = [f"{alias}_{suffix}" for alias in aliases if f"{alias}_{suffix}" in names]
        if len(there) > 1:
            raise DataError(f"{' and '.join(there)} are both there, and both mean split {split!r}; keep one")
        if there:
            found[split] = there[0]
    return found


def string_array(values: NDArray[Any]) -> pa.Array:
    """Arrow strings of a NumPy array of text."""
    return pa.array(np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values, pa.string())


def mask_flags(where: str, first_row: int, name: str, values: Values) -> NDArray[np.bool_]:
    """Whether each node is in the split; a missing value is no. DataError names the first that is neither."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "US":
        values = string_array(values)
    if not isinstance(values, np.ndarray):
        encoded = values.dictionary_encode()
        lower = [str(text).strip().lower() for text in encoded.dictionary.to_pylist()]
        codes = np.array([1 if text in _TRUE else 0 if text in _FALSE else 2 for text in lower] + [0], np.int8)
        flags = codes[encoded.indices.fill_null(len(lower)).to_numpy(zero_copy_only=False)]
        wrong, said = np.flatnonzero(flags == 2), values
    elif values.dtype.kind in "biuf":
        flags = np.nan_to_num(values) if values.dtype.kind == "f" else values
        wrong, said = np.flatnonzero((flags != 0) & (flags != 1)), values
    else:
        raise DataError(f"{where}: {name} is of type {values.dtype}; a mask holds true and false, or 1 and 0")
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{where}, row {first_row + row}: {name}={said[row]}; a mask holds true and false, or 1 and 0; "
            "null is not in the split"
        )
    in_split: NDArray[np.bool_] = flags.astype(bool)
    return in_split


def merge_masks(where: str, first_row: int, masks: Mapping[Split, NDArray[np.bool_]]) -> NDArray[np.int8]:
    """Codes of boolean masks; DataError names the first node in two of them."""
    out = np.full(len(next(iter(masks.values()))), -1, np.int8)
    for split, mask in masks.items():
        twice = np.flatnonzero(mask & (out >= 0))
        if len(twice):
            raise DataError(f"{where}, row {first_row + int(twice[0])}: the node is in two splits, one is {split!r}")
        out[mask] = SPLIT_CODES[split]
    return out


def integer_ids(name: str, first_row: int, values: NDArray[Any]) -> NDArray[np.int64]:
    """Ids as int64; DataError for other types and for what int64 does not hold."""
    if values.dtype.kind not in "iu" or values.ndim != 1:
        shape = "" if values.ndim == 1 else f" of shape [n, {', '.join(map(str, values.shape[1:]))}]"
        hint = "; a mask is named after its split, as train_mask" if values.dtype.kind == "b" else ""
        raise DataError(f"{name} holds {values.dtype}{shape}; node ids are integers in one dimension{hint}")
    if values.dtype == np.uint64 and len(values) and int(values.max()) >= 2**63:
        row = int(values.argmax())
        raise DataError(f"{name}, row {first_row + row}: id {int(values[row])} exceeds int64; renumber the nodes")
    return values.astype(np.int64)


def finite_rows(chunk: NodeChunk, width: int, *, nulls: Literal["refuse", "zero"] = "refuse") -> NDArray[np.float32]:
    """Cast features to float32, nulls to 0 where asked; DataError names row, column and value of the first that is not
    finite."""
    if chunk.features.ndim != 2 or chunk.features.shape[1] != width:
        raise DataError(
            f"{chunk.where}, row {chunk.first_row}: features have shape {chunk.features.shape[1:]}, the first rows "
            f"have {width} columns; give every node as many"
        )
    if chunk.features.dtype.kind not in "biuf":
        raise DataError(f"{chunk.where}: features are of type {chunk.features.dtype}; give numbers")
    with np.errstate(over="ignore"):  # what overflows is Inf, and refused below
        rows = np.ascontiguousarray(chunk.features, dtype=np.float32)
    if nulls == "zero":
        rows[np.isnan(rows)] = 0.0
    finite = np.isfinite(rows)
    if not finite.all():
        row, column = np.argwhere(~finite)[0].tolist()
        value = chunk.features[row, column]
        problem = (
            f"null or NaN; fill it, {NULLS_TO_ZERO}" if np.isnan(value) else f"{value}, not a finite float32; clip it"
        )
        raise DataError(
            f"{chunk.where}, row {chunk.first_row + row}: {chunk.feature_name(column)} is {problem}, or drop the node"
        )
    return rows


def first_rounded(chunk: NodeChunk, rows: NDArray[np.float32]) -> str | None:
    """Name the first whole number that float32 does not hold, such as a time or an id taken for a feature."""
    if chunk.features.dtype.kind not in "iu" or chunk.features.dtype.itemsize < 4:
        return None
    wrong = np.argwhere(np.abs(rows) >= 2**24)
    for row, column in wrong.tolist():
        if int(rows[row, column]) != int(chunk.features[row, column]):
            value = int(chunk.features[row, column])
            return f"{chunk.where}, row {chunk.first_row + row}: {chunk.feature_name(column)} is {value}"
    return None


def whole_labels(chunk: LabelChunk) -> NDArray[np.int64]:
    """Labels as int64, -1 where missing; DataError for strings and for fractions."""
    where, first_row, labels = chunk.where, chunk.first_row, chunk.labels
    if not isinstance(labels, np.ndarray) and labels.null_count == len(labels):
        return np.full(len(labels), UNKNOWN, np.int64)
    if not isinstance(labels, np.ndarray) or labels.dtype.kind in "US":
        raise DataError(
            f"{where}: labels are of type string; give integers 0..C-1, or have them numbered: drop remap_labels=false"
        )
    if labels.dtype.kind not in "iufb":
        raise DataError(f"{where}: labels are of type {labels.dtype}; give integers 0..C-1, -1 for unknown")
    if labels.dtype.kind == "f":
        known = ~np.isnan(labels)
        wrong = np.flatnonzero(known & ~(np.isfinite(labels) & (labels == np.rint(labels)) & (np.abs(labels) < 2**63)))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{where}, row {first_row + row}: label {labels[row]} is no whole number that int64 holds; "
                "classes are integers, and regression is not supported"
            )
        labels = np.where(known, labels, UNKNOWN)
    elif labels.dtype == np.uint64 and len(labels) and int(labels.max()) >= 2**63:
        row = int(labels.argmax())
        raise DataError(f"{where}, row {first_row + row}: label {int(labels[row])} exceeds int64; renumber the classes")
    return labels.astype(np.int64)


def class_flags(chunk: LabelChunk) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Multi-label flags as uint8, and whether a node has labels: where all are missing, all are `UNKNOWN_FLAG`.

    DataError for anything but 0 and 1.
    """
    labels = chunk.labels
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "biuf":
        kind = labels.dtype if isinstance(labels, np.ndarray) else "string"
        raise DataError(f"{chunk.where}: labels are lists of {kind}; a list of labels holds 0 or 1 for every class")
    known: NDArray[np.bool_] = np.ones(len(labels), bool)
    if labels.dtype.kind == "f":
        known = np.asarray(~np.isnan(labels).all(axis=1))
        labels = np.where(known[:, None], labels, 0)
    wrong = np.argwhere((labels != 0) & (labels != 1))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise DataError(
            f"{chunk.where}, row {chunk.first_row + row}: class {column} has label {labels[row, column]}; "
            "a list of labels holds 0 or 1 for every class"
        )
    flags = labels.astype(np.uint8)
    flags[~known] = UNKNOWN_FLAG
    return flags, known


def sound_weights(chunk: EdgeChunk) -> NDArray[np.float32] | None:
    """Weights as float32; DataError names the first that is missing, negative, or no finite float32."""
    if chunk.weights is None:
        return None
    given = chunk.weights
    with np.errstate(over="ignore"):
        weights = given.astype(np.float32)
    sound: NDArray[Any] = np.asarray((weights >= 0) & (weights < np.inf))  # NaN is neither
    if given.dtype.itemsize > 4:
        sound = np.logical_and(sound, (weights > 0) | (given == 0))
    if not sound.all():
        row = int(sound.argmin())
        value = given[row]
        problem = (
            "is null or NaN: fill or drop it"
            if np.isnan(value)
            else "is negative: a neighbour is drawn and averaged in proportion to its weight, so weights are at least 0"
            if value < 0
            else "is not finite in float32, whose largest is 3.4e38: fill it, drop it or scale the weights"
            if value > 1
            else "is 0 in float32, whose smallest is 1.4e-45: scale the weights"
        )
        raise DataError(f"{chunk.where}, row {chunk.first_row + row}: weight {value} {problem}")
    return weights
