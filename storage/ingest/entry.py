"""One function per kind of input; all end in `compose.ingest`.

`out` is the folder of the graph store to make; one that is there of the same inputs and options is returned. `options`
are those of `penstock ingest --set`, such as `IngestOptions(undirected=True)`. `host_memory` is bytes, or text like
`4GiB`, that ingest may use beside the process. Each raises DataError for bad data, naming its file and row, ValueError
where `out` holds something else, and DoesNotFit where memory or disk is too small.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.storage.budget import Size, parse_memory
from penstock.storage.graph import GraphStore
from penstock.storage.ingest.compose import ingest
from penstock.storage.ingest.folders import open_numpy_folder
from penstock.storage.ingest.objects import dgl_source, pyg_source
from penstock.storage.ingest.ogb import open_ogb_folder
from penstock.storage.ingest.options import IngestOptions
from penstock.storage.ingest.parquet import ParquetSource
from penstock.storage.paths import AnyPath
from penstock.storage.progress import Progress, silent

_MEMORY = "1GiB"
_PLAIN = IngestOptions()


def _paths(given: AnyPath | Sequence[AnyPath]) -> Path | list[Path]:
    return [Path(path) for path in given] if isinstance(given, list | tuple) else Path(given)  # type: ignore[arg-type]


def ingest_parquet(
    nodes: AnyPath | Sequence[AnyPath],
    edges: AnyPath | Sequence[AnyPath],
    out: AnyPath,
    options: IngestOptions = _PLAIN,
    *,
    host_memory: Size = _MEMORY,
    progress: Progress = silent,
) -> GraphStore:
    """Make the graph store `out` of a node and an edge table, each a Parquet file, a folder of files or a list of them.

        penstock.ingest_parquet("nodes.parquet", "edges.parquet", "papers.graph", host_memory="4GiB")

    Nodes have `id` (integers or strings), `feature` (a list, or many columns), and perhaps `label` and `split`; edges
    have `src`, `dst` and perhaps `weight`. `options` can name other columns; they are those of `penstock ingest --set`,
    which `penstock inspect --ingest-options` lists. `host_memory` is bytes, or text like `4GiB`, to work in. A store
    that is there of the same tables and options is returned; a killed call is continued. Raises DataError for bad data,
    naming its file and row, ValueError where `out` holds something else, DoesNotFit where memory or disk is too small.
    """
    source = ParquetSource(_paths(nodes), _paths(edges), options)
    return ingest(source, Path(out), options, host_memory=parse_memory(host_memory), progress=progress)


def ingest_npy(
    folder: AnyPath,
    out: AnyPath,
    options: IngestOptions = _PLAIN,
    *,
    host_memory: Size = _MEMORY,
    progress: Progress = silent,
) -> GraphStore:
    """Make the graph store `out` of a folder of `.npy` files: `features`, `edge_index` or `indptr` and `indices`,
    `labels`, splits as masks or ids (docs/ingest.md has all names). Else as `ingest_parquet`."""
    source = open_numpy_folder(Path(folder))
    return ingest(source, Path(out), options, host_memory=parse_memory(host_memory), progress=progress)


def ingest_ogb(
    folder: AnyPath,
    out: AnyPath,
    options: IngestOptions = _PLAIN,
    *,
    host_memory: Size = _MEMORY,
    progress: Progress = silent,
) -> GraphStore:
    """Make the graph store `out` of the folder of a downloaded ogbn dataset, the one with `raw` and `split`. Else as
    `ingest_parquet`."""
    source = open_ogb_folder(Path(folder))
    return ingest(source, Path(out), options, host_memory=parse_memory(host_memory), progress=progress)


def ingest_dgl(
    graph: Any,
    out: AnyPath,
    options: IngestOptions = _PLAIN,
    *,
    host_memory: Size = _MEMORY,
    progress: Progress = silent,
) -> GraphStore:
    """Make the graph store `out` of a homogeneous DGL graph with `ndata['feat']`, and perhaps `label` and masks. Else
    as `ingest_parquet`."""
    return ingest(dgl_source(graph), Path(out), options, host_memory=parse_memory(host_memory), progress=progress)


def ingest_pyg(
    data: Any,
    out: AnyPath,
    options: IngestOptions = _PLAIN,
    *,
    host_memory: Size = _MEMORY,
    progress: Progress = silent,
) -> GraphStore:
    """Make the graph store `out` of a PyG `Data` with `x` and `edge_index`, and perhaps `y` and masks. Else as
    `ingest_parquet`."""
    return ingest(pyg_source(data), Path(out), options, host_memory=parse_memory(host_memory), progress=progress)
