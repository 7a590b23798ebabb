"""An item's payload: all of a sampled mini-batch but features, as it lies in traces and extents.

Layout of a payload, little-endian, every array on a multiple of 64 bytes:

| bytes | content |
|---|---|
| int64[12] | magic, version, payload bytes, item, epoch, L, B, M, id bytes (4 or 8), label width, flags, 0 |
| int64[L][4] | per layer, input side first: sources, destinations, edges, 0 |
| id[M] | input node ids; those of layer l's sources are the first `sources` of them, the seeds the first B |
| int32[B] or uint8[B, C] | labels of the seeds (label width 0 means int32; -1 for unknown) |
| int32[M] | in-degrees in the whole graph (flag 1) |
| int32[M] | how many edges lead from a node to itself (flag 4; version 2; absent where none does) |
| per layer: int32[dst+1], int32[E], float32[E] | block `indptr`, `indices` (local ids), edge weights (flag 2) |
| per layer, at the end of it: float32[E] | of draws by weight, what each counts (flag 8; version 2) |

Letters: L layers, B seeds, M input nodes of the item, E edges of the block, C classes of a multi-label task.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.storage.errors import FormatError

PAYLOAD_VERSIONS = (1, 2)  # 2 only with self-loops or draws by weight, so that others keep their bytes
MAGIC = 0x4D455449_4B4E4550  # "PENKITEM" as little-endian bytes
_HEAD, _LAYER, _ALIGN = 12, 4, 64
HAS_DEGREES, HAS_WEIGHTS, HAS_LOOPS, HAS_DRAW_WEIGHTS = 1, 2, 4, 8


def align(num_bytes: int) -> int:
    """Round up to the alignment of arrays inside payloads and extents."""
    return -(-num_bytes // _ALIGN) * _ALIGN


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockArrays:
    """One bipartite layer in CSC. `indptr` int32 [num_dst+1], `indices` int32 [E] in [0, num_src)."""

    num_src: int
    num_dst: int
    indptr: NDArray[np.int32]
    indices: NDArray[np.int32]
    edge_weights: NDArray[np.float32] | None = None
    draw_weights: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A sampled mini-batch without features; from `decode_item` its arrays are views of the payload.

    `blocks[0]` is the input side; destinations are a prefix of sources in each, seeds the first of `input_ids`. `loops`
    come with degrees: edges from each input node to itself, None where no input node has any.
    """

    index: int
    epoch: int
    num_seeds: int
    input_ids: NDArray[Any]
    labels: NDArray[Any]
    degrees: NDArray[np.int32] | None
    blocks: tuple[BlockArrays, ...]
    loops: NDArray[np.int32] | None = None

    @property
    def seeds(self) -> NDArray[Any]:
        """Node ids [B] that the item computes outputs for."""
        return self.input_ids[: self.num_seeds]


def _arrays(item: Item) -> Iterator[NDArray[Any]]:
    yield item.input_ids
    yield item.labels
    if item.degrees is not None:
        yield item.degrees
    if item.loops is not None:
        yield item.loops
    for block in item.blocks:
        yield block.indptr
        yield block.indices
        if block.edge_weights is not None:
            yield block.edge_weights
        if block.draw_weights is not None:
            yield block.draw_weights


def payload_bytes(item: Item) -> int:
    """Size of the item's payload."""
    head = align(8 * (_HEAD + _LAYER * len(item.blocks)))
    return head + sum(align(array.nbytes) for array in _arrays(item))


def encode_item(item: Item, out: NDArray[np.uint8]) -> int:
    """Write the payload into `out` and return its size. Padding is zero, so equal items give equal bytes."""
    has_weights = item.blocks[0].edge_weights is not None
    has_loops = item.loops is not None
    counts_draws = item.blocks[0].draw_weights is not None
    flags = HAS_DEGREES * (item.degrees is not None) + HAS_WEIGHTS * has_weights
    flags += HAS_LOOPS * has_loops + HAS_DRAW_WEIGHTS * counts_draws
    label_width = item.labels.shape[1] if item.labels.ndim == 2 else 0
    num_bytes = payload_bytes(item)
    head = [
        MAGIC,
        PAYLOAD_VERSIONS[has_loops or counts_draws],
        num_bytes,
        item.index,
        item.epoch,
        len(item.blocks),
        item.num_seeds,
    ]
    head += [len(item.input_ids), item.input_ids.dtype.itemsize, label_width, flags, 0]
    for block in item.blocks:
        head += [block.num_src, block.num_dst, len(block.indices), 0]
    at = align(8 * len(head))
    out[:at] = 0
    out[: 8 * len(head)] = np.array(head, "<i8").view(np.uint8)
    for array in _arrays(item):
        end = at + array.nbytes
        out[at:end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        at = align(end)
        out[end:at] = 0
    return num_bytes


def decode_item(payload: NDArray[np.uint8]) -> Item:
    """View a payload as an item; nothing is copied. FormatError where it is not one or is cut."""
    head = payload[: 8 * _HEAD].view("<i8")
    if len(head) < _HEAD or head[0] != MAGIC or head[1] not in PAYLOAD_VERSIONS:
        raise FormatError("these bytes are no item payload of a version this release reads; rebuild trace and packs")
    if head[2] > len(payload):
        raise FormatError(f"the item payload is cut: {len(payload)} of {int(head[2])} bytes; rebuild trace and packs")
    _, _, _, index, epoch, num_layers, num_seeds, num_inputs, id_bytes, label_width, flags, _ = map(int, head)
    layers = payload[8 * _HEAD : 8 * (_HEAD + _LAYER * num_layers)].view("<i8").reshape(num_layers, _LAYER)
    at = align(8 * (_HEAD + _LAYER * num_layers))

    def take(count: int, dtype: str) -> NDArray[Any]:
        nonlocal at
        end = at + count * np.dtype(dtype).itemsize
        array = payload[at:end].view(dtype)
        at = align(end)
        return array

    input_ids = take(num_inputs, f"<i{id_bytes}")
    labels = take(num_seeds * label_width, "u1").reshape(-1, label_width) if label_width else take(num_seeds, "<i4")
    degrees = take(num_inputs, "<i4") if flags & HAS_DEGREES else None
    loops = take(num_inputs, "<i4") if flags & HAS_LOOPS else None
    blocks = []
    for num_src, num_dst, num_edges, _ in layers.tolist():
        indptr, indices = take(num_dst + 1, "<i4"), take(num_edges, "<i4")
        weights = take(num_edges, "<f4") if flags & HAS_WEIGHTS else None
        counts = take(num_edges, "<f4") if flags & HAS_DRAW_WEIGHTS else None
        shape = {"num_src": num_src, "num_dst": num_dst}
        blocks.append(BlockArrays(**shape, indptr=indptr, indices=indices, edge_weights=weights, draw_weights=counts))
    return Item(
        index=index,
        epoch=epoch,
        num_seeds=num_seeds,
        input_ids=input_ids,
        labels=labels,
        degrees=degrees,
        blocks=tuple(blocks),
        loops=loops,
    )


def read_input_ids(fd: int, offset: int) -> NDArray[Any]:
    """Read only the input node ids of the payload at `offset` of an open file; no page of it stays mapped."""
    head = np.frombuffer(os.pread(fd, 8 * _HEAD, offset), "<i8")
    if len(head) < _HEAD or head[0] != MAGIC or head[1] not in PAYLOAD_VERSIONS:
        raise FormatError(f"no item payload of a version this release reads at byte {offset}")
    num_ids, id_bytes = int(head[7]), int(head[8])
    start = offset + align(8 * (_HEAD + _LAYER * int(head[5])))
    if id_bytes not in (4, 8) or num_ids < 0 or start < 0:
        raise FormatError(f"the item payload at byte {offset} has {num_ids} ids of {id_bytes} bytes")
    ids = np.frombuffer(os.pread(fd, num_ids * id_bytes, start), f"<i{id_bytes}")
    if len(ids) != num_ids:
        raise FormatError(f"the item payload at byte {offset} is cut: {len(ids)} of {num_ids} input ids")
    return ids
