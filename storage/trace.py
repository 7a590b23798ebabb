"""The trace: sampled items, and so who reads which rows when.

A trace folder holds per window `window-000000.trace` (item payloads, each on a page) and `window-000000.json` (its
index, written last), and `manifest.json` once all windows are there. A payload is everything but features that a
trainer needs of an item; the packer copies it into the item's extent byte for byte. Windows are written by
`trace_writer`; `items` has the layout of a payload.
"""

import logging
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
from penstock.storage.items import Item, decode_item
from penstock.storage.manifest import Manifest, checksum_file, is_published, read_json, read_manifest, write_manifest
from penstock.storage.paths import AnyPath

logger = logging.getLogger(__name__)

FORMAT = "penstock/trace"
VERSIONS = (1, 2)  # of the folder; from 2 on an index has checksums of payloads


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
