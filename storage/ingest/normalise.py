"""Feature normalisation: `row` divides a row by the sum of its magnitudes, `standard` shifts and scales every column.

A row of zeros stays one. `standard` subtracts the mean and divides by the standard deviation (of the population, over
all nodes); a constant column becomes zeros. The constants are `feature_norm.npy` float64 [2, F], means, then
deviations, so that a graph that is scored later can be ingested with those of the graph that the model was trained on.

Means and squares are added up in blocks of rows that depend on F alone, about the first row, and merged as Chan, Golub
and LeVeque (1979) do: constants do not depend on the memory budget, and columns far from zero lose nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.storage.errors import DataError, FormatError
from penstock.storage.graph import NORM_FILE, FeatureNorm, open_graph
from penstock.storage.ingest.options import IngestOptions
from penstock.storage.ingest.source import GraphSource, NodeChunk
from penstock.storage.ingest.values import finite_rows
from penstock.storage.manifest import FileEntry
from penstock.storage.npyfile import NpyWriter, open_npy
from penstock.storage.progress import Progress

_BLOCK_VALUES = 1 << 18  # 2 MiB of float64


class Moments:
    """Mean and sum of squared differences of every column, of rows that come in any chunks."""

    def __init__(self, width: int) -> None:
        self._block_rows = max(1, min(1024, _BLOCK_VALUES // width))
        self._pending = np.empty((0, width), np.float32)
        self._pivot = np.empty((0, width))  # the first row, once there is one
        self._count, self._mean, self._squares = 0, np.zeros(width), np.zeros(width)

    def add(self, rows: NDArray[np.float32]) -> None:
        """Take rows [n, F]."""
        if not len(self._pivot):
            self._pivot = rows[:1].astype(np.float64)
        rows = np.concatenate([self._pending, rows]) if len(self._pending) else rows
        whole = len(rows) - len(rows) % self._block_rows
        for lo in range(0, whole, self._block_rows):
            self._merge(rows[lo : lo + self._block_rows])
        self._pending = rows[whole:].copy()

    def _merge(self, block: NDArray[np.float32]) -> None:
        values = block - self._pivot  # float64; zero throughout in a constant column
        mean = values.mean(axis=0)
        values -= mean
        total = self._count + len(block)
        change = mean - self._mean
        self._squares += np.einsum("ij,ij->j", values, values) + change**2 * (self._count * len(block) / total)
        self._mean += change * (len(block) / total)
        self._count = total

    def constants(self) -> NDArray[np.float64]:
        """Means and standard deviations [2, F]."""
        if len(self._pending):
            self._merge(self._pending)
            self._pending = self._pending[:0]
        return np.stack([self._pivot[0] + self._mean, np.sqrt(self._squares / self._count)])


class Normaliser:
    """Normalises rows; `constants` where the kind has some."""

    def __init__(self, kind: FeatureNorm, constants: NDArray[np.float64] | None) -> None:
        self._kind = kind
        if constants is not None:
            self._mean, self._scale = constants[0], np.where(constants[1] > 0, constants[1], 1.0)

    def __call__(self, chunk: NodeChunk, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """New rows float32; DataError names the first that has no finite value any more."""
        if self._kind == "none":
            return rows
        wide = rows.astype(np.float64)
        if self._kind == "row":
            sums = np.abs(wide).sum(axis=1, keepdims=True)
            wide /= np.where(sums > 0, sums, 1.0)
        else:
            wide -= self._mean
            wide /= self._scale
        with np.errstate(over="ignore"):
            out = wide.astype(np.float32)
        if not np.isfinite(out).all():
            row, column = np.argwhere(~np.isfinite(out))[0].tolist()
            raise DataError(
                f"{chunk.where}, row {chunk.first_row + row}: {chunk.feature_name(column)} is {rows[row, column]}, "
                f"which normalisation takes to {wide[row, column]:g}, beyond float32; drop or clip it"
            )
        return out


def choose_norm(options: IngestOptions) -> FeatureNorm:
    """The kind of normalisation; ValueError or FormatError where the graph to take it from cannot give it."""
    if options.feature_norm_from is None:
        return options.feature_norm
    given = open_graph(options.feature_norm_from).meta.feature_norm
    if given == "none":
        raise ValueError(f"feature_norm_from={options.feature_norm_from} has features as they came; drop the option")
    if "feature_norm" in options.model_fields_set and options.feature_norm != given:
        raise ValueError(
            f"feature_norm={options.feature_norm}, but feature_norm_from={options.feature_norm_from} has {given!r}; "
            "give the second only"
        )
    return given


def norm_identity(options: IngestOptions) -> str | None:
    """What the constants are taken from, by content."""
    return None if options.feature_norm_from is None else open_graph(options.feature_norm_from).norm_identity


def write_norm(
    source: GraphSource, options: IngestOptions, out: Path, rows: int, progress: Progress
) -> tuple[dict[str, Any], tuple[FileEntry, ...]]:
    """Write `feature_norm.npy` for `standard`: the constants of another graph, or of this one, read once for it."""
    if options.feature_norm_from is not None:
        constants = _given_constants(options.feature_norm_from, source.num_features)
    else:
        moments, done = Moments(source.num_features), 0
        for chunk in source.nodes(rows):
            moments.add(finite_rows(chunk, source.num_features, nulls=options.null_features))
            done += len(chunk.features)
            progress("measure features", done, source.num_nodes, "rows")
        constants = moments.constants()
    with NpyWriter(out / NORM_FILE, np.float64, constants.shape) as writer:
        writer.append(constants)
    assert writer.entry is not None
    return {}, (writer.entry,)


def _given_constants(path: Path, width: int) -> NDArray[np.float64]:
    graph = open_graph(path)
    graph.verify(NORM_FILE)
    constants: NDArray[np.float64] = np.array(open_npy(path / NORM_FILE))
    if constants.shape != (2, width):
        raise DataError(f"{path} has {constants.shape[1]} features, this graph has {width}; take the one it belongs to")
    return constants


def open_normaliser(kind: FeatureNorm, out: Path) -> Normaliser:
    """The normaliser of a store that is being built at `out`."""
    if kind != "standard":
        return Normaliser(kind, None)
    if not (out / NORM_FILE).is_file():
        raise FormatError(f"{out / NORM_FILE} is missing; delete the unfinished folder and start again")
    return Normaliser(kind, np.array(open_npy(out / NORM_FILE)))
