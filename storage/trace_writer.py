"""Write traces window by window, so that a killed run goes on at the window it was in.

`trace.json` says what is being sampled and is written before the first window. A window's payloads go to
`.window-NNNNNN.trace.tmp`, each from a page on; when all are there the file is synced and renamed, then its index is
written: a window is finished when its index exists and says what is there. The manifest comes after the last window.
"""

import os
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.storage.directio import PAGE, page_up
from penstock.storage.errors import DataError, FormatError, full_disk_is_clear
from penstock.storage.items import decode_item
from penstock.storage.manifest import fsync_folder, read_json, write_json
from penstock.storage.trace import FORMAT, VERSIONS, TraceMeta, WindowIndex, window_name

_HEAD = "trace.json"
_PADDING = bytes(PAGE)


class TraceWindowWriter:
    """Write one window front to back; a context manager that publishes the window when it is left without an error.

    `index` is there afterwards. A temporary file that an error leaves is removed. Not safe for several threads.
    """

    def __init__(self, folder: Path, meta: TraceMeta, window: int) -> None:
        self._folder, self._window = folder, window
        self._first, self._stop = meta.window_range(window)
        self._path = folder / window_name(window, "trace")
        self._temporary = folder / f".{self._path.name}.tmp"
        self._digest = xxhash.xxh3_64()
        self._at = 0
        self._sizes: list[tuple[int, int, int, int]] = []
        self._sums: list[tuple[str, str]] = []
        self.index: WindowIndex | None = None

    def __enter__(self) -> "TraceWindowWriter":
        with full_disk_is_clear(self._path):
            self._file = open(self._temporary, "wb", buffering=0)
        return self

    def append(self, payload: NDArray[np.uint8]) -> None:
        """Add the next item's payload. DoesNotFit where the disk is full."""
        item = decode_item(payload)
        expected = self._first + len(self._sizes)
        assert item.index == expected < self._stop, f"item {item.index} came where {expected} was due"
        num_edges = sum(len(block.indices) for block in item.blocks)
        self._sizes.append((self._at, len(payload), len(item.input_ids), num_edges))
        self._sums.append((xxhash.xxh3_64_hexdigest(payload.data), xxhash.xxh3_64_hexdigest(item.input_ids.data)))
        self._write(payload.data)
        self._write(memoryview(_PADDING)[: page_up(len(payload)) - len(payload)])

    def _write(self, view: memoryview) -> None:
        self._digest.update(view)
        self._at += len(view)
        with full_disk_is_clear(self._path):
            while view:  # a raw write may be short
                view = view[self._file.write(view) :]

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                with full_disk_is_clear(self._path):
                    os.fsync(self._file.fileno())
        finally:
            self._file.close()
            if kind is not None:
                self._temporary.unlink(missing_ok=True)  # a full disk must not stay full
        if kind is None:
            self._publish()

    def _publish(self) -> None:
        assert len(self._sizes) == self._stop - self._first, f"window {self._window} has {len(self._sizes)} items"
        os.replace(self._temporary, self._path)
        fsync_folder(self._folder)
        offsets, sizes, num_inputs, num_edges = zip(*self._sizes, strict=True)
        payload_xxh3, ids_xxh3 = zip(*self._sums, strict=True)
        self.index = WindowIndex(
            window=self._window,
            first_item=self._first,
            offsets=offsets,
            bytes=sizes,
            num_inputs=num_inputs,
            num_edges=num_edges,
            xxh3=str(self._digest.hexdigest()),
            payload_xxh3=payload_xxh3,
            ids_xxh3=ids_xxh3,
        )
        write_json(self._folder / window_name(self._window, "json"), asdict(self.index))


def _differing(old: TraceMeta, new: TraceMeta) -> list[str]:
    pairs = ((field.name, getattr(old, field.name), getattr(new, field.name)) for field in fields(TraceMeta))
    return [f"{name} (there {was!r}, now {now!r})" for name, was, now in pairs if was != now]


def read_trace_head(folder: Path) -> TraceMeta | None:
    """Read what the folder is, or was being, sampled for; None where nothing was begun."""
    if not (folder / _HEAD).is_file():
        return None
    value: dict[str, Any] = read_json(folder / _HEAD)
    if value.get("format") != FORMAT or value.get("version") not in VERSIONS:
        raise FormatError(f"{folder / _HEAD} has format {value.get('format')!r} version {value.get('version')!r}")
    try:
        return TraceMeta.from_json(value["meta"])
    except (TypeError, KeyError) as error:
        raise FormatError(f"{folder / _HEAD} is malformed ({error}); delete the folder and sample again") from error


def begin_trace(folder: Path, meta: TraceMeta) -> None:
    """Make the folder, or check that it was begun with the same meta; DataError names the keys that differ."""
    old = read_trace_head(folder)
    if old is not None and (differing := _differing(old, meta)):
        raise DataError(
            f"{folder} holds a trace that was sampled otherwise: {', '.join(differing)}; "
            "delete the folder, choose another, or use the same settings"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if old is None:
        write_json(folder / _HEAD, {"format": FORMAT, "version": VERSIONS[-1], "meta": meta.to_json()})
