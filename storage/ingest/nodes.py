"""The node table: features, labels and splits, checked and written in one pass."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.rng import fold
from penstock.kernels.synthetic import draw_splits
from penstock.storage.errors import DataError, full_disk_is_clear
from penstock.storage.graph import FEATURES, SPLITS, Split, id_dtype
from penstock.storage.ingest.options import IngestOptions
from penstock.storage.ingest.source import SPLIT_CODES, GraphSource, NodeChunk
from penstock.storage.manifest import FileEntry
from penstock.storage.npyfile import NpyWriter, drop_pages, open_npy
from penstock.storage.progress import Progress
from penstock.storage.rows import RowFormat, encode_rows

_MAX_ROWS = 1 << 16
_CODES = "splits.int8"
_UNKNOWN = -1


def finite_rows(chunk: NodeChunk, width: int) -> NDArray[np.float32]:
    """Cast features to float32; DataError names row, column and value of the first that is not finite."""
    if chunk.features.ndim != 2 or chunk.features.shape[1] != width:
        raise DataError(
            f"{chunk.where}, row {chunk.first_row}: features have shape {chunk.features.shape[1:]}, the first rows "
            f"have {width} columns; give every node as many"
        )
    with np.errstate(over="ignore"):  # what overflows is Inf, and refused below
        rows = np.ascontiguousarray(chunk.features, dtype=np.float32)
    finite = np.isfinite(rows)
    if not finite.all():
        row, column = np.argwhere(~finite)[0].tolist()
        raise DataError(
            f"{chunk.where}, row {chunk.first_row + row}: feature {column} is {chunk.features[row, column]}, "
            "not a finite float32; fill or drop it"
        )
    return rows


def class_labels(chunk: NodeChunk) -> NDArray[np.int64]:
    """Labels as int64, -1 where null or NaN; DataError for fractions and other negative numbers."""
    labels = chunk.labels
    assert labels is not None
    if labels.dtype.kind == "f":
        known = ~np.isnan(labels)
        fraction = np.flatnonzero(known & (labels != np.rint(labels)))
        if len(fraction):
            row = int(fraction[0])
            raise DataError(f"{chunk.where}, row {chunk.first_row + row}: label {labels[row]} is no whole number")
        labels = np.where(known, labels, _UNKNOWN)
    if labels.dtype.kind not in "iufb":
        raise DataError(f"{chunk.where}: labels are of type {labels.dtype}; give integers 0..C-1, -1 for unknown")
    whole = labels.astype(np.int64)
    low = np.flatnonzero(whole < _UNKNOWN)
    if len(low):
        row = int(low[0])
        raise DataError(
            f"{chunk.where}, row {chunk.first_row + row}: label {int(whole[row])} is below -1; "
            "give integers 0..C-1, -1 for unknown"
        )
    return whole


def class_flags(chunk: NodeChunk) -> NDArray[np.uint8]:
    """Multi-label flags as uint8; DataError for anything but 0 and 1."""
    labels = chunk.labels
    assert labels is not None
    wrong = np.argwhere((labels != 0) & (labels != 1))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise DataError(
            f"{chunk.where}, row {chunk.first_row + row}: class {column} has label {labels[row, column]}; "
            "a list of labels holds 0 or 1 for every class"
        )
    return labels.astype(np.uint8)


class NodeStep:
    """Writes everything but the topology. `host_memory` bounds its chunks."""

    def __init__(
        self, source: GraphSource, options: IngestOptions, out: Path, work: Path, host_memory: int, progress: Progress
    ) -> None:
        self.source, self.options, self.out, self.work, self.progress = source, options, out, work, progress
        # a row lives at once as read (up to 8 bytes a value), as float32, as a mask, and encoded with temporaries
        row_bytes = 24 * source.num_features + 64 + 16 * source.label_width
        self.rows = max(1, min(_MAX_ROWS, host_memory // 4 // row_bytes))
        self.id_rows = max(1, min(1 << 20, host_memory // 64))

    def run(self) -> tuple[dict[str, Any], tuple[FileEntry, ...]]:
        """Write features, labels and splits; the number reported is `num_classes`."""
        num_classes, entries = self._write_tables()
        if self.options.split_fractions is not None:
            self._draw_splits(self.options.split_fractions)
        for split, column in self.source.split_ids.items():
            self._mark(split, column)
        return {"num_classes": num_classes}, entries + tuple(self._write_split(split, num_classes) for split in SPLITS)

    def _codes(self, mode: str) -> NDArray[np.int8]:
        return np.memmap(self.work / _CODES, np.int8, mode=mode, shape=(self.source.num_nodes,))  # type: ignore[call-overload,no-any-return]

    def _write_tables(self) -> tuple[int, tuple[FileEntry, ...]]:
        source, num_nodes, top = self.source, self.source.num_nodes, -1
        row_format = RowFormat(dtype=self.options.feature_dtype, width=source.num_features)
        label_shape = (num_nodes, source.label_width) if source.label_width else (num_nodes,)
        shape = (num_nodes, row_format.array_width)
        features = NpyWriter(self.out / FEATURES, row_format.array_dtype, shape, blocks=True)
        labels = NpyWriter(self.out / "labels.npy", np.uint8 if source.label_width else np.int64, label_shape)
        done = 0
        with features, labels, open(self.work / _CODES, "wb") as codes:
            for chunk in source.nodes(self.rows):
                rows = finite_rows(chunk, source.num_features)
                features.append(self._encode(chunk, rows, row_format))
                label = self._labels(chunk)
                labels.append(label)
                top = max(top, int(label.max()))
                split = np.full(len(rows), -1, np.int8) if chunk.splits is None else chunk.splits
                with full_disk_is_clear(self.work):
                    codes.write(np.ascontiguousarray(split).data)
                done += len(rows)
                self.progress("ingest nodes", done, num_nodes, "rows")
        assert features.entry is not None and features.sums_entry is not None and labels.entry is not None
        return source.label_width or top + 1, (features.entry, features.sums_entry, labels.entry)

    def _encode(self, chunk: NodeChunk, rows: NDArray[np.float32], row_format: RowFormat) -> NDArray[Any]:
        try:
            return encode_rows(rows, row_format)
        except ValueError as error:
            row = int(np.argmax(np.abs(rows).max(axis=1)))
            raise DataError(f"{chunk.where}, row {chunk.first_row + row}: {error}") from error

    def _labels(self, chunk: NodeChunk) -> NDArray[Any]:
        if chunk.labels is None:
            return np.full(len(chunk.features), _UNKNOWN, np.int64)
        return class_flags(chunk) if self.source.label_width else class_labels(chunk)

    def _draw_splits(self, fractions: tuple[float, float, float]) -> None:
        codes = self._codes("r+")
        key = np.uint64(fold(np.uint64(0), np.uint64(self.options.split_seed)))
        for lo in range(0, len(codes), self.id_rows):
            hi = min(len(codes), lo + self.id_rows)
            if (codes[lo:hi] >= 0).any():
                raise DataError("the node table has splits already; drop split_fractions or the split column")
            draw_splits(key, *fractions, lo, hi, codes[lo:hi])

    def _mark(self, split: Split, column: Any) -> None:
        """Set the code of every listed row."""
        codes, first = self._codes("r+"), 0
        for ids in column.chunks(self.id_rows):
            bad = np.flatnonzero((ids < 0) | (ids >= len(codes)))
            if len(bad):
                raise DataError(
                    f"{column.name}, row {first + int(bad[0])}: node {int(ids[bad[0]])} is out of range; "
                    f"ids go from 0 to {len(codes) - 1}"
                )
            taken = np.flatnonzero((codes[ids] >= 0) & (codes[ids] != SPLIT_CODES[split]))
            if len(taken):
                raise DataError(
                    f"{column.name}, row {first + int(taken[0])}: node {int(ids[taken[0]])} is in two splits"
                )
            codes[ids] = SPLIT_CODES[split]
            first += len(ids)

    def _write_split(self, split: Split, num_classes: int) -> FileEntry:
        codes, labels = self._codes("r"), open_npy(self.out / "labels.npy")
        code, dtype = SPLIT_CODES[split], id_dtype(len(codes))
        starts = range(0, len(codes), self.id_rows)
        count = sum(int((codes[lo : lo + self.id_rows] == code).sum()) for lo in starts)
        check = self.source.label_width == 0 and num_classes > 0
        with NpyWriter(self.out / f"{split}_ids.npy", dtype, (count,)) as writer:
            for lo in starts:
                ids = np.flatnonzero(codes[lo : lo + self.id_rows] == code) + lo
                if check and len(unknown := ids[labels[ids] == _UNKNOWN]):
                    raise DataError(
                        f"node row {int(unknown[0])} is in split {split!r} and has no label; "
                        "label it or take it out of the split"
                    )
                writer.append(ids.astype(dtype))
                drop_pages(labels)
        assert writer.entry is not None
        return writer.entry
