"""Send tensors between processes over `torch.distributed`, point to point: gloo through host memory, or NCCL.

gloo moves a tensor once its receiver has posted the receive, and tells a finished send only to who waits for it. So a
lane holds at most `IN_FLIGHT` tensors that have not left; a plan that plays with unbuffered sends cannot block there.
A receive of NCCL is a kernel that waits on the device from when it is posted, in the sight of NCCL's watchdog and of
every call that synchronizes the device, so there it is posted when its send is due.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.transport import IN_FLIGHT, RECEIVES_AHEAD, Channel, PeerLost, silence

GroupBackend = Literal["gloo", "nccl"]
_TAGS: dict[str, int] = {"forward": 1, "backward": 2, "exact": 3, "halo": 4, "reduce": 5}
_MEET_S = 120.0  # at least: interpreters may read torch from a cold disk
_Lane = tuple[int, str]  # the other rank, and the channel


class TorchTransport:
    """A rank's end of an initialised process group; see `open_torch_transport`.

    On CUDA, gloo's tensors are staged in host memory. `groups` are NCCL's: see `_nccl_groups`.
    """

    def __init__(
        self, timeout_s: float, *, device: torch.device, groups: dict[tuple[str, bool], Any] | None = None
    ) -> None:
        self.rank, self.bytes_sent, self.wait_s = dist.get_rank(), 0, 0.0
        self.receives_ahead = RECEIVES_AHEAD if groups is None else 0
        self._timeout_s, self._device, self._groups = timeout_s, device, groups
        self._wire = torch.device("cpu") if groups is None else device
        self._sending: dict[_Lane, deque[tuple[Any, Tensor]]] = {}
        self._posted: dict[_Lane, deque[tuple[Any, Tensor]]] = {}

    def send(self, peer: int, channel: Channel, tensor: Tensor) -> None:
        """See Transport."""
        self.bytes_sent += tensor.nbytes
        if tensor.numel() == 0:
            return
        sending = self._sending.setdefault((peer, channel), deque())
        while len(sending) >= IN_FLIGHT:
            self._wait(sending.popleft()[0], peer, channel)
        tensor = tensor.detach().to(self._wire)
        # the tensor must live until it has left
        sending.append((self._post(dist.isend, tensor, peer, channel, is_up=peer > self.rank), tensor))

    def expect(self, peer: int, channel: Channel, shape: Sequence[int], dtype: torch.dtype) -> None:
        """See Transport."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._wire)
        work = self._post(dist.irecv, tensor, peer, channel, is_up=peer < self.rank) if tensor.numel() else None
        self._posted.setdefault((peer, channel), deque()).append((work, tensor))

    def _post(self, call: Any, tensor: Tensor, peer: int, channel: str, *, is_up: bool) -> Any:
        group = None if self._groups is None else self._groups[channel, is_up]
        try:
            return call(tensor, peer, group=group, tag=_TAGS[channel])
        except RuntimeError as error:
            raise PeerLost(f"rank {self.rank} lost rank {peer} ({channel}): {error}") from error

    def receive(self, peer: int, channel: Channel) -> Tensor:
        """See Transport."""
        work, tensor = self._posted[peer, channel].popleft()
        if work is not None:
            self._wait(work, peer, channel)
        return tensor.to(self._device)

    def _wait(self, work: Any, peer: int, channel: str) -> None:
        began = time.perf_counter()
        try:
            if self._groups is None:
                work.wait(timedelta(seconds=self._timeout_s))
            else:
                work.wait()  # orders the stream; a silent peer ends this process through NCCL's own watchdog
        except RuntimeError as error:  # gloo: "Timed out", "Connection closed by peer"
            if "imed out" in str(error):
                raise PeerLost(silence(self.rank, peer, channel, self._timeout_s)) from error
            raise PeerLost(f"rank {self.rank} lost rank {peer} ({channel}): {error}") from error
        finally:
            self.wait_s += time.perf_counter() - began

    def flush(self) -> None:
        """See Transport."""
        for (peer, channel), sending in self._sending.items():
            while sending:
                self._wait(sending.popleft()[0], peer, channel)

    def close(self) -> None:
        """See Transport."""
        self._sending.clear()
        self._posted.clear()


def _lanes(layout: Layout, low: int, high: int) -> list[tuple[str, bool]]:
    """What two ranks, `low` the lower, send each other in training: channels, and whether `low` is the sender."""
    lanes: list[tuple[str, bool]] = []
    if layout.next_rank(low) == high:
        lanes += [("forward", True), ("exact", True), ("backward", False)]
    if high in layout.peers(low):
        lanes += [("halo", True), ("halo", False)]
    is_one_part = layout.replica_of(low) == layout.replica_of(high) and layout.part_of(low) == layout.part_of(high)
    if lanes or is_one_part or high in layout.siblings(low):
        lanes += [("reduce", True), ("reduce", False)]
    return lanes


def _nccl_groups(rank: int, layout: Layout, device: torch.device) -> dict[tuple[str, bool], Any]:
    """Groups by channel and whether the lower rank is the sender, with the connections of training made.

    What NCCL does on one connection happens in the order in which it was posted, receives too: two ranks that both post
    a receive and then send would wait for ever. So each direction of each channel has its own group. The first use of a
    connection waits for the other rank; so all are made here, in an order that is the same everywhere.
    """
    everyone = list(range(layout.num_ranks))
    groups = {(channel, is_up): dist.new_group(everyone) for channel in _TAGS for is_up in (True, False)}
    token = torch.zeros(1, device=device)
    for low in everyone:
        for high in everyone[low + 1 :]:
            for channel, is_up in _lanes(layout, low, high) if rank in (low, high) else ():
                call = dist.send if is_up == (rank == low) else dist.recv
                call(token, low + high - rank, group=groups[channel, is_up])
    torch.cuda.synchronize(device)
    return groups


@contextmanager
def open_torch_transport(
    rank: int, layout: Layout, store: Store, *, backend: GroupBackend, device: torch.device, timeout_s: float
) -> Iterator[TorchTransport]:
    """Join the process group of a run's ranks, one per process; PeerLost where one does not come in time."""
    meet_s = max(timeout_s, _MEET_S)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=layout.num_ranks, timeout=timedelta(seconds=meet_s)
        )
    except RuntimeError as error:
        raise PeerLost(f"rank {rank} did not meet the other ranks within {meet_s:.0f} s: {error}") from error
    try:
        groups = _nccl_groups(rank, layout, device) if backend == "nccl" else None
        transport = TorchTransport(timeout_s, device=device, groups=groups)
        try:
            yield transport
        finally:
            transport.close()
    finally:
        dist.destroy_process_group()
