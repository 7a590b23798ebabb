"""A replica of the model in sampled training: it samples, packs and feeds its own items on the disk of its host.

Replicas run in processes or actors that a backend drives (`engine.chunked.backend`): the driver calls their methods,
and they exchange nothing among themselves but sums of gradients. All of them hold the same weights, bit for bit.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from penstock.config import RunConfig
from penstock.engine.checkpoint import pack_tensors
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.transport import Transport
from penstock.engine.evaluate import count_feed
from penstock.engine.feed import open_pack_feed
from penstock.engine.minibatch import MiniBatch
from penstock.engine.prefetch import FeedStats
from penstock.engine.reduce import sum_over
from penstock.engine.trainer import ModelState, make_stepper, torch_threads
from penstock.engine.trainloop import Tensors, update_rate
from penstock.feeds import open_train_feed
from penstock.prepare import Prepared, own_splits, prepare
from penstock.run import Run, make_model
from penstock.sampler.neighbors import count_items
from penstock.storage.budget import available_memory, free_disk, peak_rss_bytes
from penstock.storage.deal import Deal
from penstock.storage.graph import Split, open_graph
from penstock.storage.manifest import read_json, write_json
from penstock.storage.remote.hostlock import flocked

OPEN_REPLICA = "penstock.replica:open_replica"
_IDENTITY = "replica.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """What a replica is told when it starts; paths are absolute. A `backend.WorkerSpec`."""

    rank: int
    layout: Layout
    scratch: Path
    threads: int
    device: str
    timeout_s: float
    config: RunConfig

    @property
    def place(self) -> str:
        """The replica's name."""
        return f"replica {self.rank} of 0..{self.layout.num_ranks - 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """What a replica did in one call of `advance`: per item its whole number, seeds and loss; seconds by cause."""

    losses: tuple[tuple[int, int, float], ...]
    compute_s: float
    stall_s: float
    reduce_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """A replica in numbers, since it was opened."""

    rank: int
    items: int
    compute_s: float
    stall_s: float
    reduce_s: float
    prepare_s: float
    bytes_sent: int
    feed: FeedStats | None
    plan: dict[str, Any] | None
    peak_rss_bytes: int


def _own_config(spec: ReplicaSpec, sharing: int) -> RunConfig:
    """The run's configuration for a folder of this replica; what the user left open is shared on a host."""
    config, folder = spec.config, replica_folder(spec.config, spec.rank, spec.layout.num_ranks)
    budgets = config.budgets
    open_budgets: dict[str, int] = {}
    if budgets.host_memory is None:
        open_budgets["host_memory"] = available_memory() // (2 * sharing)
    if budgets.disk is None:
        open_budgets["disk"] = free_disk(folder) * 9 // (10 * sharing)
    return config.model_copy(
        update={
            "run_dir": folder,
            "budgets": budgets.model_copy(update=open_budgets),
            "train": config.train.model_copy(update={"device": spec.device, "threads": spec.threads}),
        }
    )


def replica_folder(config: RunConfig, rank: int, replicas: int) -> Path:
    """Where a replica keeps packs and scratch, on its own host."""
    return config.work_dir / f"replica-{rank}-of-{replicas}"


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Clear the folder unless it holds the packs of this very run; and delete those of other numbers of replicas."""
    suffix = folder.name[folder.name.index("-of-") :]
    for other in folder.parent.glob("replica-*-of-*"):
        if not other.name.endswith(suffix):
            shutil.rmtree(other, ignore_errors=True)
    if not (folder / _IDENTITY).is_file() or read_json(folder / _IDENTITY) != identity:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith(".lock"):
                path.unlink()
        write_json(folder / _IDENTITY, identity)


class Replica:
    """See the module; made by `open_replica`. Methods are called by the driver, one at a time."""

    def __init__(self, spec: ReplicaSpec, transport: Transport, heartbeat: Callable[[int, int], None]) -> None:
        self.spec, self._transport, self._beat = spec, transport, heartbeat
        self._config, self._replicas = spec.config, spec.layout.num_ranks
        self._stack, self._feed_stack = ExitStack(), ExitStack()
        self._items, self._reduce_s, self._times = 0, 0.0, {"compute": 0.0, "stall": 0.0}
        self._prepare_s = 0.0

    def prepare(self, sharing: int) -> int:
        """Sample and pack own items, or find that it is done; `sharing` replicas share this host. Returns the items of
        an epoch, of all replicas."""
        began = time.perf_counter()
        folder = replica_folder(self._config, self.spec.rank, self._replicas)
        folder.mkdir(parents=True, exist_ok=True)
        # a replica of the attempt before this one may still be dying
        self._stack.enter_context(flocked(folder / ".lock", wait_s=self.spec.timeout_s))
        graph = open_graph(self._config.dataset)
        digest = self._config.digest()
        _claim(folder, {"run": digest, "graph": graph.fingerprint})
        config = _own_config(self.spec, sharing)
        self.run = Run(config, graph, self._progress, threading.Event(), rank=self.spec.rank, replicas=self._replicas)
        self._packs = self._prepare_packs()
        self._feed = open_train_feed(self.run, self._packs.get("train"))
        batch_size = config.sampler.batch_size
        self._epoch_items = count_items(graph, "train", batch_size)
        self._deals = [self._deal(rank) for rank in range(self._replicas)]
        model = make_model(self.run)
        self._state = ModelState(make_stepper(model, config.train, grouped=config.train.accumulate > 1))
        self._prepare_s = time.perf_counter() - began
        return self._epoch_items

    def _prepare_packs(self) -> dict[Split, Prepared]:
        splits = own_splits(self.run)
        return prepare(self.run, splits if self._config.feed == "memory" else (*splits, "train"))

    def _deal(self, rank: int) -> Deal:
        return Deal(
            replicas=self._replicas,
            rank=rank,
            group_items=self._config.train.accumulate,
            epoch_items=self._epoch_items,
        )

    def open_feed(self, start: int, stop: int) -> None:
        """Be ready for items [start, stop) of all replicas."""
        deal = self._deals[self.spec.rank]
        self._feed_stack.close()
        feed = self._feed_stack.enter_context(self._feed.open(deal.own_before(start), deal.own_before(stop)))
        self._batches = iter(feed)
        self._state.stepper.model.train()

    def close_feed(self) -> None:
        """Stop what reads ahead."""
        self._feed_stack.close()

    def advance(self, start: int, stop: int) -> Leg:
        """Train on items [start, stop) of one epoch, group by group."""
        group, before = self._config.train.accumulate, (*self._times.values(), self._state.stepper.reduce_s)
        found: list[tuple[int, int, torch.Tensor]] = []
        for first in range(start, stop, group):
            found += self._train_group(first, min(stop, first + group))
            self._beat(min(stop, first + group) - start, stop - start)
        losses = torch.stack([loss for *_, loss in found]).tolist() if found else []
        after = (*self._times.values(), self._state.stepper.reduce_s)
        compute_s, stall_s, reduce_s = (now - then for now, then in zip(after, before, strict=True))
        self._items += len(found)
        return Leg(
            losses=tuple((step, seeds, loss) for (step, seeds, _), loss in zip(found, losses, strict=True)),
            compute_s=compute_s - reduce_s,
            stall_s=stall_s,
            reduce_s=reduce_s,
        )

    def _train_group(self, start: int, stop: int) -> list[tuple[int, int, torch.Tensor]]:
        deal, stepper = self._deals[self.spec.rank], self._state.stepper
        counts = [each.own_before(stop) - each.own_before(start) for each in self._deals]
        own = deal.own_before(start)
        found = []
        stepper.begin_group()
        for number in range(own, own + counts[self.spec.rank]):
            began = time.perf_counter()
            batch = next(self._batches)
            got = time.perf_counter()
            assert batch.step == number, f"the feed gave step {batch.step}, wanted {number}"
            whole = deal.whole(number)
            found.append((whole, batch.num_seeds, stepper.add(batch, whole)))
            self._times["stall"] += got - began
            self._times["compute"] += time.perf_counter() - got
        began = time.perf_counter()
        present = [count > 0 for count in counts]
        rate = update_rate(self._config.train, start, self._epoch_items)
        if self._replicas == 1:
            stepper.step(rate)
        else:
            stepper.step(rate, lambda vector: sum_over(self._transport, self._replicas, vector, present))
        self._times["compute"] += time.perf_counter() - began
        return found

    def evaluate(self, splits: tuple[Split, ...]) -> dict[Split, dict[str, Any]]:
        """Count own items of sampled splits; `Counts.add` adds up what replicas say."""
        return {split: self._count(split) for split in splits if split in self._packs}

    def _count(self, split: Split) -> dict[str, Any]:
        prepared, run = self._packs[split], self.run
        with open_pack_feed(
            prepared.packs,
            run.graph,
            start_step=0,
            stop_step=prepared.summary.num_items,
            host_memory=run.evaluation_bytes,
            device=run.config.train.device,
            threads=run.threads,
        ) as feed:
            batches = self._beating(feed, prepared.summary.num_items)
            return count_feed(self._state.stepper.model, batches, run.graph.meta.num_classes).export()

    def _beating(self, batches: Iterator[MiniBatch], total: int) -> Iterator[MiniBatch]:
        for done, batch in enumerate(batches):
            yield batch
            self._beat(done + 1, total)

    def keep_best(self) -> None:
        """Keep the weights as they are now."""
        self._state.keep_best()

    def take_best(self) -> None:
        """Go on with the best weights, if any were kept."""
        self._state.take_best()

    def export(self, whole: bool) -> tuple[str, tuple[Tensors, dict[str, Any]] | None]:
        """Checksum of the weights and, of one replica, what a checkpoint holds."""
        checksum = xxhash.xxh3_64_hexdigest(pack_tensors(self._state.stepper.model.state_dict()))
        if not whole:
            return checksum, None
        tensors, scaler = self._state.export()
        return checksum, ({name: dict(named) for name, named in tensors.items()}, scaler)

    def restore(self, tensors: Tensors, scaler: dict[str, Any]) -> None:
        """Take what `export` gave."""
        self._state.restore(tensors, scaler)

    def report(self) -> ReplicaReport:
        """This replica in numbers."""
        reduce_s = self._state.stepper.reduce_s
        prepared = self._packs.get("train")
        return ReplicaReport(
            rank=self.spec.rank,
            items=self._items,
            compute_s=self._times["compute"] - reduce_s,
            stall_s=self._times["stall"],
            reduce_s=reduce_s,
            prepare_s=self._prepare_s,
            bytes_sent=self._transport.bytes_sent,
            feed=self._feed.stats(),
            plan=None if prepared is None else asdict(prepared.summary),
            peak_rss_bytes=peak_rss_bytes(),
        )

    def _progress(self, stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        self._beat(int(done), int(total))

    def close(self) -> None:
        """Stop the feed and let go of the folder."""
        self._feed_stack.close()
        self._stack.close()


@contextmanager
def open_replica(spec: ReplicaSpec, transport: Transport, heartbeat: Callable[[int, int], None]) -> Iterator[Replica]:
    """Be a replica; `prepare` has to be called first."""
    with torch_threads(spec.threads):
        replica = Replica(spec, transport, heartbeat)
        try:
            yield replica
        finally:
            replica.close()
