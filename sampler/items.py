"""Put an item together from what a mode sampled: labels, in-degrees, self-loops, blocks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.loops import count_own
from penstock.kernels.sample import count_edges
from penstock.sampler.draws import Scratch
from penstock.storage.errors import DoesNotFit
from penstock.storage.graph import GraphStore
from penstock.storage.items import BlockArrays, Item
from penstock.storage.trace import TraceMeta

_MAX_EDGES = 2**31 - 1  # local offsets of a block are int32


def check_edges(num_edges: int, index: int, hop: int) -> int:
    """Pass a hop's edge count on; DoesNotFit where int32 offsets do not hold it."""
    if num_edges > _MAX_EDGES:
        raise DoesNotFit(
            f"item {index} has {num_edges} edges at hop {hop}, a block holds {_MAX_EDGES}; "
            "lower batch_size or that hop's fanout"
        )
    return num_edges


class TooLarge(Exception):
    """An item takes more memory than its share; `num_bytes` is enough for all of its hops. Nothing of it was drawn yet
    at the hop that is too large."""

    def __init__(self, index: int, num_bytes: int) -> None:
        super().__init__(index, num_bytes)
        self.index, self.num_bytes = index, num_bytes


def no_room(found: TooLarge, host_memory: int) -> DoesNotFit:
    """What to say where an item does not fit alone, in half of what tables leave, which is three quarters at least."""
    needed = 8 * found.num_bytes // 3 + 4096
    return DoesNotFit(
        f"sampling item {found.index} takes up to {found.num_bytes} bytes, its nodes have so many neighbours; it got "
        f"{host_memory} bytes of host memory, use {needed} or more, a smaller batch size or smaller fanouts",
        host_bytes=needed,
    )


def read_labels(graph: GraphStore, seeds: NDArray[Any]) -> NDArray[Any]:
    """Labels of the seeds as payloads hold them: int32 [B], or uint8 [B, C]."""
    labels = graph.labels[seeds]
    return np.ascontiguousarray(labels, np.uint8 if labels.ndim == 2 else np.int32)


def _read_degrees(graph: GraphStore, nodes: NDArray[Any], scratch: Scratch) -> NDArray[np.int32]:
    num_nodes = len(nodes)
    arrays = (scratch.take(name, num_nodes + 1, np.int64) for name in ("starts", "degrees", "offsets"))
    starts, degrees, offsets = arrays
    count_edges(graph.indptr, nodes, 0, num_nodes, -1, False, starts, degrees, offsets)
    out = scratch.take("degrees32", num_nodes, np.int32)[:num_nodes]
    np.minimum(degrees[:num_nodes], np.iinfo(np.int32).max, out=out, casting="unsafe")
    return out


def _read_loops(graph: GraphStore, nodes: NDArray[Any], scratch: Scratch) -> NDArray[np.int32] | None:
    out = scratch.take("loops", len(nodes), np.int32)[: len(nodes)]
    count_own(graph.indptr, graph.indices, nodes, 0, len(nodes), out)
    return out if out.any() else None


def make_item(
    graph: GraphStore,
    meta: TraceMeta,
    index: int,
    num_seeds: int,
    nodes: NDArray[Any],
    blocks: Sequence[BlockArrays],
    scratch: Scratch,
) -> Item:
    """Make item `index` of input nodes `nodes` [M] and blocks, input side first."""
    return Item(
        index=index,
        epoch=index // meta.items_per_epoch,
        num_seeds=num_seeds,
        input_ids=nodes,
        labels=read_labels(graph, nodes[:num_seeds]),
        degrees=_read_degrees(graph, nodes, scratch) if meta.degrees else None,
        blocks=tuple(blocks),
        loops=_read_loops(graph, nodes, scratch) if meta.degrees else None,
    )
