"""Loads of chunks as a trace, so that their features are planned, packed and fed like those of sampled mini-batches.

An item is one load of a chunk. It has one block without edges: topology comes from the chunk store. Plan it with
`PlanConfig(mode="reuse")`: there is nothing to sample again, so `rolling` windows have no producer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.sampler.items import read_labels
from penstock.storage.chunks import Chunk, ChunkStore, PartChunks
from penstock.storage.errors import DataError, DoesNotFit
from penstock.storage.graph import GraphStore, id_dtype
from penstock.storage.items import BlockArrays, Item, encode_item, payload_bytes
from penstock.storage.progress import Progress, silent
from penstock.storage.trace import Trace, TraceMeta, has_window, is_complete, open_trace, publish_trace
from penstock.storage.trace_writer import TraceWindowWriter, begin_trace

_WINDOW_ITEMS = 64  # as for sampled traces


def _trace_meta(
    graph: GraphStore, chunks: ChunkStore, part: PartChunks, sequence: Sequence[Sequence[int]], halo: bool
) -> TraceMeta:
    """What identifies the trace; the sequence is in `method`, as a digest, and the part in `split`."""
    if chunks.meta.graph != graph.fingerprint:
        raise DataError(
            f"{chunks.path} was cut from graph {chunks.meta.graph}, {graph.path} is {graph.fingerprint}; cut it again"
        )
    lengths = {len(epoch) for epoch in sequence}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"epochs load {sorted(lengths)} chunks; give at least one epoch, all of one length above 0")
    loads = np.array(sequence, np.int64)
    if loads.min() < 0 or loads.max() >= part.num_chunks:
        raise ValueError(f"the sequence loads chunks {loads.min()}..{loads.max()}; there are 0..{part.num_chunks - 1}")
    digest = xxhash.xxh3_64_hexdigest(loads.tobytes())
    return TraceMeta(
        graph=graph.fingerprint,
        num_nodes=graph.num_nodes,
        seed=chunks.meta.seed,
        fanouts=(),
        method=f"chunks {chunks.fingerprint} {'with' if halo else 'without'} halo in order {digest}",
        replace=False,
        weighted=False,
        batch_size=int(part.own_sizes.max()),
        split=f"part {part.part} of {chunks.meta.num_parts}",
        num_epochs=len(sequence),
        items_per_epoch=loads.shape[1],
        window_items=_WINDOW_ITEMS,
        shuffle=False,
    )


def _make_item(graph: GraphStore, chunk: Chunk, index: int, meta: TraceMeta, halo: bool) -> Item:
    """Make item `index`: a load of a chunk."""
    ids = np.concatenate([chunk.node_ids, chunk.halo_ids]) if halo else chunk.node_ids
    num_own = chunk.num_own
    indptr, indices = np.zeros(num_own + 1, np.int32), np.empty(0, np.int32)
    return Item(
        index=index,
        epoch=index // meta.items_per_epoch,
        num_seeds=num_own,
        input_ids=ids.astype(id_dtype(graph.num_nodes)),
        labels=read_labels(graph, chunk.node_ids),
        degrees=None,
        blocks=(BlockArrays(num_src=len(ids), num_dst=num_own, indptr=indptr, indices=indices),),
    )


def _check_memory(graph: GraphStore, part: PartChunks, halo: bool, host_memory: int) -> None:
    rows = part.own_sizes + part.halo_sizes * halo
    label_bytes = 8 * (graph.labels.shape[1] if graph.labels.ndim == 2 else 1)
    largest = int((rows * 24 + part.own_sizes * (8 + 2 * label_bytes)).max()) + (1 << 16)  # ids thrice, the payload
    if largest > host_memory:
        raise DoesNotFit(
            f"loading the largest chunk takes {largest} bytes for ids and labels, --host-memory gives {host_memory}; "
            "raise it, or use more chunks",
            host_bytes=largest,
        )


def write_chunk_trace(
    graph: GraphStore,
    chunks: ChunkStore,
    part: int,
    out: Path,
    *,
    sequence: Sequence[Sequence[int]],
    halo: bool,
    host_memory: int,
    progress: Progress = silent,
) -> Trace:
    """Write a trace in which epoch e loads the chunks `sequence[e]` of a part, in that order; finished windows stay.

    An item's seeds are a chunk's own nodes; with `halo`, the halo's ids follow them in its input ids. All epochs
    load equally many chunks. ValueError or DataError before anything is written, DoesNotFit where an item exceeds
    `host_memory`, and DataError where `out` holds another trace.
    """
    pieces = chunks.part(part)
    meta = _trace_meta(graph, chunks, pieces, sequence, halo)
    _check_memory(graph, pieces, halo, host_memory)
    begin_trace(out, meta)
    if is_complete(out, meta):
        return open_trace(out)
    loads = [chunk for epoch in sequence for chunk in epoch]
    for window in range(meta.num_windows):
        first, stop = meta.window_range(window)
        progress("trace", first, meta.num_items, "items")
        if has_window(out, window):
            continue
        with TraceWindowWriter(out, meta, window) as writer:
            for index in range(first, stop):
                writer.append(_encode(_make_item(graph, pieces.chunk(loads[index]), index, meta, halo)))
    progress("trace", meta.num_items, meta.num_items, "items")
    return publish_trace(out, meta)


def _encode(item: Item) -> NDArray[Any]:
    payload = np.empty(payload_bytes(item), np.uint8)
    encode_item(item, payload)
    return payload
