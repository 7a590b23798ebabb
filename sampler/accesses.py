"""Who reads which rows: the input ids of every item, read from the trace when they are asked for."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.storage.errors import FormatError
from penstock.storage.trace import Trace, WindowIndex, read_input_ids, read_window_index, window_name


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
            self._fd = os.open(self.folder / window_name(window, "trace"), os.O_RDONLY)
            self._open_window = window
        return self._fd, int(self._offsets[item])

    def ids(self, item: int) -> NDArray[Any]:
        """Node ids that the item reads, each once."""
        return read_input_ids(*self._seek(item))

    def payload_into(self, item: int, out: NDArray[np.uint8]) -> None:
        """Copy the item's payload to the front of `out`; FormatError where the file is cut."""
        fd, offset = self._seek(item)
        view, done = out.data[: int(self.payload_bytes[item])], 0
        while done < len(view):
            count = os.preadv(fd, [view[done:]], offset + done)
            if count == 0:
                raise FormatError(f"{self.folder} is cut within item {self.first_item + item}; sample again")
            done += count


def open_accesses(trace: Trace) -> Accesses:
    """The accesses of a whole published trace."""
    return Accesses(trace.path, [read_window_index(trace.path, n) for n in range(trace.meta.num_windows)])
