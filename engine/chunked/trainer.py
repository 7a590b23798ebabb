"""Drive the ranks of full-graph training: epochs, exact passes, evaluation, checkpoints, and what is written down.

The driver holds no tensor but the final weights. Every epoch is planned and proven sound before any rank sees it. A
rerun continues from the newest checkpoint: `full` ones have histories and continue to the same bits with the same
chunks, parts and replicas; others, `light` ones and replicas that are new among them, start from exact histories.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.engine.checkpoint import delete_checkpoints, pack_tensors
from penstock.engine.chunked.backend import OpenBackend, open_board
from penstock.engine.chunked.checkpoints import (
    ChunkedCheckpoint,
    begin_checkpoint,
    delete_unfinished,
    publish_checkpoint,
    read_latest,
)
from penstock.engine.chunked.planning import plan_replicas
from penstock.engine.chunked.schedule import EpochPlan, plan_exact
from penstock.engine.chunked.spec import ExactReport, RankReport, RankSpec
from penstock.engine.chunked.state import ChunkedResult, ChunkedState
from penstock.engine.chunked.telemetry import divide_epoch, epoch_record
from penstock.engine.chunked.validate import validate_plan
from penstock.engine.metrics import Counts, Listener, Metrics, MetricsWriter
from penstock.engine.optim import learning_rate
from penstock.engine.supervision.restarts import run_with_restarts
from penstock.engine.trainer import Stopped
from penstock.storage.chunks import open_chunks
from penstock.storage.graph import Split, open_graph
from penstock.storage.manifest import write_atomic
from penstock.storage.progress import Progress, silent
from penstock.storage.spans import TRACE

logger = logging.getLogger(__name__)

_CHECKPOINT_S = 10.0  # epochs shorter than this are not worth a checkpoint each
_CHECKPOINT_SHARE = 0.05  # of the time may go into checkpoints that nobody asked for: histories are large


class ChunkedTrainer:
    """Trains what `specs` describe, one per rank. `identity` has to be equal for a checkpoint to be continued.

    `evaluate` are the splits scored every `train.evaluate_every` epochs; `valid` decides which epoch is best. `record`
    gets every record of `metrics`; `observe` every epoch's number, reports, and the time of day at which it began.
    """

    def __init__(
        self,
        specs: Sequence[RankSpec],
        open_backend: OpenBackend,
        *,
        checkpoints: Path,
        metrics: Path,
        evaluate: tuple[Split, ...] = ("valid",),
        identity: Mapping[str, Any] | None = None,
        stop_requested: threading.Event | None = None,
        progress: Progress = silent,
        record: Listener | None = None,
        observe: Callable[[int, Sequence[RankReport], float], object] | None = None,
    ) -> None:
        self.specs, self.spec = specs, specs[0]
        self._listeners = () if record is None else (record,)
        self._observe = observe
        self.train, self.chunked, self.layout = self.spec.train, self.spec.chunked, self.spec.layout
        if self.train.precision != "float32":
            raise ValueError(f"precision={self.train.precision} is not for full-graph training; use float32")
        self._open_backend, self._metrics_path = open_backend, metrics
        self._checkpoints = checkpoints.absolute()  # ranks may work in another folder
        self._evaluate = evaluate if self.train.evaluate_every else ()
        if self.train.patience is not None and "valid" not in self._evaluate:
            raise ValueError(
                f"patience={self.train.patience} needs an evaluation of valid; set evaluate_every, or patience to none"
            )
        store = open_chunks(self.spec.chunks)
        self._num_chunks, self._meta = store.meta.num_chunks, store.meta
        self._num_classes = open_graph(self.spec.graph).meta.num_classes
        self._identity = {"chunks": asdict(store.meta), **(identity or {})}
        self._stop, self._progress = stop_requested or threading.Event(), progress
        self.state = ChunkedState()
        self._board, self._stage = open_board(specs), "epoch"
        self._errors: dict[int, float] = {}
        self._epoch_s: list[float] = []
        self._times = dict.fromkeys(("start", "compute", "stall", "reduce", "evaluate", "checkpoint"), 0.0)
        self._last_save_s, self._has_saved = 0.0, False
        self._reports: list[RankReport] = []

    def run(self, *, resume: bool = True) -> ChunkedResult:
        """Train to the end, from the newest checkpoint where there is one. Raises Stopped after a checkpoint when
        asked.

        RankFailed where ranks failed more than `chunked.retries` times, ValueError for a loss that is not finite or a
        checkpoint of another run.
        """
        began = time.perf_counter()
        if not resume:
            delete_checkpoints(self._checkpoints)
        resumed_from: list[int] = []

        def attempt(number: int) -> dict[str, Tensor]:
            try:
                found = self._restore()
                resumed_from.append(self.state.epochs_done)
                return self._attempt(found)
            finally:
                delete_unfinished(self._checkpoints)  # all ranks have ended; a full disk must not stay full

        weights = run_with_restarts(attempt, self.chunked.retries, self._tell_restart, stop_requested=self._stop)
        record_s = max(0.0, time.perf_counter() - began - sum(self._times.values()))
        return ChunkedResult(
            weights=weights,
            state=self.state,
            resumed_from=resumed_from[0],
            reports=tuple(self._reports),
            epoch_s=tuple(self._epoch_s),
            times={**self._times, "record": record_s},
            history_errors=self._errors,
        )

    def _tell_restart(self, number: int, error: BaseException) -> None:
        logger.warning("%s; starting all ranks anew from epoch %d", error, self._saved[0])

    def _restore(self) -> ChunkedCheckpoint | None:
        """Take the driver's state from the newest checkpoint, or begin."""
        found = read_latest(self._checkpoints)
        self.state = ChunkedState()
        if found is not None:
            self._check_identity(found.state["identity"], found.path)
            self.state = ChunkedState(**found.state["state"])
            if self.state.epochs_done > self.train.epochs:
                raise ValueError(
                    f"{found.path} has {self.state.epochs_done} epochs behind it, epochs={self.train.epochs} asks for "
                    "fewer; ask for more, or train from the start"
                )
            logger.info("resumed from %s: epoch %d of %d", found.path, self.state.epochs_done, self.train.epochs)
            self.state.stopped_early = self.state.epochs_done < self.train.epochs and self._has_waited_enough()
        self._saved = (self.state.epochs_done, time.monotonic())
        return found

    def _attempt(self, found: ChunkedCheckpoint | None) -> dict[str, Tensor]:
        """Start ranks, train to the end, and bring the weights together."""
        began, evaluated_s = time.perf_counter(), self._times["evaluate"]
        with (
            self._open_backend(self.specs) as self._backend,
            MetricsWriter(
                self._metrics_path, keep_bytes=self.state.metrics_bytes, listeners=self._listeners
            ) as self._metrics,
        ):
            self._start(found)
            self._times["start"] += time.perf_counter() - began - (self._times["evaluate"] - evaluated_s)
            while not self._finished:
                self._epoch()
            self._evaluate_the_end()
            weights: dict[str, Tensor] = {}
            for part in self._call("weights", [(True,)] * self.layout.num_ranks)[: self.layout.stages]:
                weights |= part
        return weights

    @property
    def _finished(self) -> bool:
        return self.state.epochs_done >= self.train.epochs or self.state.stopped_early

    def _check_identity(self, found: Mapping[str, Any], path: Path) -> None:
        differing = sorted(
            key for key in {*found, *self._identity} if key != "chunks" and found.get(key) != self._identity.get(key)
        )
        if differing:
            raise ValueError(f"{path} is of a run with other {', '.join(differing)}; use the same, or --resume=false")

    def _start(self, checkpoint: ChunkedCheckpoint | None) -> None:
        """Bring ranks to where training is: weights and histories of a checkpoint, or exact or zero histories."""
        replicas, restored = range(self.layout.replicas), 0
        if checkpoint is not None:
            if checkpoint.state["full"] == self._identity["chunks"]:
                restored = checkpoint.state.get("replicas", 1)
            by_rank = [self.layout.replica_of(rank) < restored for rank in range(self.layout.num_ranks)]
            self._call("load", [(checkpoint.path, has_histories) for has_histories in by_rank])
        if self._finished:
            return
        done = self.state.epochs_done
        if checkpoint is not None and checkpoint.state.get("epochs") == done and self._refreshes_after(done):
            self._exact(keep=True, splits=())  # it was the last epoch, which needs no refresh; it is the last no more
            return
        if not replicas[restored:]:
            return
        if checkpoint is not None or self.chunked.starts_exact:
            if checkpoint is not None:
                logger.info("%s lacks histories of these chunks and replicas; they start exact", checkpoint.path)
            self._exact(keep=True, splits=(), compares=False, replicas=replicas[restored:])
        else:
            self._call("start_cold")

    def _evaluate_the_end(self) -> None:
        """Evaluate after the last epoch where that was not due anyway: a run with more epochs knows nothing of it."""
        state = self.state
        if not self._evaluate or (state.evaluations and state.evaluations[-1]["epoch"] == state.epochs_done):
            return
        found = self._exact(keep=False, splits=self._evaluate)
        self._judge(state.epochs_done, found)
        values = {key: value for split, m in found.items() for key, value in m.to_json(f"{split}_").items()}
        values |= state.best_so_far(self.train.metric)
        self._metrics.write({"step": state.epochs_done, "epoch": state.epochs_done, **values})

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        return self._backend.call(method, arguments, self._poll)

    def _poll(self) -> None:
        done, total = self._board.done()
        if total:
            self._progress(self._stage, done, total, "actions")

    def plans(self, epoch: int) -> list[EpochPlan]:
        """The proven plans of an epoch, one per replica."""
        seed, recompute = self.train.seed, self.spec.recompute
        return plan_replicas(self.layout, self.chunked, self._num_chunks, seed=seed, epoch=epoch, recompute=recompute)

    def _epoch(self) -> None:
        epoch, updates = self.state.epochs_done, self.chunked.updates_per_epoch
        plans = self.plans(epoch)
        rates = tuple(
            learning_rate(self.train, epoch * updates + n, updates, self.train.epochs) for n in range(updates)
        )
        began, began_s = time.perf_counter(), time.time()
        TRACE.at(epoch)
        self._board.reset()
        self._reports = self._call("train_epoch", [(own, rates) for own in self._own_lists(plans)])
        self._epoch_s.append(time.perf_counter() - began)
        for name, seconds in divide_epoch(self._reports, self._epoch_s[-1]).items():
            self._times[name] += seconds
        TRACE.add("epoch", f"epoch {epoch}", began, began + self._epoch_s[-1])
        if self._observe is not None:
            self._observe(epoch, self._reports, began_s)
        last = self.layout.stages - 1
        total = math.fsum(r.loss for r in self._reports if self.layout.stage_of(r.rank) == last)
        loss = total / (updates * self.layout.replicas)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} in epoch {epoch}; lower lr={self.train.lr}, or set grad_clip")
        self.state.losses.append(loss)
        self._end_epoch(epoch + 1, loss)

    def _end_epoch(self, epochs: int, loss: float) -> None:
        """Evaluate, refresh and save what is due after `epochs` epochs."""
        train, state = self.train, self.state
        last = epochs == train.epochs
        evaluates = self._is_due(epochs)
        refreshes = not last and self._refreshes_after(epochs)
        found: dict[Split, Metrics] = {}
        if evaluates or refreshes:
            found = self._exact(keep=refreshes, splits=self._evaluate if evaluates else ())
        state.epochs_done = epochs
        if evaluates:
            self._judge(epochs, found)
            state.stopped_early = not last and self._has_waited_enough()
        record = epoch_record(self._reports, self._meta, self.layout, self._epoch_s[-1])
        values = {key: value for split, m in found.items() for key, value in m.to_json(f"{split}_").items()}
        values |= state.best_so_far(train.metric)
        errors = (
            {f"history_error_{layer}": value for layer, value in self._errors.items()} if found or refreshes else {}
        )
        self._metrics.write({"step": epochs, "epoch": epochs, "train_loss": loss, **values, **errors, **record})
        self._progress("train", epochs, train.epochs, "epochs", epochs_per_s=1 / record["epoch_s"], loss=loss)
        self._save_if_due()

    def _is_due(self, epochs: int) -> bool:
        """Whether an evaluation is due after so many epochs, be they the last or not."""
        return bool(self._evaluate) and epochs % self.train.evaluate_every == 0

    def _refreshes_after(self, epochs: int) -> bool:
        return self.chunked.refresh_every > 0 and epochs % self.chunked.refresh_every == 0

    def _has_waited_enough(self) -> bool:
        """Whether early stopping ends training after the epochs done, if they are not the last."""
        state, patience = self.state, self.train.patience
        return (
            patience is not None
            and self._is_due(state.epochs_done)
            and (state.epochs_done - state.best_epoch >= patience)
        )

    def _judge(self, epoch: int, found: Mapping[Split, Metrics]) -> None:
        state, train = self.state, self.train
        if not all(math.isfinite(m.loss) for m in found.values()):
            raise ValueError(
                f"an evaluation loss is not finite after epoch {epoch}: {dict(found)}; lower lr={train.lr}"
            )
        state.evaluations.append({"epoch": epoch, **{split: m.to_json() for split, m in found.items()}})
        if "valid" in found and state.improves(epoch, found["valid"], train.metric):
            self._call("keep_best")

    def _exact(
        self,
        *,
        keep: bool,
        splits: tuple[Split, ...],
        compares: bool = True,
        replicas: Sequence[int] | None = None,
    ) -> dict[Split, Metrics]:
        """Run an exact pass after the epochs done so far; it `compares` histories where there are some.

        Where it is to `keep` the rows, those of `replicas`, or else of all; a mere evaluation is for the first replica.
        """
        began = time.perf_counter()
        epoch = len(self.state.losses) - 1  # the version of rows that come before the next epoch
        layers = self._stage_layers()
        chosen = (0,) if not keep else tuple(range(self.layout.replicas)) if replicas is None else tuple(replicas)
        plans = [plan_exact(self.layout, layers, self._num_chunks, epoch, replica) for replica in chosen]
        for plan in plans:
            validate_plan(plan, self.layout, stage_layers=layers)
        sampled = epoch % self._num_chunks if compares else None
        self._board.reset()
        counted = [splits if self.layout.replica_of(rank) == 0 else () for rank in range(self.layout.num_ranks)]
        arguments = [(own, keep, count, sampled) for own, count in zip(self._own_lists(plans), counted, strict=True)]
        self._stage = " and ".join(splits) or "refresh"
        reports: list[ExactReport] = self._call("exact_pass", arguments)
        self._stage = "epoch"
        totals = {split: Counts(self._num_classes) for split in splits}
        errors: dict[int, list[float]] = {}
        for report in reports:
            for split, counts in report.counts.items():
                totals[split].add(counts)
            for layer, value in report.history_errors.items():
                errors.setdefault(layer, []).append(value)
        self._errors = {layer: float(np.mean(values)) for layer, values in sorted(errors.items())}
        ended = time.perf_counter()
        self._times["evaluate"] += ended - began
        TRACE.add("evaluate", " and ".join(splits) or "refresh", began, ended, keep=keep)
        return {split: counts.metrics() for split, counts in totals.items()}

    def _own_lists(self, plans: Sequence[EpochPlan]) -> list[EpochPlan]:
        """By rank: its replica's plan, or any where that has none."""
        plan_of = {plan.replica: plan for plan in plans}
        ranks = range(self.layout.num_ranks)
        return [plan_of.get(self.layout.replica_of(rank), plans[0]).only_for(rank) for rank in ranks]

    def _stage_layers(self) -> tuple[range, ...]:
        """Hidden layers by stage: unit n is the n-th of them, unit 0 is none."""
        first = self.spec.first_hidden
        return tuple(range(first + max(0, start - 1), first + stop - 1) for start, stop in self.spec.units)

    def _save_if_due(self) -> None:
        train, state = self.train, self.state
        saved, at = self._saved
        since = time.monotonic() - at
        minutes = train.checkpoint_minutes is not None and since >= train.checkpoint_minutes * 60
        items = train.checkpoint_items is not None and state.epochs_done % train.checkpoint_items == 0
        stops = self._stop.is_set() and not self._finished
        worth_it = not self._has_saved or is_worth_saving(since, self._last_save_s)  # the first epoch always is
        if stops or minutes or items or self._finished or worth_it:
            if saved != state.epochs_done:
                self._save()
        if stops:
            raise Stopped(
                f"stopped after epoch {state.epochs_done} of {train.epochs}, with a checkpoint in {self._checkpoints}; "
                "run the same command again to continue"
            )

    def _save(self) -> None:
        began = time.perf_counter()
        epoch = self.state.epochs_done
        self.state.metrics_bytes = self._metrics.num_bytes
        folder = begin_checkpoint(self._checkpoints, epoch)
        files: dict[str, dict[str, Any]] = {}
        for entries in self._call("save", [(folder,)] * self.layout.num_ranks):
            files |= entries
        full = self._identity["chunks"] if self.chunked.checkpoint == "full" else None
        value = {
            "state": asdict(self.state),
            "identity": self._identity,
            "full": full,
            "epochs": self.train.epochs,
            "replicas": self.layout.replicas,  # whose histories are there, where they are; nothing said: one
        }
        publish_checkpoint(self._checkpoints, epoch, value, files, keep=self.train.keep_checkpoints)
        self._saved = (epoch, time.monotonic())
        self._last_save_s, self._has_saved = time.perf_counter() - began, True
        self._times["checkpoint"] += self._last_save_s
        TRACE.add("checkpoint", "save", began, began + self._last_save_s, epoch=epoch)


def is_worth_saving(since_s: float, save_s: float) -> bool:
    """Whether it is time for a checkpoint, `since_s` after the last one, which took `save_s`."""
    return since_s >= max(_CHECKPOINT_S, save_s / _CHECKPOINT_SHARE)


def initial_weights(path: Path, model: torch.nn.Module) -> Path:
    """Write what all ranks start from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, pack_tensors(model.state_dict()))
    return path
