"""From a source to a published store: ids, nodes, spilled edges, topology; each a step that is not redone."""

from pathlib import Path
from typing import Any

from penstock.storage.budget import require_free_disk
from penstock.storage.errors import DataError, DoesNotFit
from penstock.storage.graph import GraphMeta, GraphStore, id_dtype
from penstock.storage.ingest.edges import KeyLayout, source_bits, spill_edges
from penstock.storage.ingest.ids import DenseIds, IdMap, MappedIds, write_ids
from penstock.storage.ingest.nodes import NodeStep
from penstock.storage.ingest.options import IngestOptions
from penstock.storage.ingest.source import GraphSource
from penstock.storage.ingest.topology import write_topology
from penstock.storage.manifest import FileEntry
from penstock.storage.progress import Progress
from penstock.storage.resumable import StoreBuild, begin_build
from penstock.storage.rows import RowFormat

_MIN_MEMORY = 16 << 20


def _check_budget(source: GraphSource, options: IngestOptions, out: Path, host_memory: int) -> None:
    needed = _MIN_MEMORY + 128 * source.num_features
    if host_memory < needed:
        raise DoesNotFit(f"host_memory={host_memory} is too small to ingest this graph; give at least {needed} bytes")
    row_format = RowFormat(dtype=options.feature_dtype, width=source.num_features)
    records = source.num_edges * (1 + options.undirected) + source.num_nodes * (options.self_loops == "add")
    weight_bytes = 4 * source.has_weights
    edge_bytes = 8 + id_dtype(source.num_nodes).itemsize + 2 * weight_bytes  # spilled and final at once
    node_bytes = row_format.row_bytes + 8 * 4 + source.label_width
    require_free_disk(out, source.num_nodes * node_bytes + records * edge_bytes, "the graph store")


def ingest(
    source: GraphSource, out: Path, options: IngestOptions, *, host_memory: int, progress: Progress
) -> GraphStore:
    """Write `source` as a graph store at `out`, or return the store where it is complete already.

    The bytes depend on the source and the options alone. DataError for bad input and DoesNotFit for a full disk leave
    no store; ValueError names the keys that differ where `out` holds a store built otherwise.
    """
    if source.num_nodes == 0:
        raise DataError(f"the node table of {source.kind} is empty; a graph has at least one node")
    if source.num_features == 0:
        raise DataError(f"the nodes of {source.kind} have no features; give at least one column")
    out = Path(out)
    identity = {
        "kind": source.kind,
        "version": 1,
        "inputs": source.identity(),
        "options": options.model_dump(mode="json"),
    }
    build = begin_build(out, identity)
    if isinstance(build, GraphStore):
        return build
    _check_budget(source, options, out, host_memory)
    return build.publish(_run_steps(build, source, options, host_memory, progress))


def _run_steps(
    build: StoreBuild, source: GraphSource, options: IngestOptions, host_memory: int, progress: Progress
) -> GraphMeta:
    out, work, num_nodes = build.out, build.work, source.num_nodes

    def spill() -> dict[str, Any]:
        ids: IdMap = DenseIds(num_nodes) if kind == "dense" else MappedIds(work, num_nodes, kind)
        return spill_edges(source, ids, options, work, host_memory, progress)

    def sort() -> tuple[dict[str, Any], tuple[FileEntry, ...]]:
        layout = KeyLayout(source_bits=source_bits(num_nodes), range_bits=spilled["range_bits"])
        return write_topology(
            *(out, work, num_nodes, layout, spilled["records"]),
            weighted=source.has_weights,
            merge=options.merges,
            host_memory=host_memory,
            progress=progress,
        )

    kind = build.step("ids", lambda: write_ids(source, out, work, host_memory))["kind"]
    nodes = build.step("nodes", NodeStep(source, options, out, work, host_memory, progress).run)
    spilled = build.step("spilled edges", lambda: (spill(), ()))
    edges = build.step("topology", sort)
    return GraphMeta(
        num_nodes=num_nodes,
        num_edges=edges["num_edges"],
        num_features=source.num_features,
        feature_dtype=options.feature_dtype,
        num_classes=nodes["num_classes"],
        multi_label=source.label_width > 0,
        has_edge_weights=source.has_weights,
        original_ids=kind,
        source=source.kind,
    )
