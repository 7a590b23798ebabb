"""What ingest reads: a graph as chunks of nodes and edges, wherever it comes from.

`where` and `first_row` of a chunk name the table or file and the row its first entry has there, for messages.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from penstock.storage.graph import Split
from penstock.storage.ingest.inputs import Input

Ids: TypeAlias = NDArray[np.int64] | pa.Array  # integers, or an Arrow array of strings
Values: TypeAlias = NDArray[Any] | pa.Array  # numbers, NaN where missing, or an Arrow array of strings
SPLIT_CODES: dict[Split, int] = {"train": 0, "valid": 1, "test": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class IdChunk:
    """Ids of consecutive nodes."""

    where: str
    first_row: int
    ids: Ids


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelChunk:
    """Labels of consecutive nodes: numbers or strings [n], or numbers [n, C]."""

    where: str
    first_row: int
    labels: Values


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeChunk:
    """Consecutive nodes: `features` [n, F] numeric, `splits` int8 [n] of codes, -1 for none; `names` are the user's of
    the features, where each has one."""

    where: str
    first_row: int
    features: NDArray[Any]
    labels: LabelChunk | None
    splits: NDArray[np.int8] | None
    names: Sequence[str] = ()

    def feature_name(self, column: int) -> str:
        """What a message calls a feature."""
        return f"feature {self.names[column]!r}" if self.names else f"feature {column}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeChunk:
    """Consecutive edges by the user's ids, weights [n] as given; `names` are what `src` and `dst` are called there."""

    where: str
    first_row: int
    names: tuple[str, str]
    src: Ids
    dst: Ids
    weights: NDArray[Any] | None


class Column(Protocol):
    """An array that can be read front to back, more than once."""

    name: str
    shape: tuple[int, ...]

    def chunks(self, rows: int) -> Iterator[NDArray[Any]]:
        """Consecutive parts of `rows` rows each, the last may be shorter."""


class GraphSource(Protocol):
    """A graph that can be read front to back. All numbers are known before anything is read."""

    @property
    def kind(self) -> str:
        """What it is, for messages and the manifest."""

    @property
    def num_nodes(self) -> int:
        """N."""

    @property
    def num_features(self) -> int:
        """F."""

    @property
    def num_edges(self) -> int:
        """Rows of the edge table."""

    @property
    def has_weights(self) -> bool:
        """Whether edges have a weight."""

    @property
    def adds_inverse(self) -> bool:
        """Whether every edge stands for itself and its reverse."""

    @property
    def label_width(self) -> int:
        """0 for one class per node, C for a multi-label task."""

    @property
    def has_labels(self) -> bool:
        """Whether the node table has labels."""

    @property
    def text_labels(self) -> bool:
        """Whether labels are strings."""

    @property
    def split_ids(self) -> Mapping[Split, Column]:
        """Ids of the nodes of a split, where the node table does not say it."""

    @property
    def inputs(self) -> Sequence[Input]:
        """All that the graph is made from."""

    def ids(self, rows: int) -> Iterator[IdChunk]:
        """The node ids; nothing where they are row numbers."""

    def nodes(self, rows: int) -> Iterator[NodeChunk]:
        """The node table."""

    def labels(self, rows: int) -> Iterator[LabelChunk]:
        """The labels of the node table alone."""

    def edges(self, rows: int) -> Iterator[EdgeChunk]:
        """The edge table."""
