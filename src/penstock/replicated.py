"""Sampled training on replicas: the driver, which owns the run folder; packs and scratch are on the replicas' hosts.

Items are dealt to replicas (`storage.deal`) so that the losses, and where a share is a power of two the weights bit for
bit, are those of one replica with the same `train.accumulate`. A checkpoint is the one that training in this process
writes, so a run may go on with any number of replicas.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine.chunked.backend import Backend, OpenBackend, RankFailed
from penstock.engine.chunked.layout import Layout
from penstock.engine.evaluate import evaluate_exact
from penstock.engine.metrics import Counts, Metrics
from penstock.engine.trainloop import ItemLoss, Tensors, TrainLoop
from penstock.engine.trainstate import Stopped, TrainResult
from penstock.replica import OPEN_REPLICA, Leg, ReplicaReport, ReplicaSpec
from penstock.run import Run, make_model
from penstock.storage.graph import Split

logger = logging.getLogger(__name__)

_LEG_S = 1.0  # of training between two looks at the clock: long beside a call, short beside the patience of a user


class ReplicaWorkers:
    """Replicas behind a backend, as `trainloop.Workers`."""

    def __init__(self, run: Run, backend: Backend, num_replicas: int, model: nn.Module) -> None:
        self.times = {"compute": 0.0, "stall": 0.0, "reduce": 0.0}
        self._run, self._backend, self._num, self._model = run, backend, num_replicas, model
        self._item_s = 0.0  # seconds per item, of the last leg

    def prepare(self, sharing: int) -> int:
        """Let replicas sample and pack; returns the items of an epoch."""
        found: list[int] = self._call("prepare", [(sharing,)] * self._num)
        assert len(set(found)) == 1, f"replicas see epochs of {found} items: their graphs differ"
        return found[0]

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        return self._backend.call(method, arguments, self._poll if method == "prepare" else None)

    def _poll(self) -> None:
        if self._run.stop_requested.is_set():
            raise Stopped("stopped while replicas sample and pack; run the same command again to continue")

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
        self.times["compute"] += max(0.0, wall_s - stall_s)
        losses = sorted(found for leg in legs for found in leg.losses)
        return [(step, num_seeds, torch.tensor(loss)) for step, num_seeds, loss in losses]

    def evaluate(self, splits: tuple[Split, ...] = ("valid",)) -> Mapping[str, Metrics]:
        """See Workers."""
        run = self._run
        if run.config.evaluate.mode == "exact":
            self._model.load_state_dict(self.weights())
            return dict(
                evaluate_exact(
                    self._model,
                    run.graph,
                    splits,
                    run.path / "exact",
                    host_memory=run.evaluation_bytes,
                    threads=run.threads,
                    device="cpu",
                    progress=run.progress,
                )
            )
        totals = {split: Counts(run.graph.meta.num_classes) for split in splits}
        for counted in self._call("evaluate", [(splits,)] * self._num):
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
        found = self._call("export", [(rank == 0,) for rank in range(self._num)])
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
        """Every replica in numbers."""
        return self._call("report")


class Replicated:
    """What training on replicas came to."""

    def __init__(
        self,
        trained: TrainResult,
        final: Mapping[str, Metrics],
        model: nn.Module,
        reports: Sequence[ReplicaReport],
        hosts: Sequence[str],
        prepare_s: float,
        restarts: int,
    ) -> None:
        self.trained, self.final, self.model, self.reports = trained, final, model, reports
        self.hosts, self.prepare_s, self.restarts = hosts, prepare_s, restarts


def replica_specs(run: Run, threads: int) -> list[ReplicaSpec]:
    """One spec per replica, with absolute paths."""
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
        )
        for rank in range(count)
    ]


def _attempt(run: Run, open_backend: OpenBackend, specs: Sequence[ReplicaSpec], resume: bool) -> Replicated:
    config, model = run.config, make_model(run)
    with open_backend(specs) as backend:
        hosts: list[str] = getattr(backend, "nodes", None) or ["this machine"] * len(specs)
        workers = ReplicaWorkers(run, backend, len(specs), model)
        began = time.perf_counter()
        items_per_epoch = workers.prepare(max(hosts.count(host) for host in hosts))
        prepare_s = time.perf_counter() - began
        loop = TrainLoop(
            config.train,
            workers,
            items_per_epoch=items_per_epoch,
            checkpoints=run.path / "checkpoints",
            metrics=run.path / "metrics.jsonl",
            evaluates=run.evaluates,
            identity={"run": config.digest(), "graph": run.graph.fingerprint},
            stop_requested=run.stop_requested,
            progress=run.progress,
        )
        trained = loop.run(resume=resume)
        workers.take_best()
        final = workers.evaluate(run.splits_with_nodes) if run.evaluates else {}
        model.load_state_dict(workers.weights())
        return Replicated(trained, final, model, workers.reports(), hosts, prepare_s, 0)


def train_replicas(run: Run, open_backend: OpenBackend, specs: Sequence[ReplicaSpec], *, resume: bool) -> Replicated:
    """Train on replicas that `open_backend` starts; they start anew from the newest checkpoint when one is lost.

    RankFailed once that happened more than `cluster.retries` times; Stopped after a checkpoint when asked to stop.
    """
    retries = run.config.cluster.retries
    for restarts in range(retries + 1):
        try:
            found = _attempt(run, open_backend, specs, resume or restarts > 0)
            found.restarts = restarts
            return found
        except RankFailed as error:
            if restarts == retries:
                raise
            logger.warning("%s; starting all replicas anew from the newest checkpoint", error)
    raise AssertionError("the last attempt returns or raises")


__all__ = ["OPEN_REPLICA", "Replicated", "ReplicaWorkers", "replica_specs", "train_replicas"]
