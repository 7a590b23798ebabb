"""The edge table: edges are spread over files by destination, so that each can be sorted in memory.

A key is `local destination << bits | source`, local to one of 2^n equal ranges of destinations, so that 64 bits do for
any graph of up to 2^38 nodes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.storage.ingest.ids import IdMap
from penstock.storage.ingest.options import IngestOptions
from penstock.storage.ingest.source import GraphSource
from penstock.storage.ingest.spill import BucketWriter, Keys, bucket_bits
from penstock.storage.ingest.values import sound_weights
from penstock.storage.progress import Progress

Weights = NDArray[np.float32] | None
_EDGE_BYTES = 160  # an edge of a chunk at its widest: ids, rows, both directions, keys, the copy in bucket order
_MAX_CHUNK = 1 << 20  # larger chunks were not faster


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLayout:
    """Which bits of a key are the source, and which of a destination are its range."""

    source_bits: int
    range_bits: int

    @property
    def local_bits(self) -> int:
        """Bits of a destination within its range."""
        return self.source_bits - self.range_bits

    @property
    def key_bits(self) -> int:
        """Bits of a whole key."""
        return self.local_bits + self.source_bits

    def keys(self, src: NDArray[np.int64], dst: NDArray[np.int64]) -> Keys:
        """Make keys uint64 of edges; their range is `dst >> local_bits`."""
        local = dst.astype(np.uint64) & np.uint64((1 << self.local_bits) - 1)
        return (local << np.uint64(self.source_bits)) | src.astype(np.uint64)


def source_bits(num_nodes: int) -> int:
    """Bits that hold every node id."""
    return max(1, (num_nodes - 1).bit_length())


def plan_layout(num_nodes: int, num_records: int, capacity: int) -> KeyLayout:
    """Choose as few ranges as let each be sorted at once, if degrees are even, and keys have at most 64 bits."""
    bits = source_bits(num_nodes)
    range_bits = max(bucket_bits(num_records, capacity), 2 * bits - 64)
    return KeyLayout(source_bits=bits, range_bits=min(range_bits, bits))


def count_records(source: GraphSource, options: IngestOptions) -> int:
    """The most edges that a source and options come to."""
    doubled = options.undirected or source.adds_inverse
    return source.num_edges * (1 + doubled) + source.num_nodes * (options.self_loops == "add")


def spill_edges(
    source: GraphSource, ids: IdMap, options: IngestOptions, work: Path, host_memory: int, progress: Progress
) -> dict[str, Any]:
    """Distribute all edges over `work/edges-*`; reports the bits of the ranges and the number of records in each.

    DataError names the row of the first edge whose end is no node, or whose weight cannot be one.
    """
    num_records = count_records(source, options)
    layout = plan_layout(source.num_nodes, num_records, host_memory // 2 // (24 if source.has_weights else 8))
    rows = max(1, min(_MAX_CHUNK, host_memory // 2 // _EDGE_BYTES))
    weight_dtype = np.float32 if source.has_weights else None
    done = 0
    with BucketWriter(work / "edges", 1 << layout.range_bits, weight_dtype) as writer:
        for chunk in source.edges(rows):
            src = ids.lookup(chunk.src, chunk.where, chunk.first_row, chunk.names[0])
            dst = ids.lookup(chunk.dst, chunk.where, chunk.first_row, chunk.names[1])
            _append(writer, layout, *arrange_edges(src, dst, sound_weights(chunk), options, source.adds_inverse))
            done += len(src)
            progress("ingest edges", done, max(done, source.num_edges), "edges")
        if options.self_loops == "add":
            for lo in range(0, source.num_nodes, rows):
                nodes = np.arange(lo, min(lo + rows, source.num_nodes), dtype=np.int64)
                ones = np.ones(len(nodes), np.float32) if source.has_weights else None
                _append(writer, layout, nodes, nodes, ones)
    return {"range_bits": layout.range_bits, "records": [bucket.num_records for bucket in writer.buckets]}


def _append(
    writer: BucketWriter, layout: KeyLayout, src: NDArray[np.int64], dst: NDArray[np.int64], weights: Weights
) -> None:
    writer.append(dst.astype(np.uint64), layout.local_bits, layout.keys(src, dst), weights)


def arrange_edges(
    src: NDArray[np.int64], dst: NDArray[np.int64], weights: Weights, options: IngestOptions, inverse: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64], Weights]:
    """Apply `self_loops` and `undirected` to a chunk, or `inverse`: then the reverse of a loop is a second one."""
    if options.self_loops != "keep":
        kept = src != dst
        src, dst, weights = src[kept], dst[kept], None if weights is None else weights[kept]
    if options.undirected or inverse:
        # an edge and its reverse side by side, so that the order of equal keys does not depend on the chunks
        pairs, kept = np.stack([src, dst], 1), np.ones(2 * len(src), bool)
        kept[1::2] = (src != dst) | (not options.undirected)
        src, dst = pairs.reshape(-1)[kept], pairs[:, ::-1].reshape(-1)[kept]
        weights = None if weights is None else np.repeat(weights, 2)[kept]
    return src, dst, weights
