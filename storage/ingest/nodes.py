"""The node table: features, labels and splits, checked and written in one pass."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.rng import fold
from penstock.kernels.synthetic import draw_splits
from penstock.storage.errors import DataError, full_disk_is_clear
from penstock.storage.graph import FEATURES, SPLITS, Split, id_dtype
from penstock.storage.ingest.classes import ClassMap, Occurring
from penstock.storage.ingest.ids import IdMap
from penstock.storage.ingest.normalise import Normaliser
from penstock.storage.ingest.options import IngestOptions
from penstock.storage.ingest.source import SPLIT_CODES, Column, GraphSource, NodeChunk
from penstock.storage.ingest.values import UNKNOWN, class_flags, finite_rows, first_rounded, integer_ids, whole_labels
from penstock.storage.manifest import FileEntry
from penstock.storage.npyfile import NpyWriter
from penstock.storage.progress import Progress
from penstock.storage.rows import RowFormat, encode_rows

logger = logging.getLogger(__name__)

_MAX_ROWS = 1 << 16
_CODES, _KNOWN = "splits.int8", "known.int8"


def chunk_rows(source: GraphSource, options: IngestOptions, host_memory: int) -> int:
    """Rows of the node table that may be in memory at once."""
    # a row lives at once as read (up to 8 bytes a value), as float32, as a mask, and encoded with temporaries
    value_bytes = 24 if options.feature_norm == "none" and options.feature_norm_from is None else 40
    row_bytes = value_bytes * source.num_features + 64 + 16 * source.label_width
    return max(1, min(_MAX_ROWS, host_memory // 4 // row_bytes))


class NodeStep:
    """Writes everything but the topology. `host_memory` bounds its chunks, `classes` numbers labels where given."""

    def __init__(
        self,
        source: GraphSource,
        options: IngestOptions,
        out: Path,
        work: Path,
        *,
        ids: IdMap,
        classes: ClassMap | None,
        normalise: Normaliser,
        host_memory: int,
        progress: Progress,
    ) -> None:
        self.source, self.options, self.out, self.work, self.progress = source, options, out, work, progress
        self.ids, self.classes, self.normalise = ids, classes, normalise
        self.occurring = Occurring()
        self.rows = chunk_rows(source, options, host_memory)
        self.id_rows = max(1, min(1 << 20, host_memory // 64))
        self._said_rounded = False

    def run(self) -> tuple[dict[str, Any], tuple[FileEntry, ...]]:
        """Write features, labels and splits; the number reported is `num_classes`."""
        entries = self._write_tables()
        if not self.source.label_width and self.classes is None:
            self.occurring.judge()
        if self.options.split_fractions is not None:
            self._draw_splits(self.options.split_fractions)
        for split, column in self.source.split_ids.items():
            self._mark(split, column)
        num_classes = self.source.label_width or self.occurring.num_classes
        splits = tuple(self._write_split(split, num_classes > 0) for split in SPLITS)
        self._name_empty({split: entry.shape[0] for split, entry in zip(SPLITS, splits, strict=True)})
        return {"num_classes": num_classes}, entries + splits

    def _per_node(self, name: str, mode: str = "r") -> NDArray[np.int8]:
        return np.memmap(self.work / name, np.int8, mode=mode, shape=(self.source.num_nodes,))  # type: ignore[call-overload,no-any-return]

    def _write_tables(self) -> tuple[FileEntry, ...]:
        source, num_nodes = self.source, self.source.num_nodes
        row_format = RowFormat(dtype=self.options.feature_dtype, width=source.num_features)
        label_shape = (num_nodes, source.label_width) if source.label_width else (num_nodes,)
        shape = (num_nodes, row_format.array_width)
        features = NpyWriter(self.out / FEATURES, row_format.array_dtype, shape, blocks=True)
        labels = NpyWriter(self.out / "labels.npy", np.uint8 if source.label_width else np.int64, label_shape)
        done = 0
        with features, labels, open(self.work / _CODES, "wb") as codes, open(self.work / _KNOWN, "wb") as knowns:
            for chunk in source.nodes(self.rows):
                features.append(self._features(chunk, row_format))
                label, known = self._labels(chunk)
                labels.append(label)
                split = np.full(len(known), -1, np.int8) if chunk.splits is None else chunk.splits
                with full_disk_is_clear(self.work):
                    codes.write(np.ascontiguousarray(split).data)
                    knowns.write(known.astype(np.int8).data)
                done += len(known)
                self.progress("ingest nodes", done, num_nodes, "rows")
        assert features.entry is not None and features.sums_entry is not None and labels.entry is not None
        return features.entry, features.sums_entry, labels.entry

    def _features(self, chunk: NodeChunk, row_format: RowFormat) -> NDArray[Any]:
        rows = finite_rows(chunk, self.source.num_features, nulls=self.options.null_features)
        if not self._said_rounded and (rounded := first_rounded(chunk, rows)):
            self._said_rounded = True
            logger.warning("%s, which float32 rounds: it holds whole numbers up to 16,777,216", rounded)
        rows = self.normalise(chunk, rows)
        try:
            return encode_rows(rows, row_format)
        except ValueError as error:
            row = int(np.argmax(np.abs(rows).max(axis=1)))
            raise DataError(f"{chunk.where}, row {chunk.first_row + row}: {error}") from error

    def _labels(self, chunk: NodeChunk) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Labels as they are stored, and which nodes have some."""
        if chunk.labels is None:
            unknown = np.full(len(chunk.features), UNKNOWN, np.int64)
            return unknown, unknown != UNKNOWN
        if self.source.label_width:
            return class_flags(chunk.labels)
        labels = whole_labels(chunk.labels) if self.classes is None else self.classes.number(chunk.labels)
        self.occurring.add(chunk.labels, labels)
        return labels, labels != UNKNOWN

    def _draw_splits(self, fractions: tuple[float, float, float]) -> None:
        """Draw among the nodes that have a label, or among all where none has."""
        if self.source.split_ids:
            raise DataError("the input has splits already; drop split_fractions or the files of ids")
        codes, known = self._per_node(_CODES, "r+"), self._per_node(_KNOWN)
        any_known = bool(known.any())
        key = np.uint64(fold(np.uint64(0), np.uint64(self.options.split_seed)))
        for lo in range(0, len(codes), self.id_rows):
            hi = min(len(codes), lo + self.id_rows)
            if (codes[lo:hi] >= 0).any():
                raise DataError("the node table has splits already; drop split_fractions or the split column")
            draw_splits(key, *fractions, lo, hi, codes[lo:hi])
            if any_known:
                codes[lo:hi][known[lo:hi] == 0] = -1

    def _mark(self, split: Split, column: Column) -> None:
        """Set the code of every listed node."""
        codes, first, marked = self._per_node(_CODES, "r+"), 0, 0
        for chunk in column.chunks(self.id_rows):
            rows = self.ids.lookup(integer_ids(column.name, first, chunk), column.name, first, "id")
            before = codes[rows]
            taken = np.flatnonzero((before >= 0) & (before != SPLIT_CODES[split]))
            if len(taken):
                row = int(taken[0])
                raise DataError(f"{column.name}, row {first + row}: node {int(chunk[row])} is in two splits")
            codes[rows] = SPLIT_CODES[split]
            marked += len(np.unique(rows[before < 0]))
            first += len(chunk)
        if marked < first:
            logger.warning("%s lists %s of its %s ids again; a node counts once", column.name, first - marked, first)

    def _write_split(self, split: Split, any_labels: bool) -> FileEntry:
        codes, known = self._per_node(_CODES), self._per_node(_KNOWN)
        code, dtype = SPLIT_CODES[split], id_dtype(len(codes))
        starts = range(0, len(codes), self.id_rows)
        count = sum(int((codes[lo : lo + self.id_rows] == code).sum()) for lo in starts)
        num_unknown, first_unknown = 0, -1
        with NpyWriter(self.out / f"{split}_ids.npy", dtype, (count,)) as writer:
            for lo in starts:
                ids = np.flatnonzero(codes[lo : lo + self.id_rows] == code) + lo
                if any_labels and len(unknown := ids[known[ids] == 0]):
                    num_unknown += len(unknown)
                    first_unknown = int(unknown[0]) if first_unknown < 0 else first_unknown
                writer.append(ids.astype(dtype))
        if num_unknown:
            self._judge_unknown(split, num_unknown, count, first_unknown)
        assert writer.entry is not None
        return writer.entry

    def _judge_unknown(self, split: Split, num_unknown: int, count: int, row: int) -> None:
        """Allow hidden labels where nothing is learned from them; a multi-label split hides all or none."""
        if split == "train" or (self.source.label_width and num_unknown < count):
            raise DataError(
                f"node row {row} is in split {split!r} and has no label (as {num_unknown:,} of {count:,} there); "
                "label it or take it out of the split"
            )
        logger.warning("%s of %s nodes of split %s have no label and are not scored", num_unknown, count, split)

    def _name_empty(self, sizes: dict[Split, int]) -> None:
        if empty := [split for split, size in sizes.items() if not size]:
            logger.warning(
                "no node is in split %s; give a split column, masks or ids, or draw them with --set "
                "split_fractions=0.6,0.2,0.2",
                ", ".join(empty),
            )
