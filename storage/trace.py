"""The trace: sampled items, and so who reads which rows when.

A trace folder holds per window `window-000000.trace` (item payloads, each on a page) and `window-000000.json` (its
index, written last), and `manifest.json` once all windows are there. A payload is everything but features that a
trainer needs of an item; the packer copies it into the item's extent byte for byte. Windows are written by
`trace_writer`. Layout of a payload, little-endian, every array on a multiple of 64 bytes:

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

import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.storage.deal import Deal
from penstock.storage.errors import FormatError
from penstock.storage.manifest import Manifest, checksum_file, is_published, read_json, read_manifest, write_manifest
from penstock.storage.paths import AnyPath

logger = logging.getLogger(__name__)

FORMAT = "penstock/trace"
VERSIONS = (1, 2)  # of the folder; from 2 on an index has checksums of payloads
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceMeta:
    """What the manifest of a trace says: how it was sampled, and of which graph (its fingerprint).

    With a `deal` it has the items of one replica, counted by the replica's own numbers.
    """

    graph: str
    num_nodes: int
    seed: int
    fanouts: tuple[int, ...]
    method: str
    replace: bool
    weighted: bool
    batch_size: int
    split: str
    num_epochs: int
    items_per_epoch: int
    window_items: int
    degrees: bool = False
    shuffle: bool = True
    deal: Deal | None = None

    def whole_item(self, item: int) -> int:
        """The number that an item has where one replica gets all of them; draws are keyed by it."""
        return item if self.deal is None else self.deal.whole(item)

    @property
    def whole_epoch_items(self) -> int:
        """Items of an epoch over all replicas."""
        return self.items_per_epoch if self.deal is None else self.deal.epoch_items

    def to_json(self) -> dict[str, Any]:
        """As manifests have it."""
        value = asdict(self)
        if self.deal is None:
            del value["deal"]
        return value

    @staticmethod
    def from_json(value: dict[str, Any]) -> "TraceMeta":
        """Undo `to_json`; TypeError or KeyError where it is malformed."""
        deal = value.get("deal")
        return TraceMeta(
            **{**value, "fanouts": tuple(value["fanouts"]), "deal": None if deal is None else Deal(**deal)}
        )

    @property
    def num_items(self) -> int:
        """Items of all epochs."""
        return self.num_epochs * self.items_per_epoch

    @property
    def num_windows(self) -> int:
        """Windows of all epochs; the last may be shorter."""
        return -(-self.num_items // self.window_items)

    def window_range(self, window: int) -> tuple[int, int]:
        """First and past-the-last item of a window."""
        return window * self.window_items, min((window + 1) * self.window_items, self.num_items)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowIndex:
    """Where the payloads of a window lie: `offsets` and `bytes` per item, in `window-NNNNNN.trace`.

    `xxh3` is of the whole file, `payload_xxh3` of each payload, `ids_xxh3` of the input ids in it, which are also read
    alone; in windows of version 1 the last two are empty.
    """

    window: int
    first_item: int
    offsets: tuple[int, ...]
    bytes: tuple[int, ...]
    num_inputs: tuple[int, ...]
    num_edges: tuple[int, ...]
    xxh3: str
    payload_xxh3: tuple[str, ...] = ()
    ids_xxh3: tuple[str, ...] = ()


def window_name(window: int, suffix: str) -> str:
    """Name of a window's file, the same in traces and pack sets."""
    return f"window-{window:06d}.{suffix}"


def withdraw_window(folder: Path, window: int, what: str) -> FormatError:
    """Take a damaged window of a trace or a pack set back, so that the step that writes it does so again.

    Returns the error to raise. Without its index a window is not there.
    """
    index = folder / window_name(window, "json")
    try:
        index.unlink(missing_ok=True)
    except OSError:
        return FormatError(f"{what}; the disk damaged it: delete {index} and run the same command again")
    return FormatError(f"{what}; the disk damaged it: run the same command again, it makes the window anew")


def read_window_index(folder: Path, window: int) -> WindowIndex:
    """Read the index of a finished window; FormatError where the window is not there or its file has another size."""
    path, data = folder / window_name(window, "json"), folder / window_name(window, "trace")
    remedy = f"delete {path} and run the same command again"
    pairs = read_json(path, remedy).items()
    value: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in pairs}
    try:
        index = WindowIndex(**value)
    except TypeError as error:
        raise FormatError(f"{path} is malformed ({error}); {remedy}") from error
    if index.window != window:
        raise FormatError(f"{path} is the index of window {index.window}; {remedy}")
    size = data.stat().st_size if data.is_file() else 0
    if size < index.offsets[-1] + index.bytes[-1]:
        raise FormatError(f"{data} is truncated or missing: {size} bytes; {remedy}")
    return index


def has_window(folder: Path, window: int) -> bool:
    """Whether the window is finished: its index and its payloads are there; the log says what is damaged."""
    if not (folder / window_name(window, "json")).is_file():
        return False
    try:
        read_window_index(folder, window)
    except FormatError as error:
        logger.warning("a window is made anew: %s", error)
        return False
    return True


def is_current(index: WindowIndex, meta: TraceMeta) -> bool:
    """Whether a window says all that layers take from items today.

    Those of version 1 know neither the self-loops that go along with degrees nor what a draw by weight counts.
    """
    return bool(index.payload_xxh3) or not (meta.degrees or meta.weighted)


class TraceWindow:
    """A finished window of a trace, memory-mapped. Payloads are verified when they are asked for."""

    def __init__(self, folder: Path, index: WindowIndex) -> None:
        self.index, self._folder = index, folder
        self._data: NDArray[np.uint8] = np.memmap(folder / window_name(index.window, "trace"), np.uint8, mode="r")
        if not index.payload_xxh3:
            verify_whole_window(folder, index)

    def __len__(self) -> int:
        return len(self.index.offsets)

    def payload(self, position: int) -> NDArray[np.uint8]:
        """Bytes of the window's n-th item; FormatError where they are damaged."""
        offset = self.index.offsets[position]
        data = self._data[offset : offset + self.index.bytes[position]]
        if self.index.payload_xxh3 and xxhash.xxh3_64_hexdigest(data.data) != self.index.payload_xxh3[position]:
            item = self.index.first_item + position
            path = self._folder / window_name(self.index.window, "trace")
            raise withdraw_window(self._folder, self.index.window, f"{path}: item {item} has another checksum")
        return data

    def item(self, position: int) -> Item:
        """The window's n-th item, as views."""
        return decode_item(self.payload(position))

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """All items, as views."""
        return tuple(self.item(n) for n in range(len(self)))


def verify_whole_window(folder: Path, index: WindowIndex) -> None:
    """Compare a window's file with the checksum in its index; FormatError where they differ."""
    path = folder / window_name(index.window, "trace")
    if (found := checksum_file(path)) != index.xxh3:
        what = f"{path} has checksum {found}, its index says {index.xxh3}"
        raise withdraw_window(folder, index.window, what)


class Trace:
    """A published trace."""

    def __init__(self, path: Path, meta: TraceMeta) -> None:
        self.path, self.meta = path, meta

    def __repr__(self) -> str:
        meta = self.meta
        return (
            f"Trace({str(self.path)!r}: {meta.num_epochs:,} epochs of {meta.items_per_epoch:,} items of {meta.split}, "
            f"fanouts {list(meta.fanouts)}, {meta.method}, seed {meta.seed})"
        )

    def window(self, window: int) -> TraceWindow:
        """Open one window."""
        return TraceWindow(self.path, read_window_index(self.path, window))

    def indexes(self) -> list[WindowIndex]:
        """The indexes of all windows; FormatError where an earlier release sampled less than items are used for now."""
        found = [read_window_index(self.path, window) for window in range(self.meta.num_windows)]
        if not all(is_current(index, self.meta) for index in found):
            lacks = "what each draw by weight counts" if self.meta.weighted else "the self-loops that degrees leave out"
            raise FormatError(
                f"{self.path} was sampled by an earlier release, and its items do not say {lacks}; sample it again, "
                "with sample_trace into the same folder"
            )
        return found

    def windows(self) -> Iterator[TraceWindow]:
        """Open the windows one after the other."""
        return (self.window(n) for n in range(self.meta.num_windows))

    def items(self) -> Iterator[Item]:
        """All items in order, as views that live as long as they are referenced."""
        return (window.item(n) for window in self.windows() for n in range(len(window)))


def publish_trace(path: Path, meta: TraceMeta) -> Trace:
    """Write the manifest, after all windows."""
    write_manifest(path, Manifest(format=FORMAT, version=VERSIONS[-1], meta=meta.to_json(), files=()))
    return Trace(path, meta)


def is_complete(folder: Path, meta: TraceMeta) -> bool:
    """Whether the trace is published and all of its windows are there, with all that this release writes of them."""
    if not is_published(folder):
        return False
    try:
        open_trace(folder)
    except FormatError as error:
        logger.warning("a trace is published anew: %s", error)
        return False
    windows = range(meta.num_windows)
    return all(has_window(folder, n) and is_current(read_window_index(folder, n), meta) for n in windows)


def open_trace(path: AnyPath) -> Trace:
    """Open a published trace; FormatError where it is not one or is incomplete."""
    path = Path(path)
    value = read_manifest(path, FORMAT, VERSIONS).meta
    try:
        return Trace(path, TraceMeta.from_json(value))
    except (TypeError, KeyError) as error:
        raise FormatError(f"{path}: trace meta is malformed ({error})") from error
