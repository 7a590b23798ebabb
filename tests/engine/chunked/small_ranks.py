"""Ranks that do small things, for processes to be tested with: children import this file by name."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.schedule import EpochPlan
from penstock.engine.chunked.spec import FeatureSpec, RankSpec
from penstock.engine.chunked.torch_transport import TorchTransport
from penstock.engine.chunked.transport import Channel, PeerLost, Transport, gather_all
from penstock.engine.models import ModelConfig
from penstock.engine.trainer import TrainConfig
from penstock.storage.errors import DataError, DoesNotFit

CHANNELS: tuple[Channel, ...] = ("forward", "backward", "exact", "halo", "reduce")
SIZES = [(3, 5), (0, 5), (40, 7), (1, 1), (0, 1), (300, 64)]  # rows, columns
LARGE = (1300, 1024)  # float32: 5 MiB


def small_specs(
    scratch: Path, stages: int = 2, parts: int = 1, timeout_s: float = 60.0, replicas: int = 1, **options: Any
) -> list[RankSpec]:
    """Specs of ranks that read nothing but `scratch`."""
    layout, nowhere = Layout(stages, parts, replicas), scratch / "nothing"
    return [
        RankSpec(
            rank=rank,
            layout=layout,
            units=tuple((stage, stage + 1) for stage in range(stages)),
            graph=nowhere,
            chunks=nowhere,
            scratch=scratch,
            weights=nowhere,
            model=ModelConfig(),
            train=TrainConfig(),
            chunked=ChunkedConfig(stages=stages, parts=parts, timeout_s=timeout_s),
            features=FeatureSpec(kind="memory"),
            first_hidden=1,
            recompute=True,
            history_memory=0,
            feed_memory=0,
            **options,
        )
        for rank in range(layout.num_ranks)
    ]


def _tensor(source: int, destination: int, channel: str, number: int, shape: tuple[int, int]) -> torch.Tensor:
    seed = ((source * 100 + destination) * 100 + CHANNELS.index(channel)) * 1000 + number
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def crossfire(transport: Transport, num_ranks: int, device: str = "cpu") -> tuple[int, list[str]]:
    """Send 30 tensors on every lane at once; bytes sent, and what arrived other than it should."""
    peers = [peer for peer in range(num_ranks) if peer != transport.rank]
    lanes = [(peer, channel) for peer in peers for channel in CHANNELS]
    items = [(number, SIZES[number % len(SIZES)]) for number in range(30)]
    wrong, before = [], transport.bytes_sent
    for peer, channel in lanes:
        for _, shape in items:
            transport.expect(peer, channel, shape, torch.float32)
    for number, shape in items:
        for peer, channel in lanes:
            transport.send(peer, channel, _tensor(transport.rank, peer, channel, number, shape).to(device))
    for peer, channel in reversed(lanes):
        for number, shape in items:
            found, wanted = transport.receive(peer, channel), _tensor(peer, transport.rank, channel, number, shape)
            if found.device.type != torch.device(device).type or not torch.equal(found.cpu(), wanted):
                wrong.append(f"{peer} -> {transport.rank} {channel} {number}")
    transport.flush()
    return transport.bytes_sent - before, wrong


def large_both_ways(transport: Transport, num_ranks: int) -> tuple[int, bool]:
    """Send 5 MiB to the other of two ranks, while it does; bytes sent, and whether it arrived."""
    peer, before = 1 - transport.rank, transport.bytes_sent
    for number in range(8):
        transport.expect(peer, "forward", LARGE, torch.float32)
        transport.send(peer, "forward", _tensor(transport.rank, peer, "forward", number, LARGE))
    right = all(
        torch.equal(transport.receive(peer, "forward"), _tensor(peer, transport.rank, "forward", number, LARGE))
        for number in range(8)
    )
    transport.flush()
    return transport.bytes_sent - before, right


def gather(transport: Transport, num_ranks: int) -> torch.Tensor:
    """The tensors of all ranks, in order."""
    mine = _tensor(transport.rank, 0, "reduce", 0, (4, 3))
    found = torch.stack(gather_all(transport, list(range(num_ranks)), mine))
    transport.flush()
    return found


def wait_for_silence(transport: Transport, num_ranks: int) -> str:
    """Rank 0 waits for what nobody sends; what it says."""
    if transport.rank != 0:
        return ""
    patient = TorchTransport(0.3, device=torch.device("cpu")) if isinstance(transport, TorchTransport) else transport
    patient.expect(1, "exact", (1, 1), torch.float32)
    try:
        patient.receive(1, "exact")
    except PeerLost as error:
        return str(error)
    return "it came"


def leave(transport: Transport, num_ranks: int) -> str:
    """Rank 1 goes away while rank 0 waits for it; what rank 0 says."""
    if transport.rank == 1:
        dist.destroy_process_group()
        return ""
    transport.expect(1, "halo", (1, 1), torch.float32)
    try:
        transport.receive(1, "halo")
    except PeerLost as error:
        return str(error)
    return "it came"


SCRIPTS: dict[str, Callable[[Transport, int], Any]] = {
    script.__name__: script for script in (crossfire, large_both_ways, gather, wait_for_silence, leave)
}


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_for_ever() -> None:
    while True:
        time.sleep(1)


class SmallRank:
    """A rank whose methods are what a test needs."""

    def __init__(self, spec: RankSpec, transport: Transport, heartbeat: Callable[[int, int], None]) -> None:
        self.spec, self.transport, self.heartbeat = spec, transport, heartbeat

    def run(self, script: str) -> Any:
        return SCRIPTS[script](self.transport, self.spec.layout.num_ranks)

    def crossfire_on_device(self) -> tuple[int, list[str]]:
        return crossfire(self.transport, self.spec.layout.num_ranks, self.spec.device)

    def surroundings(self) -> dict[str, Any]:
        print("this is not for the user's stdout")
        names = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "GLOO_SOCKET_IFNAME")
        values = {"pid": os.getpid(), "path": list(sys.path), "main": getattr(sys.modules["__main__"], "__file__", "")}
        return values | {name: os.environ.get(name, "") for name in names}

    def weights(self, scale: float) -> dict[str, torch.Tensor]:
        return {"w": torch.arange(6.0).view(2, 3)[:, 1:] * scale, "rank": torch.tensor(self.spec.rank)}

    def refuse(self, rank: int, kind: str) -> None:
        """One rank fails, the others wait for it."""
        if self.spec.rank != rank:
            self.transport.expect(rank, "forward", (1, 1), torch.float32)
            self.transport.receive(rank, "forward")
        if kind == "DoesNotFit":
            raise DoesNotFit("history_memory=5 is too small; set 7", host_bytes=7)
        raise AssertionError("what we thought could not be")

    def train_epoch(self, plan: EpochPlan, dies: int, at: int) -> None:
        """Rank `dies` is killed in its action `at`; the others wait for it."""
        for done in range(at):
            self.heartbeat(done + 1, len(plan.actions[self.spec.rank]))
        if self.spec.rank == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        self.transport.expect(dies, "forward", (1, 1), torch.float32)
        self.transport.receive(dies, "forward")

    def beat(self) -> None:
        """Rank n is at action n + 1 of 9 until `go` is there."""
        self.heartbeat(self.spec.rank + 1, 9)
        while not (self.spec.scratch / "go").exists():
            time.sleep(0.01)

    def freeze(self, plan: EpochPlan, stops: int, at: int) -> None:
        """Rank `stops` is stopped by a signal in its action `at`; the others come further and wait for it."""
        own = len(plan.actions[self.spec.rank])
        for done in range(at if self.spec.rank == stops else at + 1):
            self.heartbeat(done + 1, own)
        if self.spec.rank == stops:
            stop_here()
        self.transport.expect(stops, "forward", (1, 1), torch.float32)
        self.transport.receive(stops, "forward")

    def get_stuck(self, rank: int) -> None:
        """One rank does nothing any more, and nobody waits for it."""
        if self.spec.rank == rank:
            sleep_for_ever()

    def take(self, data: bytes) -> int:
        return len(data)

    def sleep(self) -> None:
        (self.spec.scratch / f"asleep-{self.spec.rank}").touch()
        time.sleep(600)


@contextmanager
def open_small(spec: RankSpec, transport: Transport, heartbeat: Callable[[int, int], None]) -> Iterator[SmallRank]:
    """A SmallRank that leaves a file behind when it is closed in good order."""
    yield SmallRank(spec, transport, heartbeat)
    (spec.scratch / f"closed-{spec.rank}").touch()


@contextmanager
def open_badly(spec: RankSpec, transport: Transport, heartbeat: Callable[[int, int], None]) -> Iterator[SmallRank]:
    """Rank 1 does not like its graph."""
    if spec.rank == 1:
        raise DataError(f"{spec.graph} is not a graph; ingest one")
    yield SmallRank(spec, transport, heartbeat)


@contextmanager
def open_never(spec: RankSpec, transport: Transport, heartbeat: Callable[[int, int], None]) -> Iterator[SmallRank]:
    """Rank 0 does not come to an end with opening, and rank 1 waits for it."""
    if spec.rank == 0:
        sleep_for_ever()
    transport.expect(0, "forward", (1, 1), torch.float32)
    transport.receive(0, "forward")
    yield SmallRank(spec, transport, heartbeat)
