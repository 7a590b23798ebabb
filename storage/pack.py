"""Packs: per window one file with one page-aligned extent per item, holding all that the trainer reads for it.

A pack set is a folder with `packset.json` (written first: slots, row format, item counts, see `PackSetMeta`), per
window `window-000000.pack`, `window-000000.residents.npy` and `window-000000.json` (its index, written last), and
`manifest.json` once all windows are there (`reuse` mode only; `rolling` windows come and go). The index has a checksum
of every extent and of each of the other files, which are compared whenever they are read.

`residents`: node id in every slot when the window starts, -1 for an empty slot; device slots first, then host slots.
Where packs are cycled, the last window also has `window-NNNNNN.wrap.npy`, int32 [2, n]: after its last item the row of
host slot wrap[0, k] moves to host slot wrap[1, k], and the tier is again as its residents say at window 0.
All moves happen at once: every source is read before its slot is overwritten.

A window with a shared segment also has `window-NNNNNN.pages.npy`, uint64: the xxh3-64 of every page of the segment,
since items read pages of it and never the whole.

Window file: [shared segment, padded to pages] [extent of item 0] [extent of item 1] ... Extent, little-endian:

| bytes | content |
|---|---|
| int64[24] | see `ExtentHead`: sizes and offsets from the extent's start |
| payload | the item, as in the trace (see `trace`) |
| int32[M] `source` | where each input row is: c < D device slot c; c < D+H host slot c-D; else extent row c-D-H |
| int32[n], int32[n] `admit_rows`, `admit_slots` | after the item's gather, extent row -> host slot |
| int64[r, 2] `shared_runs` | page runs of the shared segment to read: first page, pages |
| int64[s] `shared_offsets` | byte offset of each shared row within those runs laid end to end |
| rows | the private missing rows, sorted by node id, `row_bytes` each, no gaps |

Extent rows are numbered private rows first, then shared rows. Letters: M input nodes, D and H device and host slots.
"""

import json
import logging
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.storage.directio import PAGE, page_up
from penstock.storage.errors import FormatError
from penstock.storage.items import Item, align, decode_item
from penstock.storage.manifest import (
    Manifest,
    is_published,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from penstock.storage.npyfile import read_npy
from penstock.storage.rows import RowFormat
from penstock.storage.trace import TraceMeta, window_name, withdraw_window

logger = logging.getLogger(__name__)

FORMAT = "penstock/pack"
VERSIONS = (2,)  # packs are made again where they are of another release
_EXTENT_VERSION = 1
MAGIC = 0x54584554_4B4E4550
_HEAD_WORDS = 24
PackMode = Literal["reuse", "rolling"]
WINDOW_FILES = ("json", "pack", "residents.npy", "pages.npy", "wrap.npy")  # the index goes first when they go
_AGAIN = "run the command that packs (penstock train or pack) again: it packs anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtentHead:
    """The first words of an extent, in this order; the rest of the 24 are zero."""

    magic: int = MAGIC
    version: int = _EXTENT_VERSION
    item: int
    extent_bytes: int
    payload_offset: int
    payload_bytes: int
    source_offset: int
    num_inputs: int
    admit_offset: int
    num_admits: int
    runs_offset: int
    num_runs: int
    shared_offset: int
    num_shared: int
    rows_offset: int
    num_rows: int
    row_bytes: int


def layout_extent(
    *,
    item: int,
    payload_bytes: int,
    num_inputs: int,
    num_admits: int,
    num_runs: int,
    num_shared: int,
    num_rows: int,
    row_bytes: int,
) -> ExtentHead:
    """Place the sections of an extent; `extent_bytes` is padded to whole pages."""
    payload = align(8 * _HEAD_WORDS)
    source = align(payload + payload_bytes)
    admit = align(source + 4 * num_inputs)
    runs = align(admit + 8 * num_admits)
    shared = align(runs + 16 * num_runs)
    rows = align(shared + 8 * num_shared)
    return ExtentHead(
        item=item,
        extent_bytes=page_up(rows + num_rows * row_bytes),
        payload_offset=payload,
        payload_bytes=payload_bytes,
        source_offset=source,
        num_inputs=num_inputs,
        admit_offset=admit,
        num_admits=num_admits,
        runs_offset=runs,
        num_runs=num_runs,
        shared_offset=shared,
        num_shared=num_shared,
        rows_offset=rows,
        num_rows=num_rows,
        row_bytes=row_bytes,
    )


def feed_memory(*, host_slots: int, row_bytes: int, max_extent_bytes: int, max_inputs: int, width: int) -> int:
    """Host memory that a feed of such packs needs at least: the host tier, two extents in flight, and two batches of
    features decoded to float32 [max_inputs, width]. The planner sizes the host tier with it.
    """
    return host_slots * row_bytes + 2 * max_extent_bytes + 2 * max_inputs * width * 4


def encode_extent_head(head: ExtentHead, out: NDArray[np.uint8]) -> None:
    """Write the head into the first bytes of an extent."""
    words = np.zeros(_HEAD_WORDS, "<i8")
    values = astuple(head)
    words[: len(values)] = values
    out[: 8 * _HEAD_WORDS] = words.view(np.uint8)


def decode_extent_head(extent: NDArray[np.uint8]) -> ExtentHead:
    """Read the head; FormatError where the bytes are no extent or too few."""
    words = extent[: 8 * _HEAD_WORDS].view("<i8").tolist() if len(extent) >= 8 * _HEAD_WORDS else []
    if not words or words[0] != MAGIC or words[1] != _EXTENT_VERSION:
        raise FormatError("these bytes are no pack extent of a version this release reads; rebuild the packs")
    head = ExtentHead(**dict(zip((field.name for field in fields(ExtentHead)), words, strict=False)))
    if head.extent_bytes > len(extent):
        raise FormatError(f"extent of item {head.item} is cut: {len(extent)} of {head.extent_bytes} bytes")
    return head


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """An extent as views of the bytes read. `rows` uint8 [num_rows, row_bytes] are the private missing rows."""

    head: ExtentHead
    item: Item
    source: NDArray[np.int32]
    admit_rows: NDArray[np.int32]
    admit_slots: NDArray[np.int32]
    shared_runs: NDArray[np.int64]
    shared_offsets: NDArray[np.int64]
    rows: NDArray[np.uint8]


def extent_sections(extent: NDArray[np.uint8], head: ExtentHead) -> Extent:
    """View the sections of an extent whose payload is already in place."""
    admits = extent[head.admit_offset : head.admit_offset + 8 * head.num_admits].view("<i4").reshape(2, -1)
    rows = extent[head.rows_offset : head.rows_offset + head.num_rows * head.row_bytes]
    return Extent(
        head=head,
        item=decode_item(extent[head.payload_offset : head.payload_offset + head.payload_bytes]),
        source=extent[head.source_offset : head.source_offset + 4 * head.num_inputs].view("<i4"),
        admit_rows=admits[0],
        admit_slots=admits[1],
        shared_runs=extent[head.runs_offset : head.runs_offset + 16 * head.num_runs].view("<i8").reshape(-1, 2),
        shared_offsets=extent[head.shared_offset : head.shared_offset + 8 * head.num_shared].view("<i8"),
        rows=rows.reshape(head.num_rows, head.row_bytes),
    )


def decode_extent(extent: NDArray[np.uint8]) -> Extent:
    """View the bytes of a whole extent; nothing is copied."""
    return extent_sections(extent, decode_extent_head(extent))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSetMeta:
    """What all windows of a pack set share.

    `trace` is the digest of the trace's meta that the packs were built from, `policy` the planner's;
    `max_extent_bytes` includes the shared pages an item reads, and is 0 where it is not known (`rolling`).
    """

    graph: str
    trace: str
    mode: PackMode
    policy: str
    row_dtype: str
    width: int
    num_nodes: int
    device_slots: int
    host_slots: int
    window_items: int
    items_per_epoch: int
    num_items: int
    max_extent_bytes: int
    max_inputs: int

    @property
    def row_format(self) -> RowFormat:
        """How a packed row lies in bytes."""
        return RowFormat(dtype=self.row_dtype, width=self.width)  # type: ignore[arg-type]  # checked by open_packset

    @property
    def num_windows(self) -> int:
        """Windows that hold `num_items`; the last may be shorter."""
        return -(-self.num_items // self.window_items)


def trace_digest(meta: TraceMeta) -> str:
    """A digest of how a trace was sampled and of which graph; pack sets record it."""
    return str(xxhash.xxh3_64_hexdigest(json.dumps(meta.to_json(), sort_keys=True).encode()))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackIndex:
    """Index of a finished window: where its extents lie, xxh3-64 of each, and of the files beside the pack.

    `pages_xxh3` and `wrap_xxh3` are empty where there is no such file.
    """

    window: int
    first_item: int
    offsets: tuple[int, ...]
    bytes: tuple[int, ...]
    max_inputs: int
    xxh3: tuple[str, ...]
    shared_bytes: int
    residents_xxh3: str
    pages_xxh3: str = ""
    wrap_xxh3: str = ""


def write_pack_index(folder: Path, index: PackIndex) -> None:
    """Publish a window; its pack and residents must be complete and synced."""
    write_json(folder / window_name(index.window, "json"), asdict(index))


def parse_pack_index(value: dict[str, Any], origin: Path) -> PackIndex:
    """Make an index of its JSON; FormatError where it is malformed."""
    found: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
    try:
        return PackIndex(**found)
    except TypeError as error:
        raise FormatError(f"{origin} is malformed ({error}); {_AGAIN}") from error


def read_pack_index(folder: Path, window: int) -> PackIndex:
    """Read a finished window's index; FormatError where it is damaged or its pack has another size."""
    path, pack = folder / window_name(window, "json"), folder / window_name(window, "pack")
    index = parse_pack_index(read_json(path, f"delete {path}, and {_AGAIN}"), path)
    if index.window != window:
        raise FormatError(f"{path} is the index of window {index.window}; delete it, and {_AGAIN}")
    size, wanted = pack.stat().st_size if pack.is_file() else 0, index.offsets[-1] + index.bytes[-1]
    if size != wanted:
        raise FormatError(f"{pack} has {size} bytes, its index says {wanted}; delete {path}, and {_AGAIN}")
    return index


def has_window(folder: Path, window: int) -> bool:
    """Whether the window is finished: its index and all of its files are there; the log says what is damaged."""
    path = folder / window_name(window, "json")
    if not path.is_file():
        return False
    try:
        index = read_pack_index(folder, window)
        beside = {"residents.npy": index.residents_xxh3, "pages.npy": index.pages_xxh3, "wrap.npy": index.wrap_xxh3}
        for suffix, xxh3 in beside.items():
            if xxh3:
                read_npy(folder / window_name(window, suffix), xxh3, _AGAIN)
    except FormatError as error:
        logger.warning("a window is packed anew: %s", error)
        return False
    return True


def page_sums(data: memoryview) -> NDArray[np.uint64]:
    """xxh3-64 of every page of some whole pages."""
    pages = (data[at : at + PAGE] for at in range(0, len(data), PAGE))
    return np.fromiter(map(xxhash.xxh3_64_intdigest, pages), np.uint64, len(data) // PAGE)


def read_residents(folder: Path, index: PackIndex) -> NDArray[np.int64]:
    """Node id per slot at the window's start, device slots first, -1 where empty; FormatError where damaged."""
    return _read_beside(folder, index.window, "residents.npy", index.residents_xxh3)


def read_pages(folder: Path, index: PackIndex) -> NDArray[np.uint64]:
    """Checksums of the pages of the shared segment; FormatError where damaged."""
    return _read_beside(folder, index.window, "pages.npy", index.pages_xxh3)


def read_wrap(folder: Path, index: PackIndex) -> NDArray[np.int32]:
    """Moves after the last item of a cycle, int32 [2, n]; FormatError where they are missing or damaged."""
    return _read_beside(folder, index.window, "wrap.npy", index.wrap_xxh3)


def _read_beside(folder: Path, window: int, suffix: str, xxh3: str) -> NDArray[Any]:
    try:
        return read_npy(folder / window_name(window, suffix), xxh3, "pack it again")
    except FormatError as error:
        raise withdraw_window(folder, window, str(error).removesuffix("; pack it again")) from error


def write_packset(folder: Path, meta: PackSetMeta) -> None:
    """Write `packset.json`, before the first window."""
    write_json(folder / "packset.json", {"format": FORMAT, "version": VERSIONS[-1], "meta": asdict(meta)})


def publish_packset(folder: Path, meta: PackSetMeta) -> None:
    """Write the manifest, after the last window."""
    write_manifest(folder, Manifest(format=FORMAT, version=VERSIONS[-1], meta=asdict(meta), files=()))


def open_packset(folder: Path) -> PackSetMeta:
    """Read what the windows share; FormatError where the folder is no pack set of a version this release reads."""
    value = read_json(folder / "packset.json", f"delete {folder}, and {_AGAIN}", keys=("format", "version", "meta"))
    if value.get("format") != FORMAT or value.get("version") not in VERSIONS:
        raise FormatError(
            f"{folder} holds {value.get('format')!r} version {value.get('version')!r}, this release reads "
            f"{list(VERSIONS)}; delete the folder, and {_AGAIN}"
        )
    try:
        return PackSetMeta(**value["meta"])
    except (TypeError, KeyError) as error:
        raise FormatError(f"{folder}/packset.json is malformed ({error}); delete the folder, and {_AGAIN}") from error


def is_complete(folder: Path) -> bool:
    """Whether a `reuse` pack set is published and every window of it is there, each of its files whole."""
    try:
        if read_manifest(folder, FORMAT, VERSIONS).meta != asdict(open_packset(folder)):
            return False  # one of the two is of another set; who packs compares both with the plan
    except FormatError as error:
        if is_published(folder):
            logger.warning("packs are published anew: %s", error)
        return False
    return all(has_window(folder, window) for window in range(open_packset(folder).num_windows))
