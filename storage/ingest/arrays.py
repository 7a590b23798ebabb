"""Graphs whose parts are columns: NumPy and OGB folders, DGL and PyG objects."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.storage.errors import DataError
from penstock.storage.graph import Split
from penstock.storage.ingest.parquet import merge_masks
from penstock.storage.ingest.source import Column, EdgeChunk, IdChunk, NodeChunk


@dataclass(frozen=True, kw_only=True)
class ArraySource:
    """A graph as columns of equal length; use `array_source` to check them."""

    kind: str
    inputs: list[dict[str, Any]]
    features: Column
    src: Column
    dst: Column
    labels: Column | None = None
    weights: Column | None = None
    node_ids: Column | None = None
    masks: Mapping[Split, Column] = field(default_factory=dict)
    split_ids: Mapping[Split, Column] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.features.shape) != 2:
            raise DataError(f"{self.features.name} has shape {self.features.shape}, wanted nodes by features")
        for column in (self.labels, self.node_ids, *self.masks.values()):
            if column is not None and column.shape[0] != self.num_nodes:
                raise DataError(f"{column.name} has {column.shape[0]} rows, the features have {self.num_nodes}")
        for column in self.masks.values():
            if len(column.shape) != 1:
                raise DataError(f"{column.name} has shape {column.shape}; choose one split, a mask of one dimension")
        for column in (self.src, self.dst, self.weights):
            if column is not None and column.shape[0] != self.num_edges:
                raise DataError(f"{column.name} has {column.shape[0]} rows, {self.src.name} has {self.num_edges}")

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
        return self.src.shape[0]

    @property
    def has_weights(self) -> bool:
        """Whether edges have a weight."""
        return self.weights is not None

    @property
    def label_width(self) -> int:
        """Classes of a multi-label task, else 0."""
        shape = (0,) if self.labels is None else self.labels.shape
        return shape[1] if len(shape) == 2 and shape[1] > 1 else 0

    def identity(self) -> list[dict[str, Any]]:
        """What the columns were made from."""
        return self.inputs

    def ids(self, rows: int) -> Iterator[IdChunk]:
        """The node ids, if they are not row numbers."""
        at = 0
        for ids in self.node_ids.chunks(rows) if self.node_ids is not None else ():
            assert self.node_ids is not None
            yield IdChunk(where=self.node_ids.name, first_row=at, ids=_integers(self.node_ids.name, ids))
            at += len(ids)

    def nodes(self, rows: int) -> Iterator[NodeChunk]:
        """Features, labels and masks, side by side."""
        labels = self.labels.chunks(rows) if self.labels is not None else None
        masks = {split: column.chunks(rows) for split, column in self.masks.items()}
        at = 0
        for features in self.features.chunks(rows):
            label = next(labels) if labels is not None else None
            if label is not None and label.ndim == 2 and not self.label_width:
                label = label[:, 0]
            parts = {split: next(chunks).astype(bool) for split, chunks in masks.items()}
            yield NodeChunk(
                where=self.features.name,
                first_row=at,
                features=features,
                labels=label,
                splits=merge_masks(self.features.name, at, parts) if parts else None,
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
                src=_integers(self.src.name, src),
                dst=_integers(self.dst.name, next(dst_chunks)),
                weights=None if weight is None else weight.reshape(-1).astype(np.float32),
            )
            at += len(src)
        if at != self.num_edges:
            raise DataError(f"{self.src.name} has {at} rows, wanted {self.num_edges}")


def _integers(name: str, values: NDArray[Any]) -> NDArray[np.int64]:
    if values.dtype.kind not in "iu":
        raise DataError(f"{name} holds {values.dtype}; node ids are integers")
    return values.astype(np.int64)
