"""Tensors whose memory returns to a free list when they die, and is handed out again.

A fresh large tensor costs a page fault per 4 KiB, because the allocator returns large blocks to the system at once: on
the reference machine writing 143 MB took 9 ms into memory that had been used before and 40 to 190 ms into fresh
memory. The outputs of aggregations are the largest tensors of a step and have about the same sizes in every step.
Blocks return when the last tensor, view or array on them is gone, so they cannot be handed out twice.
"""

import itertools
import threading
import weakref
from bisect import bisect_left, insort
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SMALL = 1 << 20  # bytes; below, the allocator keeps blocks itself
_KEPT = 8  # free blocks; a training step of three layers has fewer in flight at once
_ALIGN = 64

_returned: deque[NDArray[np.uint8]] = deque()  # finalizers only append: they may run in any thread, at any point
_free: list[tuple[int, int, NDArray[np.uint8]]] = []  # by size, then by when they came back: there may be thousands
_serial = itertools.count()
_lock = threading.Lock()


def _round_up(num_bytes: int) -> int:
    """To the next of eight sizes per power of two, so that a slightly larger batch fits the same block."""
    step = 1 << max(0, num_bytes.bit_length() - 4)
    return -(-num_bytes // step) * step


def _take(num_bytes: int) -> NDArray[np.uint8]:
    with _lock:
        while _returned:
            block = _returned.popleft()
            insort(_free, (block.nbytes, next(_serial), block))
        at = bisect_left(_free, (num_bytes,))
        if at < len(_free) and _free[at][0] <= 2 * num_bytes:
            return _free.pop(at)[2]
        _free[:] = sorted(sorted(_free, key=lambda entry: entry[1])[-_KEPT:])  # others were not wanted for longer
    block = np.empty(_round_up(num_bytes) + _ALIGN, np.uint8)
    shift = -block.ctypes.data % _ALIGN
    return block[shift : shift + block.nbytes - _ALIGN]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make an uninitialised CPU tensor on recycled memory. Safe for several threads."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if num_bytes < _SMALL:
        return torch.empty(shape, dtype=dtype)
    block = _take(num_bytes)
    lent = block[:num_bytes]  # torch keeps this very array alive for as long as the storage lives
    weakref.finalize(lent, _returned.append, block).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def release() -> None:
    """Give free memory back to the system, for example between training and something of other sizes."""
    with _lock:
        _returned.clear()
        _free.clear()
