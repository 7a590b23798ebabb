"""Parquet tables: nodes with id, feature, label and split; edges with src, dst and weight.

Column names are those of the options. Features are one list column or many numeric ones; labels are numbers, or lists
of 0 and 1 with one entry per class.
"""

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
from numpy.typing import NDArray

from penstock.storage.errors import DataError
from penstock.storage.graph import Split
from penstock.storage.ingest.arrow import (
    is_list,
    is_text,
    numbers,
    read_flags,
    read_ids,
    read_labels,
    read_lists,
    read_splits,
)
from penstock.storage.ingest.inputs import Input
from penstock.storage.ingest.options import IngestOptions
from penstock.storage.ingest.source import Column, EdgeChunk, IdChunk, LabelChunk, NodeChunk, Values
from penstock.storage.ingest.tables import Table
from penstock.storage.ingest.values import find_split_names, mask_flags, merge_masks

logger = logging.getLogger(__name__)

_NAMED = 20  # columns that a message lists


class ParquetSource:
    """A node table and an edge table."""

    kind = "parquet"
    split_ids: Mapping[Split, Column] = {}
    adds_inverse = False

    def __init__(self, nodes: Path | list[Path], edges: Path | list[Path], options: IngestOptions) -> None:
        self._nodes, self._edges, self._options = Table("node", nodes), Table("edge", edges), options
        for option in ("src_column", "dst_column"):
            self._edges.has(getattr(options, option), wanted=True, option=option)
        self.num_nodes, self.num_edges = self._nodes.num_rows, self._edges.num_rows
        self._has_ids = self._optional("id_column")
        self._check_ids_of_edges()
        self.has_labels, self._has_split = self._optional("label_column"), self._optional("split_column")
        self._masks = {} if self._has_split else find_split_names(self._nodes.types, "mask")
        self.has_weights = self._edges.has(options.weight_column, wanted="weight_column" in options.model_fields_set)
        self._features = self._feature_columns()
        self.num_features = len(self._features) if self._many else self._feature_width()
        self._label_lists = self.has_labels and is_list(self._nodes.types[options.label_column])
        width = self._nodes.list_width(options.label_column) if self._label_lists else 0
        self.label_width = 0 if width == 1 else width  # lists of one are a class, as arrays [N, 1] are
        if self._label_lists and not width:
            raise DataError(
                f"{self._nodes.place}: every list of {options.label_column} is null or empty; drop the column"
            )
        self.text_labels = self.has_labels and is_text(self._nodes.types[options.label_column])
        self._name_unused()

    def _optional(self, option: str) -> bool:
        return self._nodes.has(getattr(self._options, option), wanted=option in self._options.model_fields_set)

    def _check_ids_of_edges(self) -> None:
        """Edges that hold strings want a column of ids, which may have another name."""
        ends = (self._options.src_column, self._options.dst_column)
        names = [name for name in ends if is_text(self._edges.types[name])]
        if names and not self._has_ids:
            raise DataError(
                f"the node table has no column {self._options.id_column!r}, so its nodes are numbered by row, and "
                f"{' and '.join(names)} of the edge table hold strings; name the column of ids with "
                f"--set id_column=...; the node table has {[*self._nodes.types]}"
            )

    def _feature_columns(self) -> list[str]:
        options, names = self._options, self._nodes.types
        self._many = True
        if options.feature_columns is not None:
            for name in options.feature_columns:
                self._nodes.has(name, wanted=True)
            return list(options.feature_columns)
        if options.feature_prefix is not None:
            if found := [name for name in names if name.startswith(options.feature_prefix)]:
                return found
            raise DataError(
                f"the node table has no column that starts with {options.feature_prefix!r}; it has {[*names]}"
            )
        elsewhere = "several columns: --set feature_prefix=f_, or --set feature_columns=age,income"
        self._nodes.has(options.feature_column, wanted=True, option="feature_column", remedy=elsewhere)
        kind = names[options.feature_column]
        self._many = not is_list(kind) and not pt.is_null(kind)
        return [options.feature_column]

    def _feature_width(self) -> int:
        """Width of the first list that has values; a table in which none has is refused with its first row."""
        name = self._features[0]
        width = 0 if pt.is_null(self._nodes.types[name]) else self._nodes.list_width(name)
        if not width:
            for where, first, batch in self._nodes.batches(1, [name]):
                read_lists(where, first, name, batch.column(name), 1)
        return width

    def _name_unused(self) -> None:
        """Say once that labels lack, and what goes nowhere: edge features, types and times among it."""
        options = self._options
        if not self.has_labels:
            logger.warning(
                "no node has a label: the node table has no column %r; name yours with --set label_column=...",
                options.label_column,
            )
        used = {*self._features, options.id_column, options.label_column, options.split_column, *self._masks.values()}
        unused = {
            self._nodes.kind: self._nodes.unused(used),
            self._edges.kind: self._edges.unused({options.src_column, options.dst_column, options.weight_column}),
        }
        for kind, names in unused.items():
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                logger.warning("columns of the %s table that are not used: %s%s", kind, ", ".join(names[:_NAMED]), more)

    @property
    def inputs(self) -> list[Input]:
        """All files."""
        return [*self._nodes.inputs(), *self._edges.inputs()]

    def ids(self, rows: int) -> Iterator[IdChunk]:
        """The id column."""
        name = self._options.id_column
        for where, first, batch in self._nodes.batches(rows, [name]) if self._has_ids else ():
            yield IdChunk(where=where, first_row=first, ids=read_ids(where, first, name, batch.column(name)))

    @cached_property
    def _node_columns(self) -> list[str]:
        options = self._options
        columns = self._features + [options.label_column] * self.has_labels
        return list(dict.fromkeys(columns + [options.split_column] * self._has_split + [*self._masks.values()]))

    def nodes(self, rows: int) -> Iterator[NodeChunk]:
        """All other columns."""
        for where, first, batch in self._nodes.batches(rows, self._node_columns):
            yield NodeChunk(
                where=where,
                first_row=first,
                features=self._read_features(where, first, batch),
                names=self._features if self._many else (),
                labels=self._read_labels(where, first, batch) if self.has_labels else None,
                splits=self._splits(where, first, batch),
            )

    def labels(self, rows: int) -> Iterator[LabelChunk]:
        """The label column."""
        for where, first, batch in self._nodes.batches(rows, [self._options.label_column]) if self.has_labels else ():
            yield self._read_labels(where, first, batch)

    def _read_features(self, where: str, first: int, batch: pa.RecordBatch) -> NDArray[Any]:
        nulls: Literal["refuse", "nan"] = "refuse" if self._options.null_features == "refuse" else "nan"
        if not self._many:
            name = self._features[0]
            return read_lists(where, first, name, batch.column(name), self.num_features, nulls=nulls)
        columns = []
        for name in self._features:
            try:
                columns.append(numbers(batch.column(name)))
            except TypeError as error:
                raise DataError(f"{where}: feature column {name!r} is of type {error}; give numbers") from error
        out = np.empty((batch.num_rows, self.num_features), np.result_type(*{column.dtype for column in columns}))
        for n, column in enumerate(columns):
            out[:, n] = column
        return out

    def _read_labels(self, where: str, first: int, batch: pa.RecordBatch) -> LabelChunk:
        name = self._options.label_column
        column = batch.column(name)
        if self._label_lists:
            lists = read_lists(where, first, name, column, self.label_width or 1, nulls="nan")
            labels: Values = lists if self.label_width else lists.reshape(-1)
        else:
            labels = read_labels(where, first, name, column)
        return LabelChunk(where=where, first_row=first, labels=labels)

    def _splits(self, where: str, first: int, batch: pa.RecordBatch) -> NDArray[np.int8] | None:
        if self._has_split:
            return read_splits(where, first, self._options.split_column, batch.column(self._options.split_column))
        if not self._masks:
            return None
        masks = {
            split: mask_flags(where, first, name, read_flags(where, name, batch.column(name)))
            for split, name in self._masks.items()
        }
        return merge_masks(where, first, masks)

    def edges(self, rows: int) -> Iterator[EdgeChunk]:
        """The edge table."""
        options = self._options
        names = (options.src_column, options.dst_column)
        columns = list(dict.fromkeys([*names, *([options.weight_column] * self.has_weights)]))
        for where, first, batch in self._edges.batches(rows, columns):
            weights = None
            if self.has_weights:
                try:
                    weights = numbers(batch.column(options.weight_column))
                except TypeError as error:
                    raise DataError(f"{where}: {options.weight_column} is of type {error}; give numbers") from error
            src, dst = (read_ids(where, first, name, batch.column(name)) for name in names)
            yield EdgeChunk(where=where, first_row=first, names=names, src=src, dst=dst, weights=weights)
