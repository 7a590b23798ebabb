"""Parquet tables: nodes with id, features, label and split; edges with src, dst and weight.

Files are read in batches, without loading row groups whole. Column names are those of the options. Features are one
list column or many numeric ones; labels are numbers, or lists of 0 and 1 with one entry per class.
"""

import difflib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
from numpy.typing import NDArray

from penstock.storage.errors import DataError
from penstock.storage.graph import Split
from penstock.storage.ingest.options import IngestOptions
from penstock.storage.ingest.source import (
    SPLIT_CODES,
    Column,
    EdgeChunk,
    IdChunk,
    Ids,
    NodeChunk,
    file_identity,
)

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 1 << 20
_SPLIT_NAMES = {"train": 0, "valid": 1, "val": 1, "validation": 1, "test": 2, "none": -1, "": -1}
_MASKS: dict[str, Split] = {
    "train_mask": "train",
    "val_mask": "valid",
    "valid_mask": "valid",
    "test_mask": "test",
}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); write it again") from error


class Table:
    """One table in one or more Parquet files with the same columns."""

    def __init__(self, kind: str, paths: Path | list[Path]) -> None:
        self.kind = kind
        self.paths = _expand(kind, paths)
        self._rows: list[int] = []
        schemas: list[pa.Schema] = []
        for path in self.paths:
            with _readable(path):
                file = pq.ParquetFile(path)
                self._rows.append(file.metadata.num_rows)
                schemas.append(file.schema_arrow.remove_metadata())
        self.schema = schemas[0]
        for path, schema in zip(self.paths, schemas, strict=True):
            if set(schema.names) != set(self.schema.names):
                raise DataError(f"{path} has columns {schema.names}, {self.paths[0]} has {self.schema.names}")
        self.num_rows = sum(self._rows)

    def has(self, name: str, *, wanted: bool) -> bool:
        """Whether the column is there; DataError, naming the nearest, where it is `wanted` and is not."""
        if name in self.schema.names:
            return True
        near = difflib.get_close_matches(name, self.schema.names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        if wanted:
            raise DataError(
                f"{self.paths[0]}: the {self.kind} table has no column {name!r}; {hint}it has {self.schema.names}"
            )
        if near:
            logger.warning("the %s table has no column %r and goes without; %s", self.kind, name, hint)
        return False

    def batches(self, rows: int, columns: list[str]) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        """Path, first row in that file, and up to `rows` rows of these columns."""
        for path in self.paths:
            at = 0
            with _readable(path):
                # without pre-buffering, memory is a few pages per column and not a row group
                file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
                batches = file.iter_batches(rows, columns=columns, use_threads=False)
            while True:
                with _readable(path):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield str(path), at, batch
                at += batch.num_rows

    def identity(self) -> list[dict[str, Any]]:
        """Names, sizes and times of the files."""
        return [{"table": self.kind, **file_identity(path)} for path in self.paths]


def _expand(kind: str, paths: Path | list[Path]) -> list[Path]:
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        found += sorted(path.glob("**/*.parquet")) if path.is_dir() else [path]
    if not found:
        raise DataError(f"{paths} holds no .parquet file for the {kind} table")
    return found


def _first_null(where: str, first_row: int, name: str, column: pa.Array) -> None:
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{where}, row {first_row + row}: {name} is null; fill it or drop the row")


def _values(column: pa.Array) -> NDArray[Any]:
    """Numbers of an array; null becomes NaN."""
    if not (pt.is_integer(column.type) or pt.is_floating(column.type) or pt.is_boolean(column.type)):
        raise TypeError(str(column.type))
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values.astype(np.float64) if values.dtype == object else values


def _is_list(kind: pa.DataType) -> bool:
    return bool(pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind))


def read_ids(where: str, first_row: int, name: str, column: pa.Array) -> Ids:
    """Integers as int64, strings as an Arrow array; DataError for nulls and other types."""
    _first_null(where, first_row, name, column)
    kind = column.type
    if pt.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pt.is_string(kind) or pt.is_large_string(kind):
        return column.cast(pa.string())
    if not pt.is_integer(kind):
        raise DataError(f"{where}: {name} is of type {kind}; node ids are integers or strings")
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    if values.dtype == np.uint64 and len(values) and int(values.max()) >= 2**63:
        row = int(values.argmax())
        raise DataError(f"{where}, row {first_row + row}: {name}={int(values[row])} exceeds int64; use strings")
    return values.astype(np.int64)


def read_lists(where: str, first_row: int, name: str, column: pa.Array, width: int) -> NDArray[Any]:
    """Numbers [n, width] of a list column; DataError names the first row of another width."""
    _first_null(where, first_row, name, column)
    if pt.is_fixed_size_list(column.type):
        widths = np.full(len(column), column.type.list_size)
    else:
        widths = np.diff(column.offsets.to_numpy())
    wrong = np.flatnonzero(widths != width)
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{where}, row {first_row + row}: {name} has {int(widths[row])} values, the first row has {width}; "
            "give every node as many"
        )
    try:
        return _values(column.flatten()).reshape(len(column), width)
    except TypeError as error:
        raise DataError(f"{where}: {name} holds lists of {error}; give numbers") from error


class ParquetSource:
    """A node table and an edge table."""

    kind = "parquet"
    split_ids: Mapping[Split, Column] = {}

    def __init__(self, nodes: Path | list[Path], edges: Path | list[Path], options: IngestOptions) -> None:
        self._nodes, self._edges, self._options = Table("node", nodes), Table("edge", edges), options
        for name in (options.src_column, options.dst_column):
            self._edges.has(name, wanted=True)
        self.num_nodes, self.num_edges = self._nodes.num_rows, self._edges.num_rows
        self._has_ids = self._optional("id_column")
        self._has_labels, self._has_split = self._optional("label_column"), self._optional("split_column")
        self._masks = [] if self._has_split else [name for name in _MASKS if name in self._nodes.schema.names]
        self.has_weights = self._edges.has(options.weight_column, wanted="weight_column" in options.model_fields_set)
        self._features = self._feature_columns()
        self.num_features = len(self._features) if self._many else self._list_width(self._features[0])
        label = options.label_column
        is_multi = self._has_labels and _is_list(self._nodes.schema.field(label).type)
        self.label_width = self._list_width(label) if is_multi else 0

    def _optional(self, option: str) -> bool:
        return self._nodes.has(getattr(self._options, option), wanted=option in self._options.model_fields_set)

    def _feature_columns(self) -> list[str]:
        options, names = self._options, self._nodes.schema.names
        self._many = True
        if options.feature_columns is not None:
            for name in options.feature_columns:
                self._nodes.has(name, wanted=True)
            return list(options.feature_columns)
        if options.feature_prefix is not None:
            if found := [name for name in names if name.startswith(options.feature_prefix)]:
                return found
            raise DataError(f"the node table has no column that starts with {options.feature_prefix!r}; it has {names}")
        self._nodes.has(options.feature_column, wanted=True)
        self._many = not _is_list(self._nodes.schema.field(options.feature_column).type)
        return [options.feature_column]

    def _list_width(self, name: str) -> int:
        kind = self._nodes.schema.field(name).type
        if pt.is_fixed_size_list(kind):
            return int(kind.list_size)
        for _, _, batch in self._nodes.batches(1, [name]):
            value = batch.column(0)[0]
            return len(value) if value.is_valid else 0
        return 0

    def identity(self) -> list[dict[str, Any]]:
        """Names, sizes and times of all files."""
        return self._nodes.identity() + self._edges.identity()

    def ids(self, rows: int) -> Iterator[IdChunk]:
        """The id column."""
        name = self._options.id_column
        for where, first, batch in self._nodes.batches(rows, [name]) if self._has_ids else ():
            yield IdChunk(where=where, first_row=first, ids=read_ids(where, first, name, batch.column(0)))

    @cached_property
    def _node_columns(self) -> list[str]:
        options = self._options
        columns = self._features + [options.label_column] * self._has_labels
        return columns + [options.split_column] * self._has_split + self._masks

    def nodes(self, rows: int) -> Iterator[NodeChunk]:
        """All other columns."""
        for where, first, batch in self._nodes.batches(rows, self._node_columns):
            labels = self._labels(where, first, batch) if self._has_labels else None
            yield NodeChunk(
                where=where,
                first_row=first,
                features=self._read_features(where, first, batch),
                labels=labels,
                splits=self._splits(where, first, batch),
            )

    def _read_features(self, where: str, first: int, batch: pa.RecordBatch) -> NDArray[Any]:
        if not self._many:
            name = self._features[0]
            return read_lists(where, first, name, batch.column(name), self.num_features)
        out = np.empty((batch.num_rows, self.num_features), np.float32)
        for n, name in enumerate(self._features):
            try:
                with np.errstate(over="ignore"):  # ingest refuses the Inf, with its row
                    out[:, n] = _values(batch.column(name))
            except TypeError as error:
                raise DataError(f"{where}: feature column {name!r} is of type {error}; give numbers") from error
        return out

    def _labels(self, where: str, first: int, batch: pa.RecordBatch) -> NDArray[Any]:
        name = self._options.label_column
        column = batch.column(name)
        if self.label_width:
            return read_lists(where, first, name, column, self.label_width)
        try:
            return _values(column)
        except TypeError as error:
            raise DataError(f"{where}: {name} is of type {error}; give integers 0..C-1") from error

    def _splits(self, where: str, first: int, batch: pa.RecordBatch) -> NDArray[np.int8] | None:
        if self._has_split:
            return read_splits(where, first, self._options.split_column, batch.column(self._options.split_column))
        if not self._masks:
            return None
        masks = {name: _values(batch.column(name).fill_null(False)).astype(bool) for name in self._masks}
        return merge_masks(where, first, {_MASKS[name]: mask for name, mask in masks.items()})

    def edges(self, rows: int) -> Iterator[EdgeChunk]:
        """The edge table."""
        options = self._options
        names = (options.src_column, options.dst_column)
        columns = [*names, *([options.weight_column] * self.has_weights)]
        for where, first, batch in self._edges.batches(rows, columns):
            weights = None
            if self.has_weights:
                try:
                    weights = _values(batch.column(options.weight_column)).astype(np.float32)
                except TypeError as error:
                    raise DataError(f"{where}: {options.weight_column} is of type {error}; give numbers") from error
            src, dst = (read_ids(where, first, name, batch.column(name)) for name in names)
            yield EdgeChunk(where=where, first_row=first, names=names, src=src, dst=dst, weights=weights)


def read_splits(where: str, first_row: int, name: str, column: pa.Array) -> NDArray[np.int8]:
    """Codes of split names; DataError names the first that is none of ours."""
    if not (pt.is_string(column.type) or pt.is_large_string(column.type) or pt.is_dictionary(column.type)):
        raise DataError(f"{where}: {name} is of type {column.type}; give {sorted(_SPLIT_NAMES)}")
    encoded = column if pt.is_dictionary(column.type) else column.dictionary_encode()
    texts = [str(text).lower() for text in encoded.dictionary.to_pylist()]
    codes = np.array([_SPLIT_NAMES.get(text, -2) for text in texts] + [-1], np.int8)  # the last is for nulls
    out: NDArray[np.int8] = codes[encoded.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)]
    wrong = np.flatnonzero(out == -2)
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{where}, row {first_row + row}: {name}={column[row].as_py()!r}; give train, valid, test or none"
        )
    return out


def merge_masks(where: str, first_row: int, masks: Mapping[Split, NDArray[np.bool_]]) -> NDArray[np.int8]:
    """Codes of boolean masks; DataError names the first node in two of them."""
    out = np.full(len(next(iter(masks.values()))), -1, np.int8)
    for split, mask in masks.items():
        twice = np.flatnonzero(mask & (out >= 0))
        if len(twice):
            raise DataError(f"{where}, row {first_row + int(twice[0])}: the node is in two splits, one is {split!r}")
        out[mask] = SPLIT_CODES[split]
    return out
