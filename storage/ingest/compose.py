"""From a source to a published store: ids, nodes, spilled edges, topology; each a step that is not redone."""

from pathlib import Path
from typing import Any

from penstock.storage.budget import require_free_disk
from penstock.storage.errors import DataError, DoesNotFit
from penstock.storage.graph import FeatureNorm, GraphMeta, GraphStore, id_dtype
from penstock.storage.ingest.classes import read_classes, write_classes
from penstock.storage.ingest.edges import KeyLayout, count_records, source_bits, spill_edges
from penstock.storage.ingest.ids import DenseIds, IdMap, MappedIds, write_ids
from penstock.storage.ingest.inputs import identify
from penstock.storage.ingest.nodes import NodeStep, chunk_rows
from penstock.storage.ingest.normalise import choose_norm, norm_identity, open_normaliser, write_norm
from penstock.storage.ingest.options import IngestOptions
from penstock.storage.ingest.source import GraphSource
from penstock.storage.ingest.topology import write_topology
from penstock.storage.manifest import FileEntry
from penstock.storage.progress import Progress
from penstock.storage.resumable import StoreBuild, begin_build, recorded_notes
from penstock.storage.rows import RowFormat

_MIN_MEMORY = 16 << 20
_VERSION = 2  # of what the same inputs and options become; 1 knew inputs by their times


def _check_budget(source: GraphSource, options: IngestOptions, out: Path, host_memory: int) -> None:
    needed = _MIN_MEMORY + 128 * source.num_features
    if host_memory < needed:
        raise DoesNotFit(
            f"host_memory={host_memory} is too small to ingest this graph; use --host-memory {needed} or more"
        )
    row_format = RowFormat(dtype=options.feature_dtype, width=source.num_features)
    records = count_records(source, options)
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
    options.check_source(source.kind)
    norm = choose_norm(options)
    if options.remap_labels is None:
        options = options.model_copy(update={"remap_labels": source.text_labels})
    if options.remap_labels and not source.has_labels:
        raise ValueError(f"remap_labels=true, but the nodes of {source.kind} have no labels; drop it")
    unsaid = {"feature_norm_from"} | ({"null_features"} if options.null_features == "refuse" else set())
    inputs, seen = identify(source.inputs, recorded_notes(out), progress)
    identity = {
        "kind": source.kind,
        "version": _VERSION,
        "inputs": {record.pop("role"): record for record in inputs},
        "options": options.model_dump(mode="json", exclude=unsaid),
        "normalised as": norm_identity(options),
    }
    build = begin_build(out, identity, notes=seen)
    if isinstance(build, GraphStore):
        return build
    _check_budget(source, options, out, host_memory)
    return build.publish(_run_steps(build, source, options, norm, host_memory, progress))


def _run_steps(
    build: StoreBuild,
    source: GraphSource,
    options: IngestOptions,
    norm: FeatureNorm,
    host_memory: int,
    progress: Progress,
) -> GraphMeta:
    out, work, num_nodes = build.out, build.work, source.num_nodes
    rows = chunk_rows(source, options, host_memory)

    def open_ids() -> IdMap:
        return DenseIds(num_nodes) if kind == "dense" else MappedIds(work, num_nodes, kind)

    def write_nodes() -> tuple[dict[str, Any], tuple[FileEntry, ...]]:
        return NodeStep(
            *(source, options, out, work),
            ids=open_ids(),
            classes=read_classes(out) if options.remap_labels else None,
            normalise=open_normaliser(norm, out),
            host_memory=host_memory,
            progress=progress,
        ).run()

    def spill() -> dict[str, Any]:
        return spill_edges(source, open_ids(), options, work, host_memory, progress)

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
    classes: dict[str, Any] = {"kind": "dense"}
    if options.remap_labels:
        classes = build.step("classes", lambda: write_classes(source, out, rows))
    if norm == "standard":
        build.step("normalisation", lambda: write_norm(source, options, out, rows, progress))
    nodes = build.step("nodes", write_nodes)
    spilled = build.step("spilled edges", lambda: (spill(), ()))
    edges = build.step("topology", sort)
    return GraphMeta(
        num_nodes=num_nodes,
        num_edges=edges["num_edges"],
        num_features=source.num_features,
        feature_dtype=options.feature_dtype,
        num_classes=classes.get("num_classes", nodes["num_classes"]),
        multi_label=source.label_width > 0,
        has_edge_weights=source.has_weights,
        original_ids=kind,
        source=source.kind,
        class_values=classes["kind"],
        feature_norm=norm,
    )
