"""A replica of the model in sampled training: it feeds itself with its own items, on its own host.

Replicas run in processes or actors that a backend drives (`engine.chunked.backend`): the driver calls their methods,
and they exchange nothing among themselves but sums of gradients. All of them hold the same weights, bit for bit.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from penstock.config import RunConfig
from penstock.engine.checkpoint import pack_tensors
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.transport import Transport
from penstock.engine.evaluate import count_feed
from penstock.engine.minibatch import MiniBatch
from penstock.engine.prefetch import FeedStats, device_seconds
from penstock.engine.products import torch_threads
from penstock.engine.reduce import sum_over
from penstock.engine.trainer import ModelState, make_stepper
from penstock.engine.trainloop import Tensors, update_rate
from penstock.prepare import deal_items
from penstock.replica_sources import Fed, Source, open_fed_items, open_own_packs
from penstock.run import initial_model
from penstock.storage.budget import peak_rss_bytes
from penstock.storage.deal import Deal
from penstock.storage.graph import Split
from penstock.storage.pack import PackMode
from penstock.storage.spans import TRACE, SpanLog

OPEN_REPLICA = "penstock.replica:open_replica"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """What a replica is told when it starts; paths are absolute, `per_gpu` replicas share a GPU. A
    `backend.WorkerSpec`."""

    rank: int
    layout: Layout
    scratch: Path
    threads: int
    device: str
    timeout_s: float
    config: RunConfig
    per_gpu: int = 1

    @property
    def place(self) -> str:
        """The replica's name."""
        return f"replica {self.rank} of 0..{self.layout.num_ranks - 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """What a replica did in one call of `advance`: per item its whole number, seeds and loss; seconds by cause.

    `feed` counts from the feed's start; `queue_bytes` are windows that feeders have ready here, None without feeders.
    """

    losses: tuple[tuple[int, int, float], ...]
    compute_s: float
    stall_s: float
    reduce_s: float
    feed: FeedStats | None
    row_bytes: int
    queue_bytes: int | None


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
    facts: dict[str, Any]
    peak_rss_bytes: int


class Replica:
    """See the module; made by `open_replica`. Methods are called by the driver, one at a time."""

    def __init__(self, spec: ReplicaSpec, transport: Transport, heartbeat: Callable[[int, int], None]) -> None:
        self.spec, self._transport, self._beat = spec, transport, heartbeat
        own = spec.config.train.model_copy(update={"device": spec.device, "threads": spec.threads})
        self._config, self._replicas = spec.config.model_copy(update={"train": own}), spec.layout.num_ranks
        self._stack, self._feed = ExitStack(), ExitStack()
        self._items, self._times, self._prepare_s = 0, {"compute": 0.0, "stall": 0.0}, 0.0

    def plan(self, sharing: int, fed: Fed | None) -> PackMode:
        """Sample and plan own items unless feeders do; `sharing` replicas share this host. Returns the mode that suits
        it, which all replicas have to agree on."""
        began = time.perf_counter()
        TRACE.watch(self._config.track.trace_steps)
        self._source = self._stack.enter_context(self._open_source(sharing, fed))
        mode = self._source.plan()
        self._prepare_s = time.perf_counter() - began
        return mode

    def prepare(self, mode: PackMode) -> int:
        """Pack what was planned; returns the items of an epoch, of all replicas."""
        began = time.perf_counter()
        self._source.prepare(mode)
        self._deals = [self._deal(rank) for rank in range(self._replicas)]
        config, meta = self._config, self._source.meta
        model = initial_model(config, meta)
        self._state = ModelState(make_stepper(model, config.train, grouped=config.train.accumulate > 1))
        self._prepare_s += time.perf_counter() - began
        return self._source.epoch_items

    @contextmanager
    def _open_source(self, sharing: int, fed: Fed | None) -> Iterator[Source]:
        where, device_bytes = (self._config, self.spec.rank, self._replicas), None
        if (
            torch.device(self.spec.device).type == "cuda"
        ):  # half of a GPU is for device tiers, the other half for models
            device_bytes = torch.cuda.mem_get_info(self.spec.device)[0] // (2 * self.spec.per_gpu)
        if fed is None:
            with open_own_packs(*where, sharing=sharing, device_bytes=device_bytes, progress=self._progress) as packs:
                yield packs
        else:
            with open_fed_items(*where, fed, sharing=sharing, device_bytes=device_bytes) as items:
                yield items

    def _progress(self, stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        self._beat(int(done), int(total))

    def _deal(self, rank: int) -> Deal:
        items = self._source.epoch_items
        alone = Deal(replicas=1, rank=0, group_items=self._config.train.accumulate, epoch_items=items)
        return deal_items(self._config, "train", rank, self._replicas, items) or alone

    def open_feed(self, start: int, stop: int) -> None:
        """Be ready for items [start, stop) of all replicas."""
        deal = self._deals[self.spec.rank]
        first, last = deal.own_before(start), deal.own_before(stop)
        self._feed.close()
        self._batches: Iterator[MiniBatch] = iter(())
        if first < last:  # else what is left, part of a group, is of other replicas
            self._batches = iter(self._feed.enter_context(self._source.open_train(first, last)))
        self._state.stepper.model.train()

    def close_feed(self) -> None:
        """Stop what reads ahead."""
        self._feed.close()

    def advance(self, start: int, stop: int) -> Leg:
        """Train on items [start, stop) of one epoch, group by group."""
        group, before = self._config.train.accumulate, (*self._times.values(), self._state.stepper.reduce_s)
        found: list[tuple[int, int, torch.Tensor]] = []
        for first in range(start, stop, group):
            TRACE.at(first)
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
            feed=self._source.stats(),
            row_bytes=self._source.row_bytes,
            queue_bytes=self._source.queue_bytes(),
        )

    def _train_group(self, start: int, stop: int) -> list[tuple[int, int, torch.Tensor]]:
        deal, stepper = self._deals[self.spec.rank], self._state.stepper
        counts = [each.own_before(stop) - each.own_before(start) for each in self._deals]
        own = deal.own_before(start)
        found = []
        stepper.begin_group()
        for number in range(own, own + counts[self.spec.rank]):
            began, device_s = time.perf_counter(), device_seconds(self._batches)
            batch = next(self._batches, None)
            got = time.perf_counter()
            device_s = device_seconds(self._batches) - device_s
            if batch is None:
                raise RuntimeError(f"the feed ended at own item {number}, item {deal.whole(number)} of all replicas")
            assert batch.step == number, f"the feed gave step {batch.step}, wanted {number}"
            whole = deal.whole(number)
            found.append((whole, batch.num_seeds, stepper.add(batch, whole)))
            ended = time.perf_counter()
            self._times["stall"] += got - began - device_s
            self._times["compute"] += ended - got + device_s
            TRACE.add("stall", f"item {whole}", began, got)
            TRACE.add("compute", f"item {whole}", got, ended)
        began = time.perf_counter()
        rate = update_rate(self._config.train, start, self._source.epoch_items)
        if self._replicas == 1:
            stepper.step(rate)
        else:
            present = [count > 0 for count in counts]
            stepper.step(rate, lambda vector: sum_over(self._transport, self._replicas, vector, present))
        ended = time.perf_counter()
        self._times["compute"] += ended - began
        TRACE.add("compute", "update", began, ended)
        return found

    def evaluate(self, splits: tuple[Split, ...]) -> dict[Split, dict[str, Any]]:
        """Count own items of sampled splits; `Counts.add` adds up what replicas say."""
        found: dict[Split, dict[str, Any]] = {}
        for split in splits:
            opened = self._source.open_split(split)
            if opened is not None:
                with opened as (batches, total), TRACE.during("evaluate", split):
                    model = self._state.stepper.model
                    counts = count_feed(model, self._beating(batches, total), self._source.meta.num_classes)
                    found[split] = counts.export()
        return found

    def _beating(self, batches: Iterable[MiniBatch], total: int) -> Iterator[MiniBatch]:
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

    def spans(self) -> tuple[float, SpanLog]:
        """This host's clock, and what was recorded for the timeline."""
        return time.time(), TRACE.export()

    def report(self) -> ReplicaReport:
        """This replica in numbers."""
        reduce_s = self._state.stepper.reduce_s
        return ReplicaReport(
            rank=self.spec.rank,
            items=self._items,
            compute_s=self._times["compute"] - reduce_s,
            stall_s=self._times["stall"],
            reduce_s=reduce_s,
            prepare_s=self._prepare_s,
            bytes_sent=self._transport.bytes_sent,
            feed=self._source.stats(),
            facts=self._source.facts(),
            peak_rss_bytes=peak_rss_bytes(),
        )

    def close(self) -> None:
        """Stop the feed and let go of the folder."""
        self._feed.close()
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
