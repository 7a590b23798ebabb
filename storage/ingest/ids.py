"""From the user's ids to dense ones.

Ids that are 0..N-1 in order need no mapping. All others become 64-bit keys: integers through a bijection, strings
through xxh3-64. Both are spread evenly, so an external distribution sort by the top bits has even buckets. The sorted
keys lie on disk, and edges are joined with them chunk by chunk: a chunk is sorted, then both are walked once.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from penstock.kernels.csc import join_sorted, mix_keys
from penstock.storage.errors import DataError, full_disk_is_clear
from penstock.storage.graph import ORIGINAL_IDS_GROUP, id_dtype
from penstock.storage.ingest.source import GraphSource, IdChunk, Ids
from penstock.storage.ingest.spill import BucketWriter, Sorter, bucket_bits
from penstock.storage.manifest import FileEntry, checksum_file
from penstock.storage.npyfile import NpyWriter, drop_pages

_KEYS, _ROWS = "ids.keys", "ids.rows"
_KEY_BITS = 64


class IdMap(Protocol):
    """Turns the user's ids into rows of the node table."""

    def lookup(self, ids: Ids, where: str, first_row: int, name: str) -> NDArray[np.int64]:
        """Rows [n]; DataError names the first id that no node has."""


def _type_name(ids: Ids) -> str:
    return "integer" if isinstance(ids, np.ndarray) else "string"


class DenseIds:
    """Ids that are rows."""

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    def lookup(self, ids: Ids, where: str, first_row: int, name: str) -> NDArray[np.int64]:
        """Check the range and return the ids."""
        if not isinstance(ids, np.ndarray):
            raise DataError(f"{where}: {name} holds strings, the node ids are integers; give both the same type")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self._num_nodes):
            bad = int(np.flatnonzero((ids < 0) | (ids >= self._num_nodes))[0])
            raise DataError(
                f"{where}, row {first_row + bad}: {name}={int(ids[bad])} is no node; ids go from 0 to "
                f"{self._num_nodes - 1}: add the node to the node table or drop this row"
            )
        return ids


class MappedIds:
    """Sorted keys on disk, with the row of each."""

    def __init__(self, folder: Path, num_nodes: int, kind: str) -> None:
        self._keys = np.memmap(folder / _KEYS, np.uint64, mode="r")
        self._rows = np.memmap(folder / _ROWS, id_dtype(num_nodes), mode="r")
        self._kind = "string" if kind == "string" else "integer"

    def lookup(self, ids: Ids, where: str, first_row: int, name: str) -> NDArray[np.int64]:
        """Sort the ids' keys and walk them along the sorted keys."""
        if _type_name(ids) != self._kind:
            raise DataError(
                f"{where}: {name} holds {_type_name(ids)}s, the node ids are {self._kind}s; give both the same type"
            )
        keys = id_keys(ids)
        order = np.argsort(keys)
        found = np.empty(len(keys), np.int64)
        join_sorted(self._keys, keys[order], 0, found)
        missing = order[found < 0]
        if len(missing):
            row = int(missing.min())
            value = int(ids[row]) if self._kind == "integer" else ids[row].as_py()
            raise DataError(
                f"{where}, row {first_row + row}: {name}={value!r} is in no row of the node table; "
                "add the node or drop this row"
            )
        rows = np.empty(len(keys), np.int64)
        rows[order] = self._rows[found]
        drop_pages(self._keys)
        drop_pages(self._rows)
        return rows


def id_keys(ids: Ids) -> NDArray[np.uint64]:
    """Keys uint64 [n] of ids; equal ids have equal keys, and different integers different ones."""
    if isinstance(ids, np.ndarray):
        out = np.empty(len(ids), np.uint64)
        mix_keys(ids, out)
        return out
    encoded = ids.dictionary_encode()  # hash every distinct string of the chunk once
    texts = encoded.dictionary.to_pylist()
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(text.encode()) for text in texts), np.uint64, len(texts))
    keys: NDArray[np.uint64] = hashes[encoded.indices.to_numpy(zero_copy_only=False)]
    return keys


def _is_dense(source: GraphSource) -> bool:
    at = 0
    for chunk in source.ids(ORIGINAL_IDS_GROUP):
        ids = chunk.ids
        if not isinstance(ids, np.ndarray) or not np.array_equal(ids, np.arange(at, at + len(ids))):
            return False
        at += len(ids)
    return True


def write_ids(
    source: GraphSource, out: Path, work: Path, host_memory: int
) -> tuple[dict[str, str], tuple[FileEntry, ...]]:
    """Write the mapping into `work` and the originals into `out`; reports `kind`: `dense`, `int64` or `string`.

    DataError names the rows of the first id that occurs twice.
    """
    if _is_dense(source):
        return {"kind": "dense"}, ()
    chunks = source.ids(ORIGINAL_IDS_GROUP)
    first = next(chunks)
    all_chunks = chain([first], chunks)
    value_dtype = id_dtype(source.num_nodes)
    sorter = Sorter(host_memory // 2, value_dtype)
    split_bits = bucket_bits(source.num_nodes, sorter.capacity)
    with BucketWriter(work / "ids", 1 << split_bits, value_dtype) as writer:
        spilled = _spill(all_chunks, writer, _KEY_BITS - split_bits, value_dtype)
        if isinstance(first.ids, np.ndarray):
            kind, entry = "int64", _write_int_originals(spilled, out / "original_ids.npy", source.num_nodes)
        else:
            kind, entry = "string", _write_string_originals(spilled, out / "original_ids.parquet", source.num_nodes)
    with open(work / _KEYS, "wb") as keys_file, open(work / _ROWS, "wb") as rows_file:
        for bucket in writer.buckets:
            for keys, rows in sorter.runs(bucket, _KEY_BITS - split_bits):
                assert rows is not None
                _refuse_duplicates(source, keys, rows)
                with full_disk_is_clear(work):
                    keys_file.write(keys.data.cast("B"))
                    rows_file.write(rows.data.cast("B"))
            bucket.remove()  # a kill before the step is finished starts it over anyway
    return {"kind": kind}, (entry,)


def _spill(chunks: Iterator[IdChunk], writer: BucketWriter, shift: int, dtype: Any) -> Iterator[IdChunk]:
    """Pass chunks on, after their keys and rows have gone to the buckets."""
    at = 0
    for chunk in chunks:
        keys = id_keys(chunk.ids)
        writer.append(keys, shift, keys, np.arange(at, at + len(keys)).astype(dtype))
        at += len(keys)
        yield chunk


def _write_int_originals(chunks: Iterator[IdChunk], path: Path, num_nodes: int) -> FileEntry:
    with NpyWriter(path, np.int64, (num_nodes,)) as writer:
        for chunk in chunks:
            if not isinstance(chunk.ids, np.ndarray):
                raise DataError(f"{chunk.where}: node ids are strings here and integers before; give one type")
            writer.append(chunk.ids)
    assert writer.entry is not None
    return writer.entry


def _write_string_originals(chunks: Iterator[IdChunk], path: Path, num_nodes: int) -> FileEntry:
    """One row group per chunk would follow the input's files; fixed groups allow to find a row by division."""
    pending: list[pa.Array] = []
    schema = pa.schema([("id", pa.string())])

    def flush(writer: pq.ParquetWriter, whole: bool) -> None:
        rows = pa.concat_arrays(pending) if pending else pa.array([], pa.string())
        pending.clear()
        while len(rows) >= ORIGINAL_IDS_GROUP or (whole and len(rows)):
            writer.write_table(pa.table({"id": rows[:ORIGINAL_IDS_GROUP]}, schema=schema), ORIGINAL_IDS_GROUP)
            rows = rows[ORIGINAL_IDS_GROUP:]
        pending.append(rows)

    with full_disk_is_clear(path), pq.ParquetWriter(path, schema) as writer:
        for chunk in chunks:
            if isinstance(chunk.ids, np.ndarray):
                raise DataError(f"{chunk.where}: node ids are integers here and strings before; give one type")
            pending.append(chunk.ids)
            flush(writer, False)
        flush(writer, True)
    size = path.stat().st_size
    return FileEntry(name=path.name, bytes=size, dtype="string", shape=(num_nodes,), xxh3=checksum_file(path))


def _refuse_duplicates(source: GraphSource, keys: NDArray[np.uint64], rows: NDArray[Any]) -> None:
    same = np.flatnonzero(keys[1:] == keys[:-1])
    if not len(same):
        return
    first, second = sorted((int(rows[same[0]]), int(rows[same[0] + 1])))
    (place, value), (other_place, other) = _find_row(source, first), _find_row(source, second)
    if value == other:
        raise DataError(f"node id {value!r} occurs twice: {place} and {other_place}; remove or rename one")
    raise DataError(
        f"node ids {value!r} ({place}) and {other!r} ({other_place}) have the same 64-bit hash; rename one of them"
    )


def _find_row(source: GraphSource, row: int) -> tuple[str, int | str]:
    """Where a node stands in the input, and its id."""
    at = 0
    for chunk in source.ids(ORIGINAL_IDS_GROUP):
        if row < at + len(chunk.ids):
            value = chunk.ids[row - at]
            return f"{chunk.where}, row {chunk.first_row + row - at}", (
                int(value) if isinstance(chunk.ids, np.ndarray) else value.as_py()
            )
        at += len(chunk.ids)
    raise AssertionError(f"row {row} of {at}")
