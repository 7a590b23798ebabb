"""Classes of single-label tasks: numbers 0..C-1 as they come, or any values, numbered on request.

A model has an output for every class up to the highest label, so numbers that do not occur cost weights and mean
nothing: gaps are said, and far too many outputs are refused. With `remap_labels` the values that occur are sorted and
numbered, and `classes.parquet` keeps which number is which value.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from penstock.storage.errors import DataError, full_disk_is_clear
from penstock.storage.graph import CLASSES_FILE
from penstock.storage.ingest.source import GraphSource, LabelChunk
from penstock.storage.ingest.values import UNKNOWN, string_array, whole_labels
from penstock.storage.manifest import FileEntry, checksum_file

logger = logging.getLogger(__name__)

_MAX_CLASSES = 1 << 24  # 16 M outputs of 256 hidden values are 16 GiB of weights, and as much for each moment
_MAX_SPARSE = 1 << 16  # below that outputs without a class are cheap, whatever their share
_MAX_VALUES = 1 << 20  # different values of labels that are held in memory
_REMEDY = "number those that occur with --set remap_labels=true"


class Occurring:
    """Which numbers occur as labels."""

    def __init__(self) -> None:
        self._seen = np.zeros(0, bool)

    @property
    def num_classes(self) -> int:
        """One more than the highest label."""
        return len(self._seen)

    def add(self, chunk: LabelChunk, labels: NDArray[np.int64]) -> None:
        """Take labels; DataError names the first that is below -1 or too high for a class."""
        low, high = int(labels.min(initial=UNKNOWN)), int(labels.max(initial=UNKNOWN))
        if low < UNKNOWN or high >= _MAX_CLASSES:
            row = int(np.flatnonzero((labels < UNKNOWN) | (labels >= _MAX_CLASSES))[0])
            problem = (
                "below -1; give integers 0..C-1, -1 for unknown"
                if labels[row] < 0
                else f"too high for a class: a model has as many outputs; the limit is {_MAX_CLASSES - 1}"
            )
            raise DataError(
                f"{chunk.where}, row {chunk.first_row + row}: label {labels[row]} is {problem}, or {_REMEDY}"
            )
        if high >= len(self._seen):
            self._seen = np.concatenate([self._seen, np.zeros(high + 1 - len(self._seen), bool)])
        self._seen[labels[labels >= 0]] = True

    def judge(self) -> None:
        """Say that there are gaps; DataError where nearly all outputs of a model would be gaps."""
        wanted, there = self.num_classes, int(self._seen.sum())
        if wanted > _MAX_SPARSE and there * 16 < wanted:
            raise DataError(
                f"labels go up to {wanted - 1}, but only {there:,} of {wanted:,} classes occur: nearly all outputs of "
                f"a model would mean nothing; {_REMEDY}"
            )
        if there < wanted:
            gaps = np.flatnonzero(~self._seen)[:5].tolist()
            logger.warning(
                "%s of %s classes occur (there is no %s%s), and a model has outputs for all; if gaps mean nothing, %s",
                *(
                    f"{there:,}",
                    f"{wanted:,}",
                    ", ".join(map(str, gaps)),
                    " ..." if wanted - there > 5 else "",
                    _REMEDY,
                ),
            )


class ClassMap:
    """Numbers for the values of labels: their places among the sorted values."""

    def __init__(self, values: NDArray[np.int64] | list[str]) -> None:
        self._values = values
        self._places = {text: place for place, text in enumerate(values)} if isinstance(values, list) else {}

    def number(self, chunk: LabelChunk) -> NDArray[np.int64]:
        """Classes int64 [n], -1 where the label is missing."""
        if isinstance(self._values, list):
            encoded = _strings(chunk).dictionary_encode()
            places = [self._places[text] for text in encoded.dictionary.to_pylist()] + [UNKNOWN]
            codes: NDArray[Any] = encoded.indices.fill_null(len(places) - 1).to_numpy(zero_copy_only=False)
            numbers: NDArray[np.int64] = np.array(places, np.int64)[codes]
            return numbers
        labels = whole_labels(chunk)
        return np.where(labels == UNKNOWN, UNKNOWN, np.searchsorted(self._values, labels)).astype(np.int64)


def _is_text(chunk: LabelChunk) -> bool:
    return not isinstance(chunk.labels, np.ndarray) or chunk.labels.dtype.kind in "US"


def _strings(chunk: LabelChunk) -> pa.Array:
    """Strings of a chunk; a part in which every label is missing has them as numbers."""
    if _is_text(chunk):
        return string_array(chunk.labels) if isinstance(chunk.labels, np.ndarray) else chunk.labels
    if (whole_labels(chunk) != UNKNOWN).any():
        raise DataError(f"{chunk.where}: labels are numbers here and strings elsewhere; give one type")
    return pa.nulls(len(chunk.labels), pa.string())


def write_classes(source: GraphSource, out: Path, rows: int) -> tuple[dict[str, Any], tuple[FileEntry, ...]]:
    """Write the sorted values of the labels as `classes.parquet`; reports the number of classes and their kind."""
    if source.label_width:
        raise DataError("labels are lists of 0 and 1, which need no numbers; drop remap_labels")
    numbers, texts = np.zeros(0, np.int64), set[str]()
    is_text = False
    for chunk in source.labels(rows):
        is_text = is_text or _is_text(chunk)
        if is_text:
            texts.update(text for text in _strings(chunk).unique().to_pylist() if text is not None)
        else:
            numbers = np.union1d(numbers, whole_labels(chunk))
        if max(len(numbers), len(texts)) > _MAX_VALUES:
            raise DataError(
                f"{chunk.where}: labels have more than {_MAX_VALUES:,} different values; choose a label column that "
                "holds classes"
            )
    numbers = numbers[numbers != UNKNOWN]
    if is_text and len(numbers):
        raise DataError("labels are numbers in some files and strings in others; give one type")
    if not is_text and not len(numbers):
        raise DataError("no node has a label, so remap_labels has nothing to number; drop it")
    path = out / CLASSES_FILE
    values = pa.array(sorted(texts), pa.string()) if is_text else pa.array(numbers, pa.int64())
    with full_disk_is_clear(path):
        pq.write_table(pa.table({"class": values}), path)
    kind = "string" if is_text else "int64"
    entry = FileEntry(
        name=path.name, bytes=path.stat().st_size, dtype=kind, shape=(len(values),), xxh3=checksum_file(path)
    )
    return {"num_classes": len(values), "kind": kind}, (entry,)


def read_classes(out: Path) -> ClassMap:
    """The mapping that `write_classes` wrote."""
    column = pq.read_table(out / CLASSES_FILE).column("class")
    return ClassMap(column.to_numpy() if pa.types.is_integer(column.type) else column.to_pylist())
