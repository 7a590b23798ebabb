"""Graphs whose parts are columns: NumPy and OGB folders, DGL and PyG objects."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.storage.errors import DataError
from penstock.storage.graph import Split
from penstock.storage.ingest.inputs import Input
from penstock.storage.ingest.source import Column, EdgeChunk, IdChunk, LabelChunk, NodeChunk
from penstock.storage.ingest.values import integer_ids, mask_flags, merge_masks


def is_flat(shape: tuple[int, ...]) -> bool:
    """Whether an array holds one value per row: [n] or [n, 1]."""
    return len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)


@dataclass(frozen=True, kw_only=True)
class ArraySource:
    """A graph as columns; DataError where their shapes do not go together.

    Where there are `node_ids`, `split_ids` are such ids too, and row numbers otherwise.
    """

    kind: str
    inputs: Sequence[Input]
    features: Column
    src: Column
    dst: Column
    label_column: Column | None = None
    weights: Column | None = None
    node_ids: Column | None = None
    masks: Mapping[Split, Column] = field(default_factory=dict)
    split_ids: Mapping[Split, Column] = field(default_factory=dict)
    adds_inverse: bool = False

    def __post_init__(self) -> None:
        if len(self.features.shape) != 2:
            raise DataError(f"{self.features.name} has shape {self.features.shape}, wanted nodes by features")
        for column in (self.label_column, self.node_ids, *self.masks.values()):
            if column is not None and column.shape[:1] != (self.num_nodes,):
                rows = column.shape[0] if column.shape else "no"
                raise DataError(f"{column.name} has {rows} rows, the features have {self.num_nodes}")
        for column in self.masks.values():
            if not is_flat(column.shape):
                raise DataError(f"{column.name} has shape {column.shape}; choose one split, a mask of one dimension")
        if self.label_column is not None and len(self.label_column.shape) > 2:
            raise DataError(
                f"{self.label_column.name} has shape {self.label_column.shape}; give one class per node, [N], or flags "
                "of classes, [N, C]"
            )
        for column in (self.src, self.dst, self.weights):
            if column is not None and column.shape[:1] != (self.num_edges,):
                rows = column.shape[0] if column.shape else "no"
                raise DataError(f"{column.name} has {rows} rows, {self.src.name} has {self.num_edges}")
        if self.weights is not None and not is_flat(self.weights.shape):
            raise DataError(f"{self.weights.name} has shape {self.weights.shape}; an edge has one weight")
        for split in self.masks.keys() & self.split_ids.keys():
            names = f"{self.masks[split].name} and {self.split_ids[split].name}"
            raise DataError(f"{names} both say which nodes are in split {split!r}; keep one")

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.features.shape[0]

    @property
    def num_features(self) -> int:
        """F."""
        return self.features.shape[1]

    @property
    def num_edges(self) -> int:
        """E."""
        return self.src.shape[0] if self.src.shape else 0

    @property
    def has_weights(self) -> bool:
        """Whether edges have a weight."""
        return self.weights is not None

    @property
    def has_labels(self) -> bool:
        """Whether nodes have labels."""
        return self.label_column is not None

    @property
    def text_labels(self) -> bool:
        """Whether labels are strings."""
        column = self.label_column
        if column is None or not self.num_nodes:
            return False
        return next(column.chunks(1)).dtype.kind in "US"

    @property
    def label_width(self) -> int:
        """Classes of a multi-label task, else 0."""
        shape = (0,) if self.label_column is None else self.label_column.shape
        return 0 if is_flat(shape) else shape[1]

    def ids(self, rows: int) -> Iterator[IdChunk]:
        """The node ids, if they are not row numbers."""
        at = 0
        for ids in self.node_ids.chunks(rows) if self.node_ids is not None else ():
            assert self.node_ids is not None
            yield IdChunk(where=self.node_ids.name, first_row=at, ids=integer_ids(self.node_ids.name, at, ids))
            at += len(ids)

    def labels(self, rows: int) -> Iterator[LabelChunk]:
        """The labels."""
        at = 0
        for labels in self.label_column.chunks(rows) if self.label_column is not None else ():
            assert self.label_column is not None
            values = labels if self.label_width else labels.reshape(-1)
            yield LabelChunk(where=self.label_column.name, first_row=at, labels=values)
            at += len(labels)

    def nodes(self, rows: int) -> Iterator[NodeChunk]:
        """Features, labels and masks, side by side."""
        labels = self.labels(rows) if self.label_column is not None else None
        masks = {split: (column.name, column.chunks(rows)) for split, column in self.masks.items()}
        at = 0
        for features in self.features.chunks(rows):
            flags = {
                split: mask_flags(name, at, split, next(chunks).reshape(-1)) for split, (name, chunks) in masks.items()
            }
            yield NodeChunk(
                where=self.features.name,
                first_row=at,
                features=features,
                labels=next(labels) if labels is not None else None,
                splits=merge_masks(f"{self.kind} masks", at, flags) if flags else None,
            )
            at += len(features)
        if at != self.num_nodes:
            raise DataError(f"{self.features.name} has {at} rows, wanted {self.num_nodes}")

    def edges(self, rows: int) -> Iterator[EdgeChunk]:
        """Sources, destinations and weights, side by side."""
        weights = self.weights.chunks(rows) if self.weights is not None else None
        dst_chunks, at = self.dst.chunks(rows), 0
        for src in self.src.chunks(rows):
            weight = next(weights) if weights is not None else None
            yield EdgeChunk(
                where=self.src.name,
                first_row=at,
                names=("src", "dst"),
                src=integer_ids(self.src.name, at, src),
                dst=integer_ids(self.dst.name, at, next(dst_chunks)),
                weights=None if weight is None else _numbers(self.weights, weight),
            )
            at += len(src)
        if at != self.num_edges:
            raise DataError(f"{self.src.name} has {at} rows, wanted {self.num_edges}")


def _numbers(column: Column | None, values: NDArray[Any]) -> NDArray[Any]:
    assert column is not None
    if values.dtype.kind not in "biuf":
        raise DataError(f"{column.name} is of type {values.dtype}; weights are numbers")
    flat: NDArray[Any] = values.reshape(-1)
    return flat.astype(np.uint8) if flat.dtype.kind == "b" else flat
