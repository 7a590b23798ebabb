"""Write the chunks of a graph, piece by piece, under a memory budget.

The manifest comes last; what a kill left behind is deleted and built again. `chunks.json`, written first, marks the
folder as ours and says what it is built from.
"""

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.gather import PieceMemory, piece_edges, plan_memory
from penstock.sampler.chunking.part_writer import PartWriter
from penstock.sampler.chunking.partition import partition
from penstock.sampler.chunking.pieces import Pieces, find_readers, lay_slabs, link_piece, number_pieces
from penstock.storage.chunks import ChunkMeta, ChunkStore, chunk_manifest, open_chunks, part_folder
from penstock.storage.errors import DataError, FormatError
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import (
    MANIFEST,
    FileEntry,
    fsync_folder,
    is_published,
    read_json,
    write_json,
    write_manifest,
)
from penstock.storage.progress import Progress, silent
from penstock.storage.resumable import differing_keys

logger = logging.getLogger(__name__)

_IDENTITY = "chunks.json"
Assignment = tuple[NDArray[np.int32], NDArray[np.int32]]


def _check_assignment(assignment: Assignment, graph: GraphStore, config: PartitionConfig) -> Assignment:
    """Refuse labels of the wrong number or range."""
    arrays = []
    for labels, limit, name in zip(assignment, (config.parts, config.chunks), ("parts", "chunks"), strict=True):
        labels = np.ascontiguousarray(labels, np.int32)
        if labels.shape != (graph.num_nodes,) or labels.min() < 0 or labels.max() >= limit:
            raise ValueError(
                f"{name} of the assignment have shape {labels.shape} and labels {labels.min()}..{labels.max()}; give "
                f"{graph.num_nodes} in 0..{limit - 1}"
            )
        arrays.append(labels)
    return arrays[0], arrays[1]


def _identity(graph: GraphStore, config: PartitionConfig, assignment: Assignment | None) -> dict[str, Any]:
    digest = None
    if assignment is not None:
        digest = xxhash.xxh3_64_hexdigest(assignment[0].tobytes() + assignment[1].tobytes())
    return {"graph": graph.fingerprint, "config": config.model_dump(), "assignment": digest}


def _begin(out: Path, identity: dict[str, Any]) -> ChunkStore | None:
    """Return the finished folder, or make an empty one of ours; DataError where something else is there."""
    if is_published(out) and (there := _built_from(out)) is not None:
        if differing := differing_keys(there, identity):
            raise DataError(
                f"{out} holds chunks built otherwise: {'; '.join(differing[:5])}; "
                "delete the folder, choose another, or use the same settings"
            )
        return open_chunks(out)
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names - {f".{_IDENTITY}.tmp"} and _IDENTITY not in names:
        raise DataError(f"{out} is not empty and holds no chunks of ours; choose an empty or new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _IDENTITY, identity)
    _clear(out)
    return None


def _built_from(out: Path) -> Any:
    """The identity of a finished folder; None, and then it is one no more, where a file is missing or damaged."""
    if not (out / _IDENTITY).is_file():
        return {}  # nothing of ours, or the mark is lost: not to be written over
    try:
        open_chunks(out)
        return read_json(out / _IDENTITY)
    except FormatError as error:
        logger.warning("the graph is cut anew: %s", error)
        write_json(out / _IDENTITY, {})  # the mark that the folder is ours
        (out / MANIFEST).unlink()
        return None


def _clear(out: Path) -> None:
    for folder in out.glob("part-*"):
        shutil.rmtree(folder)


def _write_parts(
    graph: GraphStore, pieces: Pieces, out: Path, memory: PieceMemory, progress: Progress
) -> tuple[dict[str, Any], list[FileEntry]]:
    """Write every part's folder; returns the meta's measured numbers and the manifest's entries."""
    readers = find_readers(graph, pieces, memory.window_bytes)
    table = np.full(graph.num_nodes, -1, np.int32)
    edges = piece_edges(graph, pieces, memory)
    entries: list[FileEntry] = []
    num_halo = num_mirrors = done = 0
    for part in range(pieces.num_parts):
        slabs = lay_slabs(pieces, readers, part)
        with PartWriter(out / part_folder(part), graph, pieces, part) as writer:
            for chunk in range(pieces.num_chunks):
                progress("chunk", done, graph.num_edges, "edges", halo=num_halo)
                sources, weights = next(edges)
                own = pieces.own(part, chunk)
                linked = link_piece(pieces, slabs, own, sources, table)
                wires = [np.flatnonzero(readers.of_part(p, own)) for p in range(pieces.num_parts)]
                writer.append(linked, wires, weights)
                done, num_halo = done + len(sources), num_halo + len(linked.halo)
                del sources, weights, linked  # views of a group's edges, which must go before the next group comes
            entries += writer.finish(slabs)
        num_mirrors += int(slabs.mirrors.sum())
    progress("chunk", done, graph.num_edges, "edges", halo=num_halo)
    numbers = {
        "cut_edges": readers.cut_edges,
        "part_cut_edges": readers.part_cut_edges,
        "alpha": num_halo / graph.num_nodes,
        "part_alpha": num_mirrors / graph.num_nodes,
    }
    return numbers, entries


def write_chunks(
    graph: GraphStore,
    out: Path,
    config: PartitionConfig,
    *,
    host_memory: int,
    threads: int,
    progress: Progress = silent,
    assignment: Assignment | None = None,
) -> ChunkStore:
    """Cut a graph and write the folder `out`, or open it where it is finished and was built from the same.

    `assignment` gives part and chunk of every node instead. DataError names what differs where `out` holds something
    else; ValueError where a piece would be empty; DoesNotFit, naming the smallest that would do, where memory is too
    small or a piece has 2^31 edges, before anything but the mark is written, and where a piece's own and halo rows are
    2^31 or the disk is full.
    """
    if assignment is not None:
        assignment = _check_assignment(assignment, graph, config)
    finished = _begin(out, identity := _identity(graph, config, assignment))
    if finished is not None:
        logger.info("%s is complete already", out)
        return finished
    method = "given"
    if assignment is None:
        *labels, method = partition(graph, config, host_memory=host_memory, threads=threads, progress=progress)
        assignment = labels[0], labels[1]
    pieces = number_pieces(graph, *assignment, config.parts, config.chunks)
    memory = plan_memory(graph, pieces, host_memory)
    try:
        numbers, entries = _write_parts(graph, pieces, out, memory, progress)
    except BaseException:
        _clear(out)  # nobody can use it, and a full disk must not stay full
        raise
    sizes = np.diff(pieces.starts).reshape(config.parts, config.chunks)
    meta = ChunkMeta(
        graph=identity["graph"],
        num_nodes=graph.num_nodes,
        num_edges=graph.num_edges,
        num_chunks=config.chunks,
        num_parts=config.parts,
        method=method,
        seed=config.seed,
        has_edge_weights=graph.meta.has_edge_weights,
        balance=float(sizes.max() / sizes.mean()),
        part_balance=float(sizes.sum(axis=1).max() / sizes.sum(axis=1).mean()),
        **numbers,
    )
    fsync_folder(out)
    write_manifest(out, chunk_manifest(meta, tuple(entries)))
    logger.info("%s: %s", out, asdict(meta))
    return open_chunks(out)
