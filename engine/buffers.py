"""The reused memory behind one mini-batch: its payload and its features.

A feed owns two of these, so that one is filled while the consumer works on the other. Where the device is a GPU the
host side is pinned, the features have a twin on the device, and an event tells when the consumer's kernels are done.
"""

import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine.minibatch import Block, MiniBatch
from penstock.storage.directio import aligned_buffer
from penstock.storage.items import Item, decode_item

_LINE = 64  # the gather streams into rows that start on a cache line
GROWTH = 1.25  # payloads differ by a few percent, so they stop growing soon


def pinned_bytes(num_bytes: int) -> NDArray[np.uint8]:
    """Page-locked host memory of whole pages, freed with the last view of it.

    Not from torch's allocator, which rounds up to powers of two: up to twice what the budget counts.
    """
    memory = aligned_buffer(num_bytes)
    cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no types here
    torch.cuda.check_error(int(cuda.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)))
    # Views of views keep `memory` alive, not each other; it is unlocked before it is unmapped.
    weakref.finalize(memory, cuda.cudaHostUnregister, memory.ctypes.data).atexit = False
    return memory[:num_bytes]


class BatchBuffer:
    """Memory for the largest batch so far; it grows where a batch is larger, which a steady state does not see."""

    def __init__(self, max_inputs: int, width: int, device: torch.device) -> None:
        self.width, self.device = width, device
        self._pinned = device.type == "cuda"
        self._payload = self._host_bytes(0)
        self._host = self._host_rows(max_inputs)
        self._on_device: Tensor | None = None
        self._consumed: torch.cuda.Event | None = None

    def _host_bytes(self, num_bytes: int) -> NDArray[np.uint8]:
        if self._pinned:
            return pinned_bytes(num_bytes)
        raw = np.empty(num_bytes + _LINE, np.uint8)
        start = -raw.ctypes.data % _LINE
        return raw[start : start + num_bytes]

    def _host_rows(self, num_rows: int) -> NDArray[np.float32]:
        return self._host_bytes(num_rows * self.width * 4).view(np.float32).reshape(num_rows, self.width)

    def host_rows(self, num_rows: int) -> NDArray[np.float32]:
        """Float32 [num_rows, width] to write features to; what it held is lost."""
        if num_rows > len(self._host):
            self._host = self._host_rows(int(num_rows * GROWTH))
        return self._host[:num_rows]

    def device_rows(self, num_rows: int) -> Tensor:
        """The same on the device."""
        if self._on_device is None or num_rows > len(self._on_device):
            count = max(num_rows, len(self._host)) if self._on_device is None else int(num_rows * GROWTH)
            self._on_device = torch.empty(count, self.width, device=self.device)
        return self._on_device[:num_rows]

    def keep_payload(self, payload: NDArray[np.uint8]) -> Item:
        """Copy an item's payload, so that where it came from can be reused, and view the copy."""
        if len(payload) > len(self._payload):
            self._payload = self._host_bytes(int(len(payload) * GROWTH))
        kept = self._payload[: len(payload)]
        np.copyto(kept, payload)
        return decode_item(kept)

    def wait_until_consumed(self) -> None:
        """Wait for the kernels that may still read this buffer."""
        if self._consumed is not None:
            self._consumed.synchronize()
            self._consumed = None

    def mark_consumed(self) -> None:
        """Note that the consumer submits no more work on this buffer."""
        if self._pinned:
            self._consumed = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types here
            self._consumed.record(torch.cuda.current_stream(self.device))


def make_batch(item: Item, step: int, epoch: int, features: Tensor) -> MiniBatch:
    """View an item's arrays as tensors on the features' device; on the CPU only the labels are copied."""
    device = features.device

    def tensor(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    degrees = None if item.degrees is None else tensor(item.degrees)
    loops = None if item.loops is None else tensor(item.loops)
    labels = tensor(item.labels)
    blocks = tuple(
        Block(
            num_src=block.num_src,
            num_dst=block.num_dst,
            indptr=tensor(block.indptr),
            indices=tensor(block.indices),
            edge_weights=None if block.edge_weights is None else tensor(block.edge_weights),
            draw_weights=None if block.draw_weights is None else tensor(block.draw_weights),
            src_degrees=None if degrees is None else degrees[: block.num_src],
            src_loops=None if loops is None else loops[: block.num_src],
        )
        for block in item.blocks
    )
    return MiniBatch(
        step=step,
        item=item.index,
        epoch=epoch,
        num_seeds=item.num_seeds,
        input_ids=tensor(item.input_ids),
        labels=labels.float() if labels.ndim == 2 else labels.long(),
        blocks=blocks,
        features=features,
    )
