"""What the parts of a stage exchange for every layer of a chunk: mirror rows forward, their gradients backward.

Part p mirrors the rows of part w's piece of a chunk that any of p's chunks reads, each once. All parts work on the same
chunk at the same time, so both sides post their receives before they send and cannot block each other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.engine.chunked.blocks import ChunkData
from penstock.engine.chunked.transport import Transport


class MirrorExchange:
    """The exchange between `ranks`, one per part in part order; nothing to do where there is one part."""

    def __init__(self, transport: Transport, ranks: Sequence[int]) -> None:
        self._transport, self._ranks = transport, tuple(ranks)
        self.is_alone = len(self._ranks) == 1

    def _peers(self) -> list[tuple[int, int]]:
        return [(part, rank) for part, rank in enumerate(self._ranks) if rank != self._transport.rank]

    def slab(self, data: ChunkData, h: Tensor) -> Tensor:
        """Rows [num_slab, H]: the chunk's own, then the mirrors of the other parts."""
        if self.is_alone:
            return h
        for part, rank in self._peers():
            self._transport.expect(rank, "halo", (data.mirror_counts[part], h.shape[1]), h.dtype)
        for part, rank in self._peers():
            self._transport.send(rank, "halo", h.index_select(0, data.wire_rows[part]))
        return torch.cat([h, *(self._transport.receive(rank, "halo").to(h.device) for _, rank in self._peers())])

    def gradients(self, data: ChunkData, slab: Tensor) -> Tensor:
        """Gradients of own rows [num_own, H]: from the slab's own rows, and from the mirrors that other parts have."""
        own = slab[: data.num_own]
        if self.is_alone:
            return own
        mirrors = torch.split(slab[data.num_own :], list(data.mirror_counts))
        for part, rank in self._peers():
            self._transport.expect(rank, "halo", (len(data.wire_rows[part]), slab.shape[1]), slab.dtype)
        for part, rank in self._peers():
            self._transport.send(rank, "halo", mirrors[part].contiguous())
        for part, rank in self._peers():
            received = self._transport.receive(rank, "halo").to(own.device)
            own = own.index_add(0, data.wire_rows[part], received)
        return own
