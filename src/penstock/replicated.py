"""Sampled training on replicas: the driver, which owns the run folder; packs and scratch are on the replicas' hosts.

Items are dealt to replicas (`storage.deal`) so that the losses, and where a share is a power of two the weights bit for
bit, are those of one replica with the same `train.accumulate`. A checkpoint is the one that training in this process
writes, so a run may go on with any number of replicas.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from penstock.cluster.directory import Directory
from penstock.engine.chunked.backend import Backend, OpenBackend, RankFailed
from penstock.engine.chunked.layout import Layout
from penstock.engine.evaluate import evaluate_exact
from penstock.engine.metrics import Counts, Metrics
from penstock.engine.supervision.restarts import run_with_restarts
from penstock.engine.trainloop import ItemLoss, Tensors, TrainLoop
from penstock.engine.trainstate import Stopped, TrainResult
from penstock.identity import Keys
from penstock.observation import Observation
from penstock.prepare import sample_config
from penstock.replica import Leg, ReplicaReport, ReplicaSpec
from penstock.replica_sources import Fed
from penstock.run import Run, make_model
from penstock.sampler.neighbors import count_items
from penstock.storage.errors import Outgrown
from penstock.storage.graph import Split
from penstock.storage.pack import PackMode
from penstock.timeline import clock_offset

logger = logging.getLogger(__name__)

_LEG_S = 1.0  # of training between two looks at the clock: long beside a call, short beside the patience of a user


class ReplicaWorkers:
    """Replicas behind a backend, as `trainloop.Workers`."""

    def __init__(
        self,
        run: Run,
        backend: Backend,
        hosts: Sequence[str],
        model: nn.Module,
        watch: Observation,
        feeders: Directory | None,
    ) -> None:
        self.times = {"stall": 0.0, "reduce": 0.0}
        self._run, self._backend, self._hosts, self._model = run, backend, hosts, model
        self._num, self._watch, self._feeders = len(hosts), watch, feeders
        self._item_s = 0.0  # seconds per item, of the last leg
        self._waits = {"evaluate": 0.0, "checkpoint": 0.0}

    def prepare(self) -> tuple[int, PackMode]:
        """Let replicas sample and pack, or wait for a feeder; returns the items of an epoch, and the mode of all packs.

        Weights depend on the mode, so where `auto` finds one host without room, all replicas roll.
        """
        sharing = max(self._hosts.count(host) for host in self._hosts)
        fed = None if self._feeders is None else self._fed(self._feeders)
        modes = self._call("plan", [(sharing, fed)] * self._num, until_stopped=True)
        mode: PackMode = "rolling" if "rolling" in modes else "reuse"
        found: list[int] = self._call("prepare", [(mode,)] * self._num, until_stopped=True)
        assert len(set(found)) == 1, f"replicas see epochs of {found} items: their graphs differ"
        return found[0], mode

    def _fed(self, feeders: Directory) -> Fed:
        run = self._run
        feeders.wait_ready(run.config.cluster.wait_s, run.poll)
        splits: tuple[Split, ...] = ("train", *run.evaluated_splits)
        return Fed(
            directory=feeders.address,
            token=feeders.token,
            meta=run.graph.meta,
            fingerprint=run.graph.fingerprint,
            items={s: count_items(run.graph, s, sample_config(run.config, s).batch_size) for s in splits},
        )

    def _call(
        self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None, *, until_stopped: bool = False
    ) -> list[Any]:
        def poll() -> None:
            if self._feeders is not None:
                self._feeders.poll()
            if until_stopped and self._run.stop_requested.is_set():
                raise Stopped(f"stopped while replicas {method}; run the same command again to continue")

        return self._backend.call(method, arguments, poll)

    @contextmanager
    def open(self, start: int, stop: int) -> Iterator[None]:
        """See Workers."""
        self._call("open_feed", [(start, stop)] * self._num)
        yield
        self._call("close_feed")

    def leg(self, step: int) -> int:
        """See Workers."""
        group = self._run.config.train.accumulate
        if self._item_s == 0.0:
            return group
        return max(1, int(_LEG_S / self._item_s / group)) * group

    def advance(self, start: int, stop: int) -> list[ItemLoss]:
        """See Workers."""
        began = time.perf_counter()
        legs: list[Leg] = self._call("advance", [(start, stop)] * self._num)
        wall_s = time.perf_counter() - began
        self._item_s = wall_s / (stop - start)
        stall_s, reduce_s = (sum(getattr(leg, name) for leg in legs) / self._num for name in ("stall_s", "reduce_s"))
        self.times["stall"] += stall_s
        self.times["reduce"] += reduce_s
        self._watch.leg(stop, legs, self._hosts, self._waits)
        losses = sorted(found for leg in legs for found in leg.losses)
        return [(step, num_seeds, torch.tensor(loss)) for step, num_seeds, loss in losses]

    def evaluate(self, splits: tuple[Split, ...] = ("valid",)) -> Mapping[str, Metrics]:
        """See Workers."""
        began = time.perf_counter()
        try:
            return self._evaluate(splits)
        finally:
            self._waits["evaluate"] += time.perf_counter() - began

    def _evaluate(self, splits: tuple[Split, ...]) -> Mapping[str, Metrics]:
        run = self._run
        if run.config.evaluate.mode == "exact":
            self._model.load_state_dict(self.weights())
            found = evaluate_exact(
                self._model,
                run.graph,
                splits,
                run.results / "exact" / "train",
                host_memory=run.evaluation_bytes,
                threads=run.threads,
                device="cpu",
                progress=run.progress,
            )
            return {split: metrics for split, metrics in found.items()}
        totals = {split: Counts(run.graph.meta.num_classes) for split in splits}
        for counted in self._call("evaluate", [(splits,)] * self._num, until_stopped=True):
            for split, counts in counted.items():
                totals[split].add(counts)
        return {split: counts.metrics() for split, counts in totals.items()}

    def keep_best(self) -> None:
        """See Workers."""
        self._call("keep_best")

    def take_best(self) -> None:
        """Let replicas go on with the best weights."""
        self._call("take_best")

    def export(self) -> tuple[Tensors, dict[str, Any]]:
        """See Workers. RankFailed where replicas do not hold the same weights."""
        began = time.perf_counter()
        found = self._call("export", [(rank == 0,) for rank in range(self._num)])
        self._waits["checkpoint"] += time.perf_counter() - began
        checksums = [checksum for checksum, _ in found]
        if len(set(checksums)) > 1:
            raise RankFailed(
                f"replicas hold different weights (checksums {checksums}); the model changes buffers in training other "
                "than those of batch norms, or a machine computes wrongly: nothing was saved"
            )
        exported: tuple[Tensors, dict[str, Any]] = found[0][1]
        return exported

    def weights(self) -> dict[str, Tensor]:
        """The model's weights."""
        return dict(self.export()[0]["model"])

    def restore(self, tensors: Tensors, scaler: dict[str, Any]) -> None:
        """See Workers."""
        plain = {name: dict(named) for name, named in tensors.items()}
        self._call("restore", [(plain, scaler)] * self._num)

    def release(self, step: int) -> None:
        """Feeds of replicas let go of windows behind them; a resumed run has them made anew."""

    def reports(self) -> list[ReplicaReport]:
        """Every replica in numbers; its part of the timeline goes to who watches."""
        if self._run.config.track.trace_steps is not None:
            asked_s, found, answered_s = time.time(), self._call("spans"), time.time()
            for rank, (theirs_s, log) in enumerate(found):
                self._watch.spans(rank, log, offset_s=clock_offset(asked_s, theirs_s, answered_s))
        return self._call("report")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicated:
    """What training on replicas came to; `identity` of the weights, `hosts` by replica, what `feeders` say, and the
    `restarts` of all replicas. `prepare_s` are the seconds of the run until the last start of training."""

    identity: Keys
    trained: TrainResult
    final: Mapping[str, Metrics]
    model: nn.Module
    reports: Sequence[ReplicaReport]
    hosts: Sequence[str]
    feeders: Sequence[Mapping[str, Any]]
    prepare_s: float
    test_s: float
    restarts: int


def replica_specs(run: Run, threads: int, per_gpu: int = 1) -> list[ReplicaSpec]:
    """One spec per replica, with absolute paths; so many of them share a GPU, where they use any."""
    config, count = run.config, run.config.cluster.replicas
    absolute = {name: getattr(config, name).absolute() for name in ("dataset", "run_dir")}
    if config.remote.stage_dir is not None:
        absolute["remote"] = config.remote.model_copy(update={"stage_dir": config.remote.stage_dir.absolute()})
    config = config.model_copy(update=absolute)
    return [
        ReplicaSpec(
            rank=rank,
            layout=Layout(1, count),
            scratch=config.work_dir,
            threads=threads,
            device=config.train.device,
            timeout_s=config.cluster.timeout_s,
            config=config,
            per_gpu=per_gpu,
        )
        for rank in range(count)
    ]


class Place(Protocol):
    """Where replicas run: on this machine, or on Ray."""

    @property
    def open_backend(self) -> OpenBackend: ...
    @property
    def threads(self) -> int: ...
    @property
    def replicas_per_gpu(self) -> int: ...

    def hosts(self, backend: Any, count: int) -> list[str]:
        """The host of every replica, by name."""

    def open_feeders(self) -> AbstractContextManager[Directory | None]:
        """Start feeders, if there are to be any."""


def _attempt(run: Run, place: Place, specs: Sequence[ReplicaSpec], watch: Observation, restarts: int) -> Replicated:
    config, model = run.config, make_model(run)
    with place.open_feeders() as feeders, place.open_backend(specs) as backend:
        hosts = place.hosts(backend, len(specs))
        workers = ReplicaWorkers(run, backend, hosts, model, watch, feeders)
        items_per_epoch, mode = workers.prepare()
        identity = run.identity(**{"plan.mode": mode})
        prepare_s = run.timings.total_s
        loop = TrainLoop(
            config.train,
            workers,
            items_per_epoch=items_per_epoch,
            checkpoints=run.results / "checkpoints",
            metrics=run.results / "metrics.jsonl",
            evaluates=run.evaluates,
            identity={"run": identity},
            stop_requested=run.stop_requested,
            progress=run.progress,
            record=watch.record,
        )
        watch.training_begins(evaluates=run.evaluates)
        trained = loop.run()
        workers.take_best()
        began_s = run.timings.total_s
        final = workers.evaluate(run.labelled_splits) if run.evaluates else {}
        test_s = run.timings.total_s - began_s
        model.load_state_dict(workers.weights())
        return Replicated(
            identity=identity,
            trained=trained,
            final=final,
            model=model,
            reports=workers.reports(),
            hosts=hosts,
            feeders=[] if feeders is None else feeders.pool.status(),
            prepare_s=prepare_s,
            test_s=test_s,
            restarts=restarts,
        )


def train_replicas(run: Run, place: Place, watch: Observation) -> Replicated:
    """Train on replicas; they start anew from the newest checkpoint when one is lost.

    RankFailed once that happened more than `cluster.retries` times; Stopped after a checkpoint when asked to stop.
    Where items of feeders outgrow what windows were sized for, replicas start anew for larger ones.
    """
    specs = replica_specs(run, place.threads, place.replicas_per_gpu)

    def tell(number: int, error: BaseException) -> None:
        watch.restarted(number)
        logger.warning("%s; starting all replicas anew from the newest checkpoint", error)

    def attempt(number: int) -> Replicated:
        while True:  # ends: every start makes room for larger items, until all fit or the budgets end it
            try:
                return _attempt(run, place, specs, watch, number)
            except Outgrown as error:
                run.poll()
                logger.warning("%s; starting all replicas anew from the newest checkpoint, with more room", error)

    return run_with_restarts(
        attempt,
        run.config.cluster.retries,
        tell,
        stop_requested=run.stop_requested,
    )
