"""Send tensors between ranks: what a rank needs for it, and queues among threads; `torch_transport` has processes.

Every (source, destination, channel) is a first-in-first-out lane; receives are posted ahead, so that bytes arrive while
the receiver computes. No wait is endless: after `timeout_s`, or once another rank has failed, it raises PeerLost.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

Channel = Literal["forward", "backward", "exact", "halo", "reduce"]
_POLL_S = 0.05
IN_FLIGHT = 4  # tensors of a lane that are sent and not expected yet; more would be memory that no budget counts
RECEIVES_AHEAD = 2  # receives of a lane that wait while a rank computes, where waiting costs nothing
_T = TypeVar("_T")


class PeerLost(RuntimeError):
    """Another rank failed or did not answer in time."""


class Transport(Protocol):
    """What a rank needs to reach the others; used by one thread at a time."""

    rank: int
    bytes_sent: int
    wait_s: float
    receives_ahead: int
    "How many receives per lane may be posted before their sends are due."

    def send(self, peer: int, channel: Channel, tensor: Tensor) -> None:
        """Start to send a contiguous tensor, which must not change any more. Raises PeerLost.

        May wait until the receiver has taken what was sent before on the lane: nothing may rely on sends that buffer.
        """

    def expect(self, peer: int, channel: Channel, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Post a receive; each one is taken by one later `receive`, in order."""

    def receive(self, peer: int, channel: Channel) -> Tensor:
        """Wait for the oldest tensor expected on a lane. Raises PeerLost."""

    def flush(self) -> None:
        """Wait until everything sent has left. Raises PeerLost."""

    def close(self) -> None:
        """Give up what is under way."""


class _Lane:
    """Tensors on their way. The sender may be `IN_FLIGHT` ahead of what the receiver expects, not any further."""

    def __init__(self) -> None:
        self.tensors: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self.room = threading.Semaphore(IN_FLIGHT)


class ThreadHub:
    """The lanes between ranks that are threads of one process; setting `aborted` ends every wait."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[int, int, str], _Lane] = {}
        self._lock = threading.Lock()
        self.aborted = threading.Event()

    def lane(self, source: int, destination: int, channel: str) -> _Lane:
        """Find a lane, made at first use."""
        with self._lock:
            return self._lanes.setdefault((source, destination, channel), _Lane())


class ThreadTransport:
    """A rank's end of a ThreadHub; tensors are handed over without a copy."""

    def __init__(self, hub: ThreadHub, rank: int, timeout_s: float) -> None:
        self.rank, self.bytes_sent, self.wait_s, self.receives_ahead = rank, 0, 0.0, RECEIVES_AHEAD
        self._hub, self._timeout_s = hub, timeout_s

    def send(self, peer: int, channel: Channel, tensor: Tensor) -> None:
        """See Transport."""
        self.bytes_sent += tensor.nbytes
        lane = self._hub.lane(self.rank, peer, channel)
        self._wait(peer, channel, lambda: lane.room.acquire(timeout=_POLL_S) or None)
        lane.tensors.put(tensor)

    def expect(self, peer: int, channel: Channel, shape: Sequence[int], dtype: torch.dtype) -> None:
        """See Transport."""
        self._hub.lane(peer, self.rank, channel).room.release()

    def receive(self, peer: int, channel: Channel) -> Tensor:
        """See Transport."""
        lane = self._hub.lane(peer, self.rank, channel)

        def get() -> Tensor | None:
            with contextlib.suppress(queue.Empty):
                return lane.tensors.get(timeout=_POLL_S)
            return None

        return self._wait(peer, channel, get)

    def _wait(self, peer: int, channel: str, attempt: Callable[[], _T | None]) -> _T:
        """Attempt until something comes of it."""
        began = time.perf_counter()
        try:
            while (found := attempt()) is None:
                if self._hub.aborted.is_set():
                    raise PeerLost(f"rank {self.rank} stopped waiting for rank {peer}: another rank failed")
                if time.perf_counter() - began > self._timeout_s:
                    raise PeerLost(silence(self.rank, peer, channel, self._timeout_s))
            return found
        finally:
            self.wait_s += time.perf_counter() - began

    def flush(self) -> None:
        """Wait for nothing: who has a tensor in a lane need not keep it."""

    def close(self) -> None:
        """Nothing is held."""


def patience_s(timeout_s: float) -> float:
    """For how long a rank waits for another: longer than who drives them, which knows better who is to blame."""
    return 1.25 * timeout_s + 5


def silence(rank: int, peer: int, channel: str, timeout_s: float) -> str:
    """What PeerLost says after a wait of `timeout_s`."""
    return (
        f"rank {rank} waited {timeout_s:.0f} s for rank {peer} ({channel}); look at that rank's log, or raise "
        "chunked.timeout_s if its chunks take longer"
    )


def gather_all(transport: Transport, ranks: Sequence[int], tensor: Tensor) -> list[Tensor]:
    """Tensors of equal shape of all `ranks`, this one's among them, in the order of `ranks`.

    Sums over the result have the same bits on every rank and every backend.
    """
    others = [rank for rank in ranks if rank != transport.rank]
    for rank in others:
        transport.expect(rank, "reduce", tensor.shape, tensor.dtype)
    for rank in others:
        transport.send(rank, "reduce", tensor)
    found = (tensor if rank == transport.rank else transport.receive(rank, "reduce") for rank in ranks)
    return [each.to(tensor.device) for each in found]
