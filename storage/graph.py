"""The graph store: topology, features, labels and splits of one graph, as a folder of `.npy` files.

| file | dtype and shape | holds |
|---|---|---|
| `indptr.npy` | int64 [N+1] | CSC offsets: in-edges of node v are `indices[indptr[v]:indptr[v+1]]` |
| `indices.npy` | int32 or int64 [E] | in-neighbours (edge sources), ascending within a node |
| `features.npy` | row format, see `rows` [N, width] | node features |
| `features.sums.npy` | uint64 [blocks], from version 2 on | checksums of the table's blocks, see `blocks` |
| `labels.npy` | int64 [N], or uint8 [N, C] for multi-label | class per node, -1 (multi-label: 255) where unknown |
| `train_ids.npy`, `valid_ids.npy`, `test_ids.npy` | id dtype | split, ascending node ids |
| `edge_weights.npy` | float32 [E], optional | one weight per edge, in the order of `indices` |
| `original_ids.npy` | int64 [N], optional | the user's ids; absent where they are 0..N-1 |
| `classes.parquet` | column `class`, int64 or strings [C], optional | the label whose number is the row |
| `feature_norm.npy` | float64 [2, F], optional | mean and deviation that `standard` normalisation took |
| `original_ids.parquet` | column `id`, strings, in row groups of 65536 rows, optional | the user's ids, if strings |

Ids are int32 where N < 2^31, else int64. `manifest.json` (see `manifest`) has the meta keys of `GraphMeta`.

Nothing is used unverified: a file is compared with its checksum when a process first maps it, and rows of the feature
table are read in whole blocks, each compared with its own. Stores of version 1 have no checksums of blocks;
`seal_graph` adds them, and the fingerprint stays.
"""

import logging
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from penstock.storage.blocks import BlockDigest, BlockSums, read_block_sums
from penstock.storage.directio import IO_BYTES, PAGE
from penstock.storage.errors import FormatError
from penstock.storage.manifest import FileEntry, Manifest, read_manifest, validate_files, verify_once, write_manifest
from penstock.storage.npyfile import drop_pages, open_npy, write_npy
from penstock.storage.paths import AnyPath
from penstock.storage.progress import Progress, silent
from penstock.storage.rows import ROW_DTYPES, RowDtype, RowFormat

FORMAT = "penstock/graph"
VERSIONS = (1, 2)
FEATURES, FEATURE_SUMS = "features.npy", "features.sums.npy"
logger = logging.getLogger(__name__)
_UNSEALED: set[Path] = set()  # stores that the log has named
ORIGINAL_IDS_GROUP = 1 << 16  # strings per row group of original_ids.parquet
_STRINGS_BYTES = 16 << 20  # of decoded row groups that are kept, some ten of them
CLASSES_FILE, NORM_FILE = "classes.parquet", "feature_norm.npy"
UNKNOWN_FLAG = 255  # in every column of a multi-label row whose labels are unknown
FeatureNorm = Literal["none", "row", "standard"]
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
SeedSet = Literal["train", "valid", "test", "all"]  # whose outputs are computed: those of a split, or of every node


def id_dtype(num_nodes: int) -> np.dtype[Any]:
    """The smallest signed type that holds every node id of a graph of this size."""
    return np.dtype(np.int32 if num_nodes < 2**31 else np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphMeta:
    """What the manifest of a graph store says of the graph."""

    num_nodes: int
    num_edges: int
    num_features: int
    feature_dtype: RowDtype
    num_classes: int
    multi_label: bool
    has_edge_weights: bool
    original_ids: Literal["dense", "int64", "string"]
    source: str
    class_values: Literal["dense", "int64", "string"] = "dense"
    feature_norm: FeatureNorm = "none"


_DEFAULTS = {field.name: field.default for field in fields(GraphMeta) if field.default is not MISSING}


class GraphStore:
    """A published graph, memory-mapped; nothing is read until it is used."""

    def __init__(self, path: Path, manifest: Manifest, meta: GraphMeta) -> None:
        self.path, self.manifest, self.meta = path, manifest, meta
        self.row_format = RowFormat(dtype=meta.feature_dtype, width=meta.num_features)
        self._string_groups: dict[int, pa.Array] = {}

    def __repr__(self) -> str:
        meta = self.meta
        sizes = ", ".join(f"{split} {self.num_seeds(split):,}" for split in SPLITS)
        return (
            f"GraphStore({str(self.path)!r}: {meta.num_nodes:,} nodes, {meta.num_edges:,} edges, {meta.num_features:,} "
            f"{meta.feature_dtype} features, {meta.num_classes:,} classes; {sizes})"
        )

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.meta.num_nodes

    @property
    def num_edges(self) -> int:
        """E."""
        return self.meta.num_edges

    @property
    def num_features(self) -> int:
        """F."""
        return self.meta.num_features

    @property
    def num_classes(self) -> int:
        """C; 0 where the graph has no labels."""
        return self.meta.num_classes

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """The dtype of `indices`."""
        return np.dtype(self.manifest.file("indices.npy").dtype)

    @property
    def feature_path(self) -> Path:
        """The feature table; its rows start at byte `feature_offset`."""
        return self.path / FEATURES

    @property
    def feature_offset(self) -> int:
        """Bytes of header before the first row: one page."""
        return PAGE

    @property
    def feature_bytes(self) -> int:
        """Size of all rows."""
        return self.num_nodes * self.row_format.row_bytes

    @property
    def fingerprint(self) -> str:
        """A digest of the content: of the checksums in the manifest. Traces and packs record it; sealing keeps it."""
        entries = sorted(self.manifest.files, key=lambda f: f.name)
        text = "".join(f"{entry.name}:{entry.xxh3};" for entry in entries if entry.name != FEATURE_SUMS)
        return str(xxhash.xxh3_64_hexdigest(text.encode()))

    @property
    def remedy(self) -> str:
        """What to do about a damaged file."""
        return (
            "copy the file anew or rebuild the store (if it is the local copy of a remote one: delete the folder); "
            f"`penstock inspect {self.path} --validate` looks at all files"
        )

    def verify(self, name: str) -> None:
        """Compare a payload file with its checksum, once per process; FormatError where it differs."""
        verify_once(self.path / name, self.manifest.file(name), self.remedy)

    def _map(self, name: str) -> NDArray[Any]:
        self.verify(name)
        return open_npy(self.path / name)

    @cached_property
    def feature_sums(self) -> BlockSums | None:
        """Checksums of the feature table's blocks; None, which the log says once, where the store has none."""
        if self.manifest.version == 1:
            if self.path not in _UNSEALED:
                _UNSEALED.add(self.path)
                logger.warning(
                    "%s was written before checksums of blocks: its features are read unverified; "
                    "`penstock inspect %s --seal` adds them, and runs stay as they are",
                    *(self.path, self.path),
                )
            return None
        sums = self.manifest.file(FEATURE_SUMS)
        return read_block_sums(self.path / FEATURE_SUMS, sums.xxh3, self.feature_path, self.feature_bytes, self.remedy)

    @cached_property
    def indptr(self) -> NDArray[np.int64]:
        """int64 [N+1]."""
        return self._map("indptr.npy")

    @cached_property
    def indices(self) -> NDArray[Any]:
        """int32 or int64 [E]."""
        return self._map("indices.npy")

    @cached_property
    def features(self) -> NDArray[Any]:
        """Rows [N, array_width] in the row format's dtype."""
        return self._map(FEATURES)

    @cached_property
    def labels(self) -> NDArray[Any]:
        """int64 [N] with -1 for unknown, or uint8 [N, C]."""
        return self._map("labels.npy")

    @cached_property
    def edge_weights(self) -> NDArray[np.float32] | None:
        """float32 [E], or None."""
        return self._map("edge_weights.npy") if self.meta.has_edge_weights else None

    def num_rows(self, name: str) -> int:
        """Entries of a payload array, by the manifest; nothing is read."""
        return self.manifest.file(name).shape[0]

    @cached_property
    def class_values(self) -> list[int] | list[str] | None:
        """The user's label of every class, where they are not 0..C-1."""
        if self.meta.class_values == "dense":
            return None
        self.verify(CLASSES_FILE)
        values: list[int] | list[str] = pq.read_table(self.path / CLASSES_FILE).column("class").to_pylist()
        return values

    @property
    def norm_identity(self) -> str:
        """What was done to the features: equal for graphs whose features mean the same to a model."""
        kind = self.meta.feature_norm
        return f"{kind} {self.manifest.file(NORM_FILE).xxh3}" if kind == "standard" else kind

    def drop_mapped(self) -> None:
        """Let the kernel forget what was read through maps; it reads again what is used again."""
        for name in ("indptr", "indices", "edge_weights", "labels", "features"):
            if (array := self.__dict__.get(name)) is not None:
                drop_pages(array)

    def split_ids(self, split: Split) -> NDArray[Any]:
        """Ascending node ids of a split; empty where the graph has none."""
        return self._map(f"{split}_ids.npy")

    def num_seeds(self, seeds: SeedSet) -> int:
        """How many nodes a split has, or the graph; nothing is read."""
        return self.num_nodes if seeds == "all" else self.num_rows(f"{seeds}_ids.npy")

    def original_ids(self, lo: int, hi: int) -> Any:
        """The user's ids of nodes lo..hi-1, as an int64 array or a list of strings."""
        return self.original_ids_of(np.arange(lo, hi, dtype=np.int64))

    def original_ids_of(self, node_ids: NDArray[Any]) -> Any:
        """The user's ids of any nodes, in their order; reads strings per row group, so ascending ids are fastest."""
        if self.meta.original_ids == "dense":
            return node_ids.astype(np.int64)
        if self.meta.original_ids == "int64":
            return self._map("original_ids.npy")[node_ids]
        groups = node_ids // ORIGINAL_IDS_GROUP
        out = np.empty(len(node_ids), object)
        for group in np.unique(groups).tolist():
            places = np.flatnonzero(groups == group)
            taken = self._string_group(group).take(node_ids[places] - group * ORIGINAL_IDS_GROUP)
            out[places] = taken.to_numpy(zero_copy_only=False)
        return out.tolist()

    def _string_group(self, group: int) -> pa.Array:
        """A row group of the user's ids; those used last stay decoded, since callers ask for few ids at a time."""
        found = self._string_groups.pop(group, None)
        if found is None:
            found = self._original_strings.read_row_group(group, columns=["id"]).column("id").combine_chunks()
        self._string_groups[group] = found  # the youngest is last
        while len(self._string_groups) > 1 and sum(g.nbytes for g in self._string_groups.values()) > _STRINGS_BYTES:
            del self._string_groups[next(iter(self._string_groups))]
        return found

    @cached_property
    def _original_strings(self) -> Any:
        self.verify("original_ids.parquet")
        return pq.ParquetFile(self.path / "original_ids.parquet")

    def validate(self, *, checksums: bool = True) -> None:
        """Check every file against the manifest; FormatError names the first that differs."""
        validate_files(self.path, self.manifest, checksums=checksums)
        if checksums and self.manifest.version > 1:
            assert self.feature_sums is not None  # as many as there are blocks
        if int(self.indptr[-1]) != self.num_edges or len(self.indptr) != self.num_nodes + 1:
            raise FormatError(
                f"{self.path}/indptr.npy has {len(self.indptr)} entries ending in {int(self.indptr[-1])}, the "
                f"manifest says {self.num_nodes} nodes and {self.num_edges} edges; rebuild the store"
            )


def _digest_features(graph: GraphStore, progress: Progress) -> NDArray[np.uint64]:
    """Read the feature table and return the checksums of its blocks."""
    digest, done = BlockDigest(), 0
    buffer = np.empty(IO_BYTES, np.uint8)
    with open(graph.feature_path, "rb", buffering=0) as file:
        file.seek(graph.feature_offset)
        while done < graph.feature_bytes:
            view = buffer.data[: min(IO_BYTES, graph.feature_bytes - done)]
            if file.readinto(view) != len(view):
                raise FormatError(f"{graph.feature_path} ends at byte {file.tell()}; {graph.remedy}")
            digest.update(view)
            done += len(view)
            progress("seal", done, graph.feature_bytes, "bytes")
    return digest.sums()


def seal_graph(path: Path | str, *, progress: Progress = silent) -> GraphStore:
    """Give a store of version 1 its checksums of blocks, after comparing every file with the manifest.

    The fingerprint stays, and so does what was made from the store. A store of version 2 is returned as it is;
    FormatError where a file is damaged, with nothing written.
    """
    graph = open_graph(path)
    if graph.manifest.version != 1:
        return graph
    graph.validate()
    entry = write_npy(graph.path / FEATURE_SUMS, _digest_features(graph, progress))
    write_manifest(graph.path, replace(graph.manifest, version=2, files=(*graph.manifest.files, entry)))
    return open_graph(path)


def graph_manifest(meta: GraphMeta, files: tuple[FileEntry, ...]) -> Manifest:
    """Make the manifest that publishes a graph store; `files` have to have the checksums of the features' blocks.

    What a graph does not have is not in it.
    """
    known = {name: value for name, value in asdict(meta).items() if _DEFAULTS.get(name) != value}
    return Manifest(format=FORMAT, version=VERSIONS[-1], meta=known, files=files)


def open_graph(path: AnyPath) -> GraphStore:
    """Open a graph store; FormatError where the folder is not one, is incomplete or has files of other sizes."""
    path = Path(path)
    manifest = read_manifest(path, FORMAT, VERSIONS)
    names = {field.name for field in fields(GraphMeta)}
    if not names - set(_DEFAULTS) <= set(manifest.meta) <= names:
        raise FormatError(f"{path}: graph meta has keys {sorted(manifest.meta)}, wanted {sorted(names)}")
    meta = GraphMeta(**manifest.meta)
    if meta.feature_dtype not in ROW_DTYPES:
        raise FormatError(f"{path}: feature dtype {meta.feature_dtype!r} is none of {ROW_DTYPES}")
    validate_files(path, manifest, checksums=False)
    if manifest.version > 1:
        manifest.file(FEATURE_SUMS)
    return GraphStore(path, manifest, meta)
