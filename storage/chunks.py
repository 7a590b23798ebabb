"""Chunks: the nodes of a graph in K logical chunks and W parts, each piece with its in-edges and its halo.

A folder has one subfolder per part, `part-000`, in which arrays are concatenated over the part's K chunks:

| file | dtype and shape | holds |
|---|---|---|
| `sizes.npy` | int64 [K, 4] | own nodes, halo rows, in-edges and send rows of each chunk |
| `node_ids.npy` | int64 [own] | node ids of the graph store, ascending within a chunk: the permutation |
| `halo_ids.npy` | int64 [halo] | node ids by writer chunk, within a writer by its slab row |
| `indptr.npy` | int32 [own + K] | per chunk CSC offsets that start at 0 |
| `indices.npy` | int32 [E] | local source ids: own rows first, then halo rows |
| `edge_weights.npy` | float32 [E], optional | one weight per edge |
| `degrees.npy` | int32 [own + halo] | per chunk in-degrees in the whole graph: own rows, then halo rows |
| `halo_offsets.npy` | int64 [K, K+1] | where each writer's rows begin in a chunk's halo |
| `send_rows.npy` | int32 [sends] | slab rows that readers want, by reader |
| `send_offsets.npy` | int64 [K, K+1] | where each reader's rows begin |
| `wire_rows.npy` | int32 [wire] | own rows that other parts mirror, by part |
| `wire_offsets.npy` | int64 [K, W+1] | where each part's rows begin |
| `mirror_counts.npy` | int64 [K, W] | mirror rows from each part |

The slab of a chunk is its own rows, then its mirrors: nodes of the same logical chunk in other parts that some chunk
of this part reads, by part, then by node id. Edges of a destination keep the order of the graph store. `chunks.json`
beside the manifest says what the folder was built from. Letters: N nodes, E edges, K chunks, W parts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.storage.errors import FormatError
from penstock.storage.manifest import MANIFEST, FileEntry, Manifest, read_manifest, validate_files, verify_once
from penstock.storage.npyfile import open_npy

FORMAT = "penstock/chunks"
VERSIONS = (1, 2)  # the manifest has a seal from 2 on
OWN, HALO, EDGES, SENDS = 0, 1, 2, 3  # columns of sizes.npy


def part_folder(part: int) -> str:
    """Name of a part's subfolder."""
    return f"part-{part:03d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMeta:
    """What the manifest says. `graph` is a fingerprint.

    `cut_edges` lie between logical chunks, `part_cut_edges` between parts. `alpha` is halo rows of all pieces over N,
    `part_alpha` mirror rows over N. `balance` is the largest piece over the mean piece, `part_balance` likewise.
    """

    graph: str
    num_nodes: int
    num_edges: int
    num_chunks: int
    num_parts: int
    method: str
    seed: int
    has_edge_weights: bool
    cut_edges: int
    part_cut_edges: int
    alpha: float
    part_alpha: float
    balance: float
    part_balance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The piece of logical chunk `index` that belongs to `part`; arrays are read-only views of memory maps.

    `node_ids` int64 [own], `halo_ids` int64 [halo], `indptr` int32 [own+1], `indices` int32 [E] in [0, own + halo),
    `edge_weights` float32 [E], `degrees` int32 [own + halo], `halo_offsets` and `send_offsets` int64 [K+1], `send_rows`
    int32 [sends] in [0, slab), `wire_rows` per part int32 in [0, own), `mirror_counts` int64 [W].
    """

    index: int
    part: int
    node_ids: NDArray[np.int64]
    halo_ids: NDArray[np.int64]
    indptr: NDArray[np.int32]
    indices: NDArray[np.int32]
    edge_weights: NDArray[np.float32] | None
    degrees: NDArray[np.int32]
    halo_offsets: NDArray[np.int64]
    send_rows: NDArray[np.int32]
    send_offsets: NDArray[np.int64]
    wire_rows: tuple[NDArray[np.int32], ...]
    mirror_counts: NDArray[np.int64]

    @property
    def num_own(self) -> int:
        """Nodes of the piece."""
        return len(self.node_ids)

    @property
    def num_halo(self) -> int:
        """In-neighbours outside the piece, each once."""
        return len(self.halo_ids)

    @property
    def num_slab(self) -> int:
        """Own rows and mirrors."""
        return len(self.node_ids) + int(self.mirror_counts.sum())

    @property
    def num_sends(self) -> int:
        """Rows that the piece writes into the runs of its readers."""
        return len(self.send_rows)


class PartChunks:
    """The chunks of one part. Nothing is read until it is used; a file is verified when a process first maps it."""

    def __init__(self, path: Path, part: int, store: "ChunkStore") -> None:
        self.path, self.part, self.meta, self._store = path, part, store.meta, store
        self._maps: dict[str, NDArray[Any]] = {}
        self._sizes = np.array(self._map("sizes"))
        starts = np.zeros((self.meta.num_chunks + 1, 4), np.int64)
        np.cumsum(self._sizes, axis=0, out=starts[1:])
        self._starts = starts
        wires = np.array(self._map("wire_offsets"))
        self._wire_starts = np.concatenate([[0], np.cumsum(wires[:, -1])])

    def _map(self, name: str) -> NDArray[Any]:
        found = self._maps.get(name)
        if found is None:
            self._store.verify(f"{self.path.name}/{name}.npy")
            found = self._maps[name] = open_npy(self.path / f"{name}.npy").view(np.ndarray)
        return found

    @property
    def num_chunks(self) -> int:
        """K."""
        return self.meta.num_chunks

    @property
    def num_own(self) -> int:
        """Nodes of the part."""
        return int(self._starts[-1, OWN])

    @property
    def own_sizes(self) -> NDArray[np.int64]:
        """Own rows per chunk, int64 [K]."""
        return self._sizes[:, OWN]

    @property
    def halo_sizes(self) -> NDArray[np.int64]:
        """Halo rows per chunk, int64 [K]."""
        return self._sizes[:, HALO]

    @property
    def edge_sizes(self) -> NDArray[np.int64]:
        """In-edges per chunk, int64 [K]."""
        return self._sizes[:, EDGES]

    @cached_property
    def mirror_counts(self) -> NDArray[np.int64]:
        """Mirror rows per chunk and part, int64 [K, W]."""
        return np.array(self._map("mirror_counts"))

    @cached_property
    def slab_sizes(self) -> NDArray[np.int64]:
        """Own and mirror rows per chunk, int64 [K]."""
        return np.asarray(self._sizes[:, OWN] + self.mirror_counts.sum(axis=1))

    @cached_property
    def run_sizes(self) -> NDArray[np.int64]:
        """Rows of chunk c that chunk d reads, int64 [K, K] at (c, d)."""
        return np.diff(np.array(self._map("send_offsets")), axis=1)

    @property
    def node_ids(self) -> NDArray[np.int64]:
        """Node ids of all own rows in chunk order, int64 [num_own]."""
        return self._map("node_ids")

    def chunk(self, index: int) -> Chunk:
        """View one chunk; IndexError outside 0..K-1."""
        if not 0 <= index < self.num_chunks:
            raise IndexError(f"chunk {index} of {self.num_chunks}")
        (own, halo, edges, sends), (own_end, halo_end, edges_end, sends_end) = self._starts[index : index + 2].tolist()
        offsets, wire_start = self._map("wire_offsets")[index].tolist(), int(self._wire_starts[index])
        wires = self._map("wire_rows")
        weights = self._map("edge_weights")[edges:edges_end] if self.meta.has_edge_weights else None
        return Chunk(
            index=index,
            part=self.part,
            node_ids=self._map("node_ids")[own:own_end],
            halo_ids=self._map("halo_ids")[halo:halo_end],
            indptr=self._map("indptr")[own + index : own_end + index + 1],
            indices=self._map("indices")[edges:edges_end],
            edge_weights=weights,
            degrees=self._map("degrees")[own + halo : own_end + halo_end],
            halo_offsets=self._map("halo_offsets")[index],
            send_rows=self._map("send_rows")[sends:sends_end],
            send_offsets=self._map("send_offsets")[index],
            wire_rows=tuple(
                wires[wire_start + offsets[p] : wire_start + offsets[p + 1]] for p in range(self.meta.num_parts)
            ),
            mirror_counts=self.mirror_counts[index],
        )

    def scatter_back(self, rows: NDArray[Any], out: NDArray[Any]) -> None:
        """Undo the permutation: put rows [num_own, ...] in chunk order to their node ids in out [N, ...]."""
        if len(rows) != self.num_own:
            raise ValueError(f"{len(rows)} rows for the {self.num_own} nodes of part {self.part}")
        for lo, hi in zip(self._starts[:-1, OWN].tolist(), self._starts[1:, OWN].tolist(), strict=True):
            out[self.node_ids[lo:hi]] = rows[lo:hi]


class ChunkStore:
    """A published folder of chunks."""

    def __init__(self, path: Path, manifest: Manifest, meta: ChunkMeta) -> None:
        self.path, self.manifest, self.meta = path, manifest, meta

    @property
    def fingerprint(self) -> str:
        """A digest of the content: of the checksums in the manifest."""
        text = "".join(f"{entry.name}:{entry.xxh3};" for entry in sorted(self.manifest.files, key=lambda f: f.name))
        return str(xxhash.xxh3_64_hexdigest(text.encode()))

    def part(self, part: int) -> PartChunks:
        """Open one part; IndexError outside 0..W-1."""
        if not 0 <= part < self.meta.num_parts:
            raise IndexError(f"part {part} of {self.meta.num_parts}")
        return PartChunks(self.path / part_folder(part), part, self)

    def verify(self, name: str) -> None:
        """Compare a file with its checksum, once per process; FormatError where it differs.

        The folder is then taken back: without its manifest it is cut again by the step that makes it.
        """
        try:
            verify_once(
                self.path / name, self.manifest.file(name), "run the same command again: it cuts the graph anew"
            )
        except FormatError:
            (self.path / MANIFEST).unlink(missing_ok=True)
            raise

    def scatter_back(self, rows: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Undo the permutation: rows [num_own, ...] of every part, in chunk order, to rows [N, ...] by node id."""
        if len(rows) != self.meta.num_parts:
            raise ValueError(f"rows of {len(rows)} parts for {self.meta.num_parts}")
        out = np.empty((self.meta.num_nodes, *rows[0].shape[1:]), rows[0].dtype)
        for part, own in enumerate(rows):
            self.part(part).scatter_back(own, out)
        return out


def chunk_manifest(meta: ChunkMeta, files: tuple[FileEntry, ...]) -> Manifest:
    """Make the manifest that publishes a folder of chunks."""
    return Manifest(format=FORMAT, version=VERSIONS[-1], meta=asdict(meta), files=files)


def open_chunks(path: Path | str) -> ChunkStore:
    """Open a folder of chunks; FormatError where it is not one, is incomplete or has files of other sizes."""
    path = Path(path)
    manifest = read_manifest(path, FORMAT, VERSIONS)
    names = {field.name for field in fields(ChunkMeta)}
    if set(manifest.meta) != names:
        raise FormatError(f"{path}: chunk meta has keys {sorted(manifest.meta)}, wanted {sorted(names)}")
    validate_files(path, manifest, checksums=False)
    return ChunkStore(path, manifest, ChunkMeta(**manifest.meta))


def validate_chunks(path: Path | str) -> None:
    """Check every file against the manifest and the sizes of arrays against each other; FormatError names the first."""
    store = open_chunks(path)
    validate_files(store.path, store.manifest)
    meta, own, edges = store.meta, 0, 0
    for part in map(store.part, range(meta.num_parts)):
        own, edges = own + part.num_own, edges + int(part.edge_sizes.sum())
        halo_runs = np.diff(np.array(open_npy(part.path / "halo_offsets.npy")), axis=1)
        if not np.array_equal(halo_runs.T, part.run_sizes):
            raise FormatError(f"{part.path}: rows sent and rows of halos differ in number; rebuild {path}")
    if (own, edges) != (meta.num_nodes, meta.num_edges):
        raise FormatError(
            f"{path} has {own} nodes and {edges} edges, its manifest says {meta.num_nodes} and {meta.num_edges}; "
            "rebuild the folder"
        )
