"""One function per kind of input; all end in `compose.ingest`."""

from pathlib import Path
from typing import Any

from penstock.storage.graph import GraphStore
from penstock.storage.ingest.compose import ingest
from penstock.storage.ingest.folders import open_numpy_folder
from penstock.storage.ingest.objects import dgl_source, pyg_source
from penstock.storage.ingest.ogb import open_ogb_folder
from penstock.storage.ingest.options import IngestOptions
from penstock.storage.ingest.parquet import ParquetSource
from penstock.storage.progress import Progress, silent


def ingest_parquet(
    nodes: Path | list[Path],
    edges: Path | list[Path],
    out: Path,
    options: IngestOptions,
    *,
    host_memory: int,
    progress: Progress = silent,
) -> GraphStore:
    """Ingest a node and an edge table, each a file, a folder of files or a list of them (see `parquet`)."""
    source = ParquetSource(nodes, edges, options)
    return ingest(source, out, options, host_memory=host_memory, progress=progress)


def ingest_npy(
    folder: Path, out: Path, options: IngestOptions, *, host_memory: int, progress: Progress = silent
) -> GraphStore:
    """Ingest a folder of `.npy` files (see `folders` for their names)."""
    return ingest(open_numpy_folder(folder), out, options, host_memory=host_memory, progress=progress)


def ingest_ogb(
    folder: Path, out: Path, options: IngestOptions, *, host_memory: int, progress: Progress = silent
) -> GraphStore:
    """Ingest the folder of a downloaded ogbn dataset, the one with `raw` and `split` (see `ogb`)."""
    return ingest(open_ogb_folder(folder), out, options, host_memory=host_memory, progress=progress)


def ingest_dgl(
    graph: Any, out: Path, options: IngestOptions, *, host_memory: int, progress: Progress = silent
) -> GraphStore:
    """Ingest a homogeneous DGL graph with `ndata['feat']` (see `objects`)."""
    return ingest(dgl_source(graph), out, options, host_memory=host_memory, progress=progress)


def ingest_pyg(
    data: Any, out: Path, options: IngestOptions, *, host_memory: int, progress: Progress = silent
) -> GraphStore:
    """Ingest a PyG `Data` with `x` and `edge_index` (see `objects`)."""
    return ingest(pyg_source(data), out, options, host_memory=host_memory, progress=progress)
