"""Training without tensors: which steps come next, when to evaluate, judge, log, save and stop.

What computes is behind `Workers`: the model in this process (`trainer`), or replicas of it elsewhere. The loop asks for
ranges of items and takes their losses, in the items' order, so its records do not depend on who computed them.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from penstock.engine.checkpoint import Checkpoint, delete_checkpoints, read_latest, write_checkpoint
from penstock.engine.metrics import Metrics, MetricsWriter
from penstock.engine.optim import learning_rate
from penstock.engine.trainconfig import TrainConfig
from penstock.engine.trainstate import Stopped, TrainResult, TrainState
from penstock.storage.progress import Progress, silent
from penstock.storage.spans import TRACE

logger = logging.getLogger(__name__)

ItemLoss = tuple[int, int, Tensor]  # step, seeds, mean loss (a scalar, on any device)
Tensors = Mapping[str, Mapping[str, Tensor]]
_EPOCH_CHECKPOINT_S = 10.0  # epochs shorter than this are not worth a checkpoint each: it costs three fsyncs
_FIRST_CHECKPOINT_S = 2.0  # later ones come when as much time has gone by as before the last: a kill costs half at most
_CHECKPOINT_SHARE = 0.05  # of the time may go into such early ones
_MAX_PENDING = 256  # losses left on the device before they are read whatever `log_every` says


class Workers(Protocol):
    """What computes: a model and its optimizer, once or in replicas."""

    times: dict[str, float]
    "Seconds in `compute`, `stall` and perhaps others; grow."

    def open(self, start: int, stop: int) -> AbstractContextManager[object]:
        """Be ready for steps [start, stop)."""

    def leg(self, step: int) -> int:
        """How many items to take next: whole groups, as many as keep the loop responsive."""

    def advance(self, start: int, stop: int) -> Sequence[ItemLoss]:
        """Train on items [start, stop) of one epoch; from the start of a group to the end of one."""

    def evaluate(self) -> Mapping[str, Metrics]:
        """Score the model, `valid` at least."""

    def keep_best(self) -> None:
        """Keep the weights as they are now."""

    def export(self) -> tuple[Tensors, dict[str, Any]]:
        """Tensors by file (`model`, `optimizer`, perhaps `best`), and the state of the gradient scaler."""

    def restore(self, tensors: Tensors, scaler: dict[str, Any]) -> None:
        """Undo `export`."""

    def release(self, step: int) -> None:
        """Nothing before `step` is wanted again."""


class TrainLoop:
    """Owns the position, the checkpoints and the numbers; `stop_requested` may be set by any thread.

    `identity` is JSON that must be equal for a checkpoint to be continued, beside the configuration.
    """

    def __init__(
        self,
        config: TrainConfig,
        workers: Workers,
        *,
        items_per_epoch: int,
        checkpoints: Path,
        metrics: Path,
        evaluates: bool,
        identity: Mapping[str, Any] | None = None,
        stop_requested: threading.Event | None = None,
        progress: Progress = silent,
        record: Callable[[Mapping[str, Any]], object] | None = None,
    ) -> None:
        if items_per_epoch < 1:
            raise ValueError("items_per_epoch=0: the train split is empty; give the graph a train split")
        if config.patience is not None and not (evaluates and config.evaluate_every):
            raise ValueError(
                f"patience={config.patience} needs an evaluation; set evaluate_every >= 1, or patience to none"
            )
        self.config, self.workers, self.items_per_epoch = config, workers, items_per_epoch
        self.state = TrainState()
        self._evaluates = evaluates and config.evaluate_every > 0
        self._checkpoints, self._metrics_path, self._progress = checkpoints, metrics, progress
        self._stop, self._record = stop_requested or threading.Event(), record
        self._identity = {**config.identity(), "items_per_epoch": items_per_epoch, **(identity or {})}
        self._pending: list[ItemLoss] = []
        self._times = {"evaluate": 0.0, "checkpoint": 0.0}
        self._resumed_from = self._num_steps = self._num_seeds = 0
        self._saved_at, self._saved = time.monotonic(), (0, -1)  # step and finished epochs of the last checkpoint
        self._began_at, self._save_s, self._has_saved = self._saved_at, 0.0, False
        self._is_final = False  # no checkpoint is to follow
        self._logged_at, self._logged_step = time.monotonic(), 0
        self._begin_epoch()

    @property
    def total_steps(self) -> int:
        """Items of all epochs."""
        return self.items_per_epoch * self.config.epochs

    def run(self, *, resume: bool = True) -> TrainResult:
        """Train to the end, from the newest checkpoint where there is one (or from the start: `resume=False`).

        Raises Stopped after a checkpoint when asked to stop, ValueError for a loss that is not finite or a checkpoint
        of another run.
        """
        if resume:
            self._restore(read_latest(self._checkpoints))
        else:
            delete_checkpoints(self._checkpoints)
        with MetricsWriter(self._metrics_path, keep_bytes=self.state.metrics_bytes) as self._metrics:
            self._logged_at, self._logged_step = time.monotonic(), self.state.step
            self._began_at = self._saved_at = self._logged_at
            self._begin_epoch()
            self._end_epoch()
            if not self.state.finished:
                with self.workers.open(self.state.step, self.total_steps):
                    while not self.state.finished:
                        self._advance()
                        self._end_epoch()
                        self._save_if_due()
            if not self._is_final and self._saved != (self.state.step, self.state.epochs_done):
                self._save()
        return self._result()

    def _advance(self) -> None:
        """Train on the next items, as many as may go by without a look at the clock."""
        state, config = self.state, self.config
        step = state.step
        stop = min(step + self.workers.leg(step), self._next_save(step))
        losses = self.workers.advance(step, stop)
        assert [at for at, *_ in losses] == list(range(step, stop)), f"steps {step}..{stop} were not all trained"
        self._pending += losses
        state.step = stop
        self._num_steps += stop - step
        self._num_seeds += sum(num_seeds for _, num_seeds, _ in losses)
        if stop // config.log_every > step // config.log_every or len(self._pending) >= _MAX_PENDING:
            self._read_losses()

    def _next_save(self, step: int) -> int:
        """The end of the group, after `step`, at which `checkpoint_items` wants a checkpoint, or of the epoch."""
        every, group, epoch = self.config.checkpoint_items, self.config.accumulate, step // self.items_per_epoch
        end = (epoch + 1) * self.items_per_epoch
        if every is None:
            return end
        start, due = epoch * self.items_per_epoch, (step // every + 1) * every
        return min(end, start + -(-(due - start) // group) * group)

    def _read_losses(self) -> None:
        """Bring the losses of the last steps from the device, all at once, check them, and write what is to be
        logged."""
        if not self._pending:
            return
        state, values = self.state, torch.stack([loss for *_, loss in self._pending]).tolist()
        now = time.monotonic()
        rate = (state.step - self._logged_step) / max(1e-9, now - self._logged_at)
        for (step, num_seeds, _), value in zip(self._pending, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss is {value} at step {step} (item {step % self.items_per_epoch}) of epoch "
                    f"{step // self.items_per_epoch}; lower lr={self.config.lr}, set grad_clip or use "
                    f"precision=float32; the checkpoint of step {self._saved[0]} is kept in {self._checkpoints}"
                )
            state.loss_sum += value * num_seeds
            state.loss_seeds += num_seeds
            state.window_sum += value
            state.window_steps += 1
            if (step + 1) % self.config.log_every == 0:
                self._log(step + 1, rate)
                self._logged_at, self._logged_step = now, state.step
        self._pending.clear()

    def _write(self, record: dict[str, Any]) -> None:
        self._metrics.write(record)
        if self._record is not None:
            self._record(record)

    def _log(self, step: int, rate: float) -> None:
        state = self.state
        loss = state.window_sum / state.window_steps
        lr = update_rate(self.config, step - 1, self.items_per_epoch)
        self._write({"step": step, "epoch": step / self.items_per_epoch, "loss": loss, "lr": lr, "items_per_s": rate})
        self._progress("train", step, self.total_steps, "items", loss=loss, items_per_s=rate)
        state.window_sum, state.window_steps = 0.0, 0

    def _begin_epoch(self) -> None:
        self._epoch_began = (time.perf_counter() - self._times["checkpoint"], self._num_steps)

    def _rate(self) -> dict[str, float]:
        """Of this process in the running epoch, without checkpoints; empty where it trained none of it."""
        began, before = self._epoch_began
        steps, took_s = self._num_steps - before, time.perf_counter() - self._times["checkpoint"] - began
        return {"epoch_items_per_s": steps / max(1e-9, took_s)} if steps else {}

    def _end_epoch(self) -> None:
        """Do what is due at the end of an epoch, if one has just ended."""
        state, config = self.state, self.config
        if state.finished or state.step != (state.epochs_done + 1) * self.items_per_epoch:
            return
        self._read_losses()
        rate = self._rate()
        epoch = state.epochs_done + 1
        last = epoch == config.epochs
        due = self._evaluates and (last or self._is_due(epoch))
        if due and not self._is_due(epoch):
            self._save()  # of what comes, a run with more epochs knows nothing: it goes on from here
            self._is_final = True
        elif due:
            self._save_if_due()  # an evaluation may be long, and need not be repeated from far back
        found = self._run_evaluation(epoch) if due else {}
        state.losses.append(state.loss_sum / state.loss_seeds)
        values = {key: value for split, m in found.items() for key, value in m.to_json(f"{split}_").items()}
        told = {"train_loss": state.losses[-1], **values, **state.best_so_far(config.metric), **rate}
        self._write({"step": state.step, "epoch": epoch, **told})
        state.loss_sum, state.loss_seeds, state.epochs_done = 0.0, 0, epoch
        state.stopped_early = not last and self._has_waited_enough()
        state.finished = last or state.stopped_early
        self._logged_at = time.monotonic() if due else self._logged_at
        self._begin_epoch()

    def _is_due(self, epoch: int) -> bool:
        """Whether an epoch that is not the last is evaluated."""
        return self._evaluates and epoch % self.config.evaluate_every == 0

    def _has_waited_enough(self) -> bool:
        """Whether early stopping ends training after the epochs done, if they are not the last."""
        state, patience = self.state, self.config.patience
        waited = state.epochs_done - state.best_epoch
        return patience is not None and self._is_due(state.epochs_done) and waited >= patience

    def _run_evaluation(self, epoch: int) -> Mapping[str, Metrics]:
        state, began = self.state, time.perf_counter()
        found = self.workers.evaluate()
        if "valid" not in found:
            raise ValueError(f"the evaluation returned {sorted(found)}, without 'valid'; give the graph a valid split")
        if not all(math.isfinite(m.loss) for m in found.values()):
            raise ValueError(
                f"an evaluation loss is not finite after epoch {epoch}: {dict(found)}; lower lr or set grad_clip"
            )
        state.evaluations.append({"epoch": epoch, **{split: m.to_json() for split, m in found.items()}})
        valid = found["valid"]
        score = -valid.loss if self.config.metric == "loss" else float(getattr(valid, self.config.metric))
        if (score, -valid.loss) > (state.best_score, -state.best_loss):
            state.best_epoch, state.best_score, state.best_loss = epoch, score, valid.loss
            self.workers.keep_best()
        self._times["evaluate"] += time.perf_counter() - began
        return found

    def _longest_s(self) -> float:
        """How long to train without a checkpoint."""
        assert self.config.checkpoint_minutes is not None
        early = max(_FIRST_CHECKPOINT_S, self._saved_at - self._began_at, self._save_s / _CHECKPOINT_SHARE)
        return min(self.config.checkpoint_minutes * 60, early)

    def _save_if_due(self) -> None:
        config, state = self.config, self.state
        saved = self._saved[0]
        since = time.monotonic() - self._saved_at
        every = config.checkpoint_items
        items = every is not None and state.step // every > saved // every
        minutes = config.checkpoint_minutes is not None and since >= self._longest_s()
        epoch = state.step % self.items_per_epoch == 0 and (since >= _EPOCH_CHECKPOINT_S or not self._has_saved)
        if self._stop.is_set() and not state.finished:
            self._save()
            raise Stopped(
                f"stopped at step {state.step} of {self.total_steps}, with a checkpoint in {self._checkpoints}; "
                "run the same command again to continue"
            )
        if (items or minutes or epoch) and saved != state.step:
            self._save()

    def _save(self) -> None:
        self._read_losses()
        began = time.perf_counter()
        self.state.metrics_bytes = self._metrics.num_bytes
        tensors, scaler = self.workers.export()
        position = {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(self.state).items()}
        state = {"position": position, "identity": self._identity, "scaler": scaler}
        write_checkpoint(self._checkpoints, self.state.step, state, tensors, keep=self.config.keep_checkpoints)
        self._saved_at, self._saved = time.monotonic(), (self.state.step, self.state.epochs_done)
        self.workers.release(self.state.step)  # a resumed run starts here, so a rolling feed may drop what lies before
        ended = time.perf_counter()
        self._save_s, self._has_saved = ended - began, True
        self._times["checkpoint"] += self._save_s
        TRACE.add("checkpoint", f"step {self.state.step}", began, ended)

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            return
        there = checkpoint.state["identity"]
        if differing := sorted(k for k in there.keys() | self._identity if there.get(k) != self._identity.get(k)):
            values = ", ".join(f"{k} ({there.get(k)!r} there, {self._identity.get(k)!r} asked)" for k in differing)
            raise ValueError(
                f"{checkpoint.path} is of another run: {values}; restore the configuration or use another folder"
            )
        position = {k: v for k, v in checkpoint.state["position"].items() if v is not None}
        self.state = state = replace(TrainState(), **position)
        if state.step > self.total_steps:
            raise ValueError(
                f"{checkpoint.path} has {state.step / self.items_per_epoch:.4g} epochs behind it, epochs="
                f"{self.config.epochs} asks for fewer; ask for more, or train from the start"
            )
        if state.finished and state.epochs_done < self.config.epochs:  # it had reached an end that is none any more
            state.finished = state.stopped_early = self._has_waited_enough()
        self.workers.restore(checkpoint.tensors, checkpoint.state["scaler"])
        self._resumed_from, self._saved = self.state.step, (self.state.step, self.state.epochs_done)
        logger.info("continuing %s at step %d", checkpoint.path, self.state.step)

    def _result(self) -> TrainResult:
        state, times = self.state, {"compute": 0.0, "stall": 0.0, **self._times, **self.workers.times}
        busy = max(1e-9, times["compute"] + times["stall"])
        best = next((e for e in state.evaluations if e["epoch"] == state.best_epoch), {})
        return TrainResult(
            epochs=state.epochs_done,
            steps=state.step,
            resumed_from=self._resumed_from,
            stopped_early=state.stopped_early,
            losses=tuple(state.losses),
            evaluations=tuple(state.evaluations),
            best_epoch=state.best_epoch,
            best=best,
            compute_s=times["compute"],
            stall_s=times["stall"],
            evaluate_s=times["evaluate"],
            checkpoint_s=times["checkpoint"],
            items_per_s=self._num_steps / busy,
            seeds_per_s=self._num_seeds / busy,
        )


def update_rate(config: TrainConfig, step: int, items_per_epoch: int) -> float:
    """The learning rate of the optimizer step that item `step` belongs to."""
    updates_per_epoch = -(-items_per_epoch // config.accumulate)
    epoch, item = divmod(step, items_per_epoch)
    update = epoch * updates_per_epoch + item // config.accumulate
    return learning_rate(config, update, updates_per_epoch, config.epochs)
