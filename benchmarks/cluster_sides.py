"""The sides of `penstock bench cluster`: replicas that train on demand, and ranks that only sum."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster
from torch import Tensor, nn

from penstock.cluster.replicas import open_ray_place
from penstock.config import RunConfig
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.processes import open_processes
from penstock.engine.chunked.transport import Transport
from penstock.engine.reduce import sum_over
from penstock.observation import observed
from penstock.replica import OPEN_REPLICA, Leg
from penstock.replicated import ReplicaWorkers, replica_specs
from penstock.run import make_model, open_run
from penstock.storage.progress import silent

OPEN_REDUCER = "penstock.benchmarks.cluster_sides:open_reducer"


class ReplicaSide:
    """Replicas in processes, one thread each, that train on as many items as they are asked for."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.losses = config, list[float]()
        self._stack, self._step, self._reduce_s, self._wall_s = ExitStack(), 0, 0.0, 0.0

    def __enter__(self) -> "ReplicaSide":
        run = self._stack.enter_context(open_run(self.config))
        self._count = self.config.cluster.replicas
        specs = replica_specs(run, 1)
        self._backend = self._stack.enter_context(open_processes(specs, open_rank=OPEN_REPLICA))
        modes = self._backend.call("plan", [(self._count, None)] * self._count)
        mode = "rolling" if "rolling" in modes else "reuse"
        self._epoch_items: int = self._backend.call("prepare", [(mode,)] * self._count)[0]
        self._backend.call("open_feed", [(0, 1000 * self._epoch_items)] * self._count)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._stack.close()

    def advance(self, items: int) -> float:
        """Train on the next items; returns items per second."""
        left, began = items, perf_counter()
        while left:
            stop = min(self._step + left, (self._step // self._epoch_items + 1) * self._epoch_items)
            legs: list[Leg] = self._backend.call("advance", [(self._step, stop)] * self._count)
            self.losses += [loss for _, _, loss in sorted(found for leg in legs for found in leg.losses)]
            self._reduce_s += sum(leg.reduce_s for leg in legs) / self._count
            left, self._step = left - (stop - self._step), stop
        took = perf_counter() - began
        self._wall_s += took
        return items / took

    @property
    def reduce_share(self) -> float:
        """Share of the time that went into sums over replicas, waiting for the slower one among it."""
        return self._reduce_s / self._wall_s

    def checksum(self) -> str:
        """Of the weights; RuntimeError where replicas do not hold the same."""
        found = {checksum for checksum, _ in self._backend.call("export", [(False,)] * self._count)}
        if len(found) != 1:
            raise RuntimeError(f"replicas hold different weights: {sorted(found)}")
        return str(found.pop())


class FedSide:
    """A replica on one node of a Ray cluster, fed from another; both nodes are this machine."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._stack, self._step = ExitStack(), 0

    def __enter__(self) -> "FedSide":
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"trainer": 1}})
        self._stack.callback(cluster.shutdown)
        cluster.add_node(num_cpus=1, resources={"feeder": 1})
        config = self.config
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": cluster.address})})
        run = self._stack.enter_context(open_run(config))
        place = self._stack.enter_context(
            open_ray_place(config, folder=run.path, open_rank=OPEN_REPLICA, poll=run.poll)
        )
        self._feeders = self._stack.enter_context(place.open_feeders())
        backend = self._stack.enter_context(place.open_backend(replica_specs(run, 1)))
        watch = self._stack.enter_context(observed(config, silent))
        self._workers = ReplicaWorkers(run, backend, place.hosts(backend, 1), make_model(run), watch, self._feeders)
        self._epoch_items, _ = self._workers.prepare()
        self._stack.enter_context(self._workers.open(0, config.train.epochs * self._epoch_items))
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._stack.close()

    def epoch(self) -> tuple[float, float]:
        """Train an epoch; returns the seconds that the trainer waited for its feed, and all of them."""
        stalled, began = self._workers.times["stall"], perf_counter()
        ends = self._step + self._epoch_items
        while self._step < ends:
            stop = min(ends, self._step + self._workers.leg(self._step))
            self._workers.advance(self._step, stop)
            self._step = stop
        return self._workers.times["stall"] - stalled, perf_counter() - began

    def disk(self) -> list[tuple[str, int, int]]:
        """High-water mark and budget of the trainer's node and of each feeder."""
        assert self._feeders is not None
        (report,) = self._workers.reports()
        budget = self.config.budgets.disk or 0
        found = [("trainer", report.facts["pulled"]["disk_high_water"], budget)]
        for status in self._feeders.pool.status():
            found.append(("feeder", status["high_water_bytes"], status["disk_bytes"]))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ReducerSpec:
    """A rank that only sums."""

    rank: int
    layout: Layout
    scratch: Path
    threads: int = 1
    device: str = "cpu"
    timeout_s: float = 120.0

    @property
    def place(self) -> str:
        """The rank's name."""
        return f"rank {self.rank}"


class Reducer:
    """Sums vectors, and trains a small dense model, in our way and in torch's."""

    def __init__(self, transport: Transport, num_ranks: int) -> None:
        self._transport, self._num = transport, num_ranks
        self._ddp: nn.Module | None = None
        self._vector = torch.empty(0)

    def _take(self, floats: int) -> Tensor:
        if len(self._vector) != floats:
            self._vector = torch.ones(floats)
        return self._vector

    def _repeat(self, times: int, work: Callable[[], object]) -> None:
        for _ in range(times):
            work()

    def sum(self, floats: int, times: int) -> None:
        """Our sum."""
        vector = self._take(floats)
        self._repeat(times, lambda: sum_over(self._transport, self._num, vector, [True] * self._num))

    def all_reduce(self, floats: int, times: int) -> None:
        """Torch's."""
        vector = self._take(floats)
        self._repeat(times, lambda: dist.all_reduce(vector))

    def _model(self, floats: int) -> nn.Sequential:
        torch.manual_seed(0)
        width = int((floats / 4) ** 0.5)
        return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(4)])

    def step(self, floats: int, times: int) -> None:
        """Backward, then our sum."""
        model = self._model(floats)
        rows = torch.ones(64, next(model.parameters()).shape[1])
        parameters = list(model.parameters())

        def once() -> None:
            model.zero_grad(set_to_none=True)
            model(rows).sum().backward()
            vector = torch.cat([parameter.grad.reshape(-1) for parameter in parameters if parameter.grad is not None])
            sum_over(self._transport, self._num, vector, [True] * self._num)
            at = 0
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.copy_(vector[at : (at := at + parameter.numel())].view_as(parameter))

        self._repeat(times, once)

    def ddp_step(self, floats: int, times: int) -> None:
        """Backward under DDP."""
        if self._ddp is None:
            self._ddp = nn.parallel.DistributedDataParallel(self._model(floats))
        model: Any = self._ddp
        rows = torch.ones(64, next(model.parameters()).shape[1])

        def once() -> None:
            model.zero_grad(set_to_none=True)
            model(rows).sum().backward()

        self._repeat(times, once)


@contextmanager
def open_reducer(spec: ReducerSpec, transport: Transport, _: Callable[[int, int], None]) -> Iterator[Reducer]:
    """Be a rank that sums."""
    torch.set_num_threads(1)
    yield Reducer(transport, spec.layout.num_ranks)


__all__ = ["OPEN_REDUCER", "FedSide", "Reducer", "ReducerSpec", "ReplicaSide", "open_reducer"]
