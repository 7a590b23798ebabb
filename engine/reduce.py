"""Sums of gradients whose bits depend on the items alone, not on how many replicas share them.

Vectors are added pairwise, as a binary counter adds: two sums of equally many items become one. A replica's run of
2^k items is then a subtree of the sum over all, so one replica and R replicas add in the same order. Where a replica's
share is no power of two, sums differ by rounding.

Across replicas every rank adds up one R-th of the vector and sends the result around: 2 (R - 1) / R of the vector is
sent per rank, as by a ring, in two rounds, and every sum is formed once, in the order of the ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.engine.chunked.transport import Transport


class PairwiseSum:
    """Adds up vectors of one shape, in order; keeps at most log2(n) + 1 of them, in memory that it reuses."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, Tensor]] = []
        self._spare: list[Tensor] = []

    def buffer(self, like: Tensor) -> Tensor:
        """Memory for the next vector, with whatever was in it."""
        return self._spare.pop() if self._spare else torch.empty_like(like)

    def add(self, vector: Tensor) -> None:
        """Take a vector, which is ours from now on."""
        level = 0
        while self._sums and self._sums[-1][0] == level:
            vector = self._merge(self._sums.pop()[1], vector)
            level += 1
        self._sums.append((level, vector))

    def _merge(self, earlier: Tensor, later: Tensor) -> Tensor:
        self._spare.append(later)
        return earlier.add_(later)

    def total(self) -> Tensor | None:
        """The sum, None of nothing; begins anew. The tensor is the caller's until it comes back with `recycle`."""
        if not self._sums:
            return None
        _, total = self._sums.pop()
        while self._sums:
            total = self._merge(self._sums.pop()[1], total)
        return total

    def recycle(self, vector: Tensor) -> None:
        """Give memory back."""
        self._spare.append(vector)


def sum_over(transport: Transport, num_ranks: int, vector: Tensor, present: Sequence[bool]) -> None:
    """Replace `vector` [P], contiguous, by the sum over the ranks that are `present`. Raises PeerLost.

    Every rank calls it, with the same `present`; what an absent rank brings is ignored.
    """
    assert any(present), "a step without any item"
    if num_ranks == 2:  # as many bytes, in one round instead of two
        vector.copy_(_exchange(transport, [vector, vector], present))
    else:
        _sum_in_shards(transport, vector.tensor_split(num_ranks), present)
    transport.flush()  # else copies of the last few vectors stay in memory, as sends that nobody waited for


def _sum_in_shards(transport: Transport, shards: Sequence[Tensor], present: Sequence[bool]) -> None:
    own, others = transport.rank, [rank for rank in range(len(shards)) if rank != transport.rank]
    total = _exchange(transport, shards, present)
    for rank in others:
        transport.expect(rank, "reduce", shards[rank].shape, shards[rank].dtype)
    for rank in others:
        transport.send(rank, "reduce", total)
    shards[own].copy_(total)
    for rank in others:
        shards[rank].copy_(transport.receive(rank, "reduce"))


def _exchange(transport: Transport, pieces: Sequence[Tensor], present: Sequence[bool]) -> Tensor:
    """Send every rank its piece, and sum what ranks have of ours, in their order; the sum is in fresh memory."""
    own, others = transport.rank, [rank for rank in range(len(pieces)) if rank != transport.rank]
    for rank in others:
        if present[rank]:
            transport.expect(rank, "reduce", pieces[own].shape, pieces[own].dtype)
    if present[own]:
        for rank in others:
            # a copy: what is sent must not change, and the caller's vector will
            transport.send(rank, "reduce", pieces[rank].clone())
    sums = PairwiseSum()
    for rank in range(len(pieces)):
        if present[rank]:
            sums.add(pieces[own].clone() if rank == own else transport.receive(rank, "reduce").to(pieces[own].device))
    total = sums.total()
    assert total is not None
    return total
