"""Write the arrays of one part as its pieces come: see `penstock.storage.chunks` for the layout.

Halos are known only when all pieces have come, and a writer of `.npy` wants to know its length before; until then they
lie in scratch files.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.sampler.chunking.gather import check_local
from penstock.sampler.chunking.pieces import Linked, Pieces, Slabs
from penstock.storage.chunks import EDGES, HALO, OWN, SENDS
from penstock.storage.errors import full_disk_is_clear
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import FileEntry, fsync_folder
from penstock.storage.npyfile import NpyWriter, write_npy


def _degrees(graph: GraphStore, ids: NDArray[Any]) -> NDArray[np.int32]:
    degrees = graph.indptr[ids + np.int64(1)] - graph.indptr[ids]
    return np.asarray(np.minimum(degrees, np.iinfo(np.int32).max), np.int32)


class PartWriter:
    """Takes a part's pieces in order, then `finish`. A context manager that closes and drops its scratch files."""

    def __init__(self, folder: Path, graph: GraphStore, pieces: Pieces, part: int) -> None:
        folder.mkdir()
        self._folder, self._graph, self._pieces, self._part = folder, graph, pieces, part
        num_chunks, first = pieces.num_chunks, part * pieces.num_chunks
        self._starts = pieces.starts[first : first + num_chunks + 1]
        self._edges = int(pieces.edges[first : first + num_chunks].sum())
        self._sizes = np.zeros((num_chunks, 4), np.int64)
        self._sizes[:, OWN] = np.diff(self._starts)
        self._halo_offsets = np.zeros((num_chunks, num_chunks + 1), np.int64)
        self._wires: list[list[NDArray[np.int64]]] = []
        self._stack = ExitStack()
        self._writers: list[NpyWriter] = []

    def __enter__(self) -> "PartWriter":
        graph, num_own, num_chunks = self._graph, int(self._starts[-1] - self._starts[0]), self._pieces.num_chunks
        self._scratch = [self._folder / name for name in (".halo.bin", ".rows.bin")]
        with full_disk_is_clear(self._folder):
            self._files = [self._stack.enter_context(open(path, "w+b")) for path in self._scratch]
        self._node_ids = self._open("node_ids", np.int64, num_own)
        self._indptr = self._open("indptr", np.int32, num_own + num_chunks)
        self._indices = self._open("indices", np.int32, self._edges)
        self._weights = self._open("edge_weights", np.float32, self._edges) if graph.meta.has_edge_weights else None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)
        for path in self._scratch:
            path.unlink(missing_ok=True)

    def _open(self, name: str, dtype: Any, rows: int) -> NpyWriter:
        writer = NpyWriter(self._folder / f"{name}.npy", dtype, (rows,))
        self._writers.append(writer)
        return self._stack.enter_context(writer)

    def append(self, linked: Linked, wires: list[NDArray[np.int64]], weights: NDArray[np.float32] | None) -> None:
        """Add the next piece: its links, per part the own rows it mirrors, and the weights of its edges."""
        chunk = len(self._wires)
        own = self._pieces.own(self._part, chunk)
        check_local(len(own) + len(linked.halo), "rows", self._pieces, self._part * self._pieces.num_chunks + chunk)
        self._node_ids.append(own)
        ends = np.cumsum(self._graph.indptr[own + np.int64(1)] - self._graph.indptr[own])
        self._indptr.append(np.concatenate([[0], ends]))
        self._indices.append(linked.indices)
        if self._weights is not None and weights is not None:
            self._weights.append(weights)
        with full_disk_is_clear(self._folder):
            self._files[0].write(linked.halo.astype(np.int64).data)
            self._files[1].write(linked.slab_rows.data)
            for file in self._files:
                file.flush()  # here, where a full disk is told apart
        self._sizes[chunk, HALO], self._sizes[chunk, EDGES] = len(linked.halo), len(linked.indices)
        self._halo_offsets[chunk] = linked.offsets
        self._wires.append(wires)

    def _halo(self, file: int, dtype: Any, first: int, count: int) -> NDArray[Any]:
        """Read back `count` entries of a scratch file."""
        self._files[file].seek(first * np.dtype(dtype).itemsize)
        return np.frombuffer(self._files[file].read(count * np.dtype(dtype).itemsize), dtype)

    def _write_halos(self) -> None:
        total = int(self._sizes[:, HALO].sum())
        halo_ids = self._open("halo_ids", np.int64, total)
        degrees = self._open("degrees", np.int32, total + int(self._sizes[:, OWN].sum()))
        at = 0
        for chunk, count in enumerate(self._sizes[:, HALO].tolist()):
            ids = self._halo(0, np.int64, at, count)
            halo_ids.append(ids)
            degrees.append(_degrees(self._graph, self._pieces.own(self._part, chunk)))
            degrees.append(_degrees(self._graph, ids))
            at += count

    def _write_sends(self) -> list[FileEntry]:
        runs = np.diff(self._halo_offsets, axis=1).T  # [writer, reader]
        self._sizes[:, SENDS] = runs.sum(axis=1)
        offsets = np.zeros_like(self._halo_offsets)
        np.cumsum(runs, axis=1, out=offsets[:, 1:])
        before = np.cumsum(self._sizes[:, HALO]) - self._sizes[:, HALO]
        send_rows = self._open("send_rows", np.int32, int(runs.sum()))
        for writer, counts in enumerate(runs.tolist()):
            for reader, count in enumerate(counts):
                first = int(before[reader] + self._halo_offsets[reader, writer])
                send_rows.append(self._halo(1, np.int32, first, count))
        return [self._write("send_offsets", offsets), self._write("halo_offsets", self._halo_offsets)]

    def _write_wires(self) -> list[FileEntry]:
        counts = np.array([[len(rows) for rows in wires] for wires in self._wires], np.int64)
        offsets = np.zeros((len(counts), counts.shape[1] + 1), np.int64)
        np.cumsum(counts, axis=1, out=offsets[:, 1:])
        rows = np.concatenate([rows for wires in self._wires for rows in wires]).astype(np.int32)
        return [self._write("wire_rows", rows), self._write("wire_offsets", offsets)]

    def _write(self, name: str, array: NDArray[Any]) -> FileEntry:
        return write_npy(self._folder / f"{name}.npy", array)

    def finish(self, slabs: Slabs) -> list[FileEntry]:
        """Write what depends on all pieces, close the files, and return their entries, named from the folder above."""
        self._write_halos()
        entries = self._write_sends() + self._write_wires()
        entries += [self._write("sizes", self._sizes), self._write("mirror_counts", slabs.mirrors)]
        self._stack.close()
        for writer in self._writers:
            assert writer.entry is not None
            entries.append(writer.entry)
        fsync_folder(self._folder)
        return [replace(entry, name=f"{self._folder.name}/{entry.name}") for entry in entries]
