"""Who reads which rows: the input ids of every item, read from the trace when they are asked for."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.storage.errors import FormatError
from penstock.storage.items import read_input_ids
from penstock.storage.trace import Trace, WindowIndex, verify_whole_window, window_name, withdraw_window


class Accesses:
    """The items of some consecutive windows, numbered from 0; a context manager that keeps one file open.

    `num_inputs` int64 [T] and `payload_bytes` int64 [T] are known without reading items. Files are read and not
    mapped, so that nothing but the arrays handed out counts as memory of ours. Not safe for several threads.
    """

    def __init__(self, folder: Path, indexes: Sequence[WindowIndex]) -> None:
        self.folder = folder
        self.first_item = indexes[0].first_item if indexes else 0
        self.num_inputs = np.array([n for index in indexes for n in index.num_inputs], np.int64)
        self.payload_bytes = np.array([n for index in indexes for n in index.bytes], np.int64)
        self._offsets = np.array([n for index in indexes for n in index.offsets], np.int64)
        self._payload_xxh3 = _sums(xxh3 for index in indexes for xxh3 in index.payload_xxh3)
        self._ids_xxh3 = _sums(xxh3 for index in indexes for xxh3 in index.ids_xxh3)
        self._whole = {index.window: index for index in indexes if not index.payload_xxh3}
        self._window = np.array([index.window for index in indexes for _ in index.bytes], np.int64)
        self._open_window, self._fd = -1, -1

    def __enter__(self) -> "Accesses":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __len__(self) -> int:
        return len(self._offsets)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._open_window, self._fd = -1, -1

    def _seek(self, item: int) -> tuple[int, int]:
        window = int(self._window[item])
        if window != self._open_window:
            self._close()
            if window in self._whole:  # written before there were checksums of payloads
                verify_whole_window(self.folder, self._whole.pop(window))
            self._fd = os.open(self.folder / window_name(window, "trace"), os.O_RDONLY)
            self._open_window = window
        return self._fd, int(self._offsets[item])

    def ids(self, item: int) -> NDArray[Any]:
        """Node ids that the item reads, each once; FormatError where they are damaged."""
        try:
            ids = read_input_ids(*self._seek(item))
        except FormatError as error:
            raise self._damaged(item, str(error)) from error
        self._verify(item, self._ids_xxh3, ids)
        return ids

    def _verify(self, item: int, sums: NDArray[np.uint64], data: NDArray[Any]) -> None:
        if len(sums) and xxhash.xxh3_64_intdigest(data.data) != int(sums[item]):
            raise self._damaged(item, "another checksum than the index says")

    def _damaged(self, item: int, what: str) -> FormatError:
        window = int(self._window[item])
        path = self.folder / window_name(window, "trace")
        return withdraw_window(self.folder, window, f"{path}, item {self.first_item + item}: {what}")

    def payload_into(self, item: int, out: NDArray[np.uint8]) -> None:
        """Copy the item's payload to the front of `out`; FormatError where the file is cut or damaged."""
        fd, offset = self._seek(item)
        view, done = out.data[: int(self.payload_bytes[item])], 0
        while done < len(view):
            count = os.preadv(fd, [view[done:]], offset + done)
            if count == 0:
                raise self._damaged(item, "the file ends within it")
            done += count
        self._verify(item, self._payload_xxh3, out[: len(view)])


def _sums(found: Iterable[str]) -> NDArray[np.uint64]:
    return np.array([int(xxh3, 16) for xxh3 in found], np.uint64)


def open_accesses(trace: Trace) -> Accesses:
    """The accesses of a whole published trace; see `Trace.indexes`."""
    return Accesses(trace.path, trace.indexes())
