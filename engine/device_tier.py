"""The device tier: float32 rows in slots on the training device, constant through a run.

On a GPU, rows of this tier never cross the bus again. On the CPU it works the same way, only without the gain, so that
tests cover it.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine.buffers import BatchBuffer
from penstock.storage.rows import RowFormat, decode_rows
from penstock.storage.tiers import HostTier, RowPlace, check_slots


class DeviceTier:
    """Decoded rows on `device`; a `Tier`. Made, filled and read on one stream, or a fill may come before the zeros."""

    def __init__(self, num_slots: int, row_format: RowFormat, device: torch.device) -> None:
        self.num_slots, self.row_format = num_slots, row_format
        self.rows = torch.zeros(num_slots, row_format.width, device=device)

    def fill(self, slots: NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
        """See `Tier.fill`."""
        check_slots(slots, self.num_slots)
        decoded = torch.from_numpy(np.ascontiguousarray(decode_rows(rows, self.row_format)))
        self.rows[torch.from_numpy(slots).to(self.rows.device)] = decoded.to(self.rows.device)

    def read(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Tier.read`."""
        check_slots(slots, self.num_slots)
        found: NDArray[np.float32] = self.rows[torch.from_numpy(slots).to(self.rows.device)].cpu().numpy()
        return found


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    """Queue what follows on a CUDA stream; without one, nothing changes."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def side_stream(device: torch.device) -> Any:
    """A CUDA stream for a feed's copies, so that they overlap the consumer's kernels; None on other devices."""
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types here


def gather_on_device(
    source: NDArray[np.int32],
    place: RowPlace,
    host: HostTier,
    tier: DeviceTier,
    buffer: BatchBuffer,
    threads: int,
) -> Tensor:
    """Collect an item's rows on the device: rows of the host tier and the extent cross the bus compactly.

    Runs on the current stream; the rows are there when it has done its work.
    """
    on_device = source < tier.num_slots
    here, there = np.flatnonzero(~on_device), np.flatnonzero(on_device)
    staged = buffer.host_rows(len(here))
    host.gather(source[here] - np.int32(tier.num_slots), place, staged, threads)
    device = tier.rows.device
    features = buffer.device_rows(len(source))
    moved = torch.from_numpy(staged).to(device, non_blocking=True)
    features.index_copy_(0, torch.from_numpy(here).to(device), moved)
    if len(there):
        slots = torch.from_numpy(source[there].astype(np.int64)).to(device)
        features.index_copy_(0, torch.from_numpy(there).to(device), tier.rows.index_select(0, slots))
    return features
