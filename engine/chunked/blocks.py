"""The chunks of one part as torch blocks: topology, messages between chunks, labels and masks.

Everything is read from the chunk store once and kept: 4 bytes per edge and 4 for its weight, 12 per row that another
chunk reads, and what `BlockCache` adds.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine.blockcache import BlockCache
from penstock.engine.dropout import Draws
from penstock.engine.minibatch import Block
from penstock.kernels.loops import count_own
from penstock.storage.chunks import Chunk, PartChunks
from penstock.storage.graph import GraphStore, Split

_SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def _copy(array: NDArray[np.generic]) -> Tensor:
    """A tensor of its own: torch does not take read-only maps."""
    return torch.from_numpy(np.array(array))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkData:
    """One chunk, ready to compute with.

    `messages` adds the rows that other chunks send back, [num_sends], to this chunk's slab, [num_slab].
    """

    num_own: int
    num_halo: int
    num_slab: int
    num_sends: int
    block: Block
    messages: Block
    send_rows: Tensor
    run_sizes: Tensor
    wire_rows: tuple[Tensor, ...]
    mirror_counts: tuple[int, ...]
    src_ids: Tensor

    def drawn(self, key: int, layer: int) -> Block:
        """The block of one layer of one epoch, whose dropout masks follow from `key`, the layer and node ids."""
        return replace(self.block, draws=Draws(key=key, layer=layer, src_ids=self.src_ids))


def _message_block(send_rows: NDArray[np.int32], num_slab: int, device: torch.device) -> Block:
    order = np.argsort(send_rows, kind="stable").astype(np.int32)
    indptr = np.zeros(num_slab + 1, np.int32)
    np.cumsum(np.bincount(send_rows, minlength=num_slab), out=indptr[1:])
    return Block(
        num_src=len(send_rows),
        num_dst=num_slab,
        indptr=torch.from_numpy(indptr),
        indices=torch.from_numpy(order),
    ).to(device)


def _loops(chunk: Chunk, graph: GraphStore) -> Tensor | None:
    """Edges of the graph from each source of the chunk to itself; None where there are none."""
    ids = np.concatenate([chunk.node_ids, chunk.halo_ids])
    out = np.empty(len(ids), np.int32)
    count_own(graph.indptr, graph.indices, ids, 0, len(ids), out)
    return torch.from_numpy(out) if out.any() else None


def load_chunk(chunk: Chunk, device: torch.device, graph: GraphStore | None = None) -> ChunkData:
    """Read a chunk into memory; of `graph`, its self-loops, which only layers that use degrees ask for."""
    weights = None if chunk.edge_weights is None else _copy(chunk.edge_weights)
    block = Block(
        num_src=chunk.num_own + chunk.num_halo,
        num_dst=chunk.num_own,
        indptr=_copy(chunk.indptr),
        indices=_copy(chunk.indices),
        edge_weights=weights,
        src_degrees=_copy(chunk.degrees),
        src_loops=None if graph is None else _loops(chunk, graph),
        cache=BlockCache(),
    ).to(device)
    send_rows = np.array(chunk.send_rows)
    return ChunkData(
        num_own=chunk.num_own,
        num_halo=chunk.num_halo,
        num_slab=chunk.num_slab,
        num_sends=len(send_rows),
        block=block,
        messages=_message_block(send_rows, chunk.num_slab, device),
        send_rows=torch.from_numpy(send_rows).long().to(device),
        run_sizes=torch.from_numpy(np.diff(chunk.send_offsets)),
        wire_rows=tuple(_copy(rows).long().to(device) for rows in chunk.wire_rows),
        mirror_counts=tuple(int(count) for count in chunk.mirror_counts),
        src_ids=torch.from_numpy(np.concatenate([chunk.node_ids, chunk.halo_ids]).astype(np.int64)).to(device),
    )


class ChunkTargets:
    """Labels and splits of a part's own rows, by chunk; only the last stage has them."""

    def __init__(self, graph: GraphStore, part: PartChunks, device: torch.device, dtype: torch.dtype) -> None:
        self.multi_label = graph.meta.multi_label
        splits = {name: _mask(graph, name) for name in _SPLITS}
        self.counts = {name: int(mask.sum()) for name, mask in splits.items()}
        self._rows: dict[Split, list[Tensor]] = {name: [] for name in _SPLITS}
        self._labels: list[Tensor] = []
        for c in range(part.num_chunks):
            ids = part.chunk(c).node_ids
            labels = torch.from_numpy(np.array(graph.labels[ids]))
            self._labels.append(labels.to(device, dtype if self.multi_label else torch.int64))
            for name, mask in splits.items():
                self._rows[name].append(torch.from_numpy(np.flatnonzero(mask[ids])).to(device))

    def of(self, chunk: int, split: Split) -> tuple[Tensor, Tensor]:
        """Rows of the chunk that are in a split, int64 [B], and their labels."""
        rows = self._rows[split][chunk]
        return rows, self._labels[chunk][rows]


def _mask(graph: GraphStore, split: Split) -> NDArray[np.bool_]:
    mask = np.zeros(graph.num_nodes, bool)
    ids = graph.split_ids(split)
    if split == "train" and not graph.meta.multi_label:
        ids = ids[graph.labels[ids] >= 0]
    mask[ids] = True
    return mask


def train_counts(graph: GraphStore, parts: list[PartChunks]) -> NDArray[np.int64]:
    """Training nodes with a label in every logical chunk, over all parts: what a loss is divided by."""
    mask = _mask(graph, "train")
    return np.array([sum(int(mask[p.chunk(c).node_ids].sum()) for p in parts) for c in range(parts[0].num_chunks)])
