"""Send tensors between ranks: through queues among threads, through `torch.distributed` among processes.

Every (source, destination, channel) is a first-in-first-out lane; receives are posted ahead, so that bytes arrive while the
receiver computes. No wait is endless: after `timeout_s`, or once another rank has failed, it raises PeerLost.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Channel = Literal["forward", "backward", "exact", "halo", "reduce"]
_TAGS: dict[str, int] = {"forward": 1, "backward": 2, "exact": 3, "halo": 4, "reduce": 5}
_POLL_S = 0.05


class PeerLost(RuntimeError):
    """Another rank failed or did not answer in time."""


class Transport(Protocol):
    """What a rank needs to reach the others; used by one thread at a time."""

    rank: int
    bytes_sent: int
    wait_s: float

    def send(self, peer: int, channel: Channel, tensor: Tensor) -> None:
        """Start to send a contiguous tensor, which must not change any more."""

    def expect(self, peer: int, channel: Channel, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Post a receive; each one is taken by one later `receive`, in order."""

    def receive(self, peer: int, channel: Channel) -> Tensor:
        """Wait for the oldest tensor expected on a lane. Raises PeerLost."""

    def flush(self) -> None:
        """Wait until everything sent has left. Raises PeerLost."""

    def close(self) -> None:
        """Give up what is under way."""


class ThreadHub:
    """The lanes between ranks that are threads of one process; `abort` wakes every wait."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[int, int, str], queue.SimpleQueue[Tensor]] = {}
        self._lock = threading.Lock()
        self.aborted = threading.Event()

    def lane(self, source: int, destination: int, channel: str) -> "queue.SimpleQueue[Tensor]":
        """The queue of a lane, made at first use."""
        with self._lock:
            return self._lanes.setdefault((source, destination, channel), queue.SimpleQueue())

    def clear(self) -> None:
        """Forget what a failed call left behind."""
        with self._lock:
            self._lanes.clear()


class ThreadTransport:
    """A rank's end of a ThreadHub; tensors are handed over without a copy."""

    def __init__(self, hub: ThreadHub, rank: int, timeout_s: float) -> None:
        self.rank, self.bytes_sent, self.wait_s = rank, 0, 0.0
        self._hub, self._timeout_s = hub, timeout_s

    def send(self, peer: int, channel: Channel, tensor: Tensor) -> None:
        """See Transport."""
        self.bytes_sent += tensor.nbytes
        self._hub.lane(self.rank, peer, channel).put(tensor)

    def expect(self, peer: int, channel: Channel, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Nothing to prepare."""

    def receive(self, peer: int, channel: Channel) -> Tensor:
        """See Transport."""
        lane = self._hub.lane(peer, self.rank, channel)
        began = time.perf_counter()
        while True:
            try:
                tensor = lane.get(timeout=_POLL_S)
                self.wait_s += time.perf_counter() - began
                return tensor
            except queue.Empty:
                if self._hub.aborted.is_set():
                    raise PeerLost(f"rank {self.rank} stopped waiting for rank {peer}: another rank failed") from None
                if time.perf_counter() - began > self._timeout_s:
                    raise PeerLost(_silence(self.rank, peer, channel, self._timeout_s)) from None

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Nothing is held."""


def _silence(rank: int, peer: int, channel: str, timeout_s: float) -> str:
    return (
        f"rank {rank} waited {timeout_s:.0f} s for rank {peer} ({channel}); look at that rank's log, or raise "
        "chunked.timeout_s if its chunks take longer"
    )


class TorchTransport:
    """Point to point over a `torch.distributed` group that the caller has initialised: gloo on CPU, NCCL on CUDA.

    Every channel has its own group under NCCL, whose lanes are ordered per communicator, and its own tag under gloo.
    """

    def __init__(self, timeout_s: float, *, device: torch.device) -> None:
        self.rank, self.bytes_sent, self.wait_s = dist.get_rank(), 0, 0.0
        self._device, self._timeout_s = device, timeout_s
        self._groups: dict[str, Any] = {}
        if dist.get_backend() == "nccl":
            everyone = list(range(dist.get_world_size()))
            self._groups = {name: dist.new_group(everyone) for name in _TAGS}
        self._sending: deque[tuple[Any, Tensor, int, str]] = deque()
        self._posted: dict[tuple[int, str], deque[tuple[Any, Tensor]]] = {}

    def send(self, peer: int, channel: Channel, tensor: Tensor) -> None:
        """See Transport."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        self.bytes_sent += tensor.nbytes
        if tensor.numel() == 0:
            return
        work = self._post(dist.isend, tensor, peer, channel)
        self._sending.append((work, tensor, peer, channel))

    def _post(self, call: Any, tensor: Tensor, peer: int, channel: str) -> Any:
        try:
            return call(tensor, peer, group=self._groups.get(channel), tag=_TAGS[channel])
        except RuntimeError as error:
            raise PeerLost(f"rank {self.rank} cannot reach rank {peer} ({channel}): {error}") from error

    def expect(self, peer: int, channel: Channel, shape: Sequence[int], dtype: torch.dtype) -> None:
        """See Transport."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        work = self._post(dist.irecv, tensor, peer, channel) if tensor.numel() else None
        self._posted.setdefault((peer, channel), deque()).append((work, tensor))

    def receive(self, peer: int, channel: Channel) -> Tensor:
        """See Transport."""
        work, tensor = self._posted[peer, channel].popleft()
        if work is not None:
            self._wait(work, peer, channel)
        return tensor

    def _wait(self, work: Any, peer: int, channel: str) -> None:
        began = time.perf_counter()
        try:
            work.wait(timedelta(seconds=self._timeout_s)) if self._device.type == "cpu" else work.wait()
        except RuntimeError as error:  # gloo: "Timed out", "Connection closed by peer"
            if "imed out" in str(error):
                raise PeerLost(_silence(self.rank, peer, channel, self._timeout_s)) from error
            raise PeerLost(f"rank {self.rank} lost rank {peer} ({channel}): {error}") from error
        self.wait_s += time.perf_counter() - began

    def flush(self) -> None:
        """See Transport."""
        while self._sending:
            work, _, peer, channel = self._sending.popleft()
            self._wait(work, peer, channel)

    def close(self) -> None:
        """Drop what is under way; the caller destroys the group."""
        self._sending.clear()
        self._posted.clear()


def gather_all(transport: Transport, ranks: Sequence[int], tensor: Tensor) -> list[Tensor]:
    """Tensors of equal shape of all `ranks`, this one's among them, in the order of `ranks`.

    Sums over the result have the same bits on every rank and every backend.
    """
    others = [rank for rank in ranks if rank != transport.rank]
    for rank in others:
        transport.expect(rank, "reduce", tensor.shape, tensor.dtype)
    for rank in others:
        transport.send(rank, "reduce", tensor)
    return [tensor if rank == transport.rank else transport.receive(rank, "reduce") for rank in ranks]
