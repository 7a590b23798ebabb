"""Training without tensors: which steps come next, when to evaluate, judge, log, save and stop.

What computes is behind `Workers`: the model in this process (`trainer`), or replicas of it elsewhere. The loop asks for
ranges of items and takes their losses, in the items' order, so its records do not depend on who computed them.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from penstock.engine.checkpoint import Checkpoint, delete_checkpoints, read_latest, write_checkpoint
from penstock.engine.metrics import Metrics, MetricsWriter
from penstock.engine.optim import learning_rate
from penstock.engine.throughput import Throughput
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
    "Of the seconds in `advance`, those in which it waited, by cause: `stall` for the feed, perhaps `reduce`; grow."

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
        self._times = {"start": 0.0, "evaluate": 0.0, "checkpoint": 0.0}
        self._throughput = Throughput()
        self._resumed_from = 0
        self._saved_at, self._saved = time.monotonic(), (0, -1)  # step and finished epochs of the last checkpoint
        self._began_at, self._save_s, self._has_saved = self._saved_at, 0.0, False
        self._is_final = False  # no checkpoint is to follow

    @property
    def total_steps(self) -> int:
        """Items of all epochs."""
        return self.items_per_epoch * self.config.epochs

    def run(self, *, resume: bool = True) -> TrainResult:
        """Train to the end, from the newest checkpoint where there is one (or from the start: `resume=False`).

        Raises Stopped after a checkpoint when asked to stop, ValueError for a loss that is not finite or a checkpoint
        of another run.
        """
        began = time.perf_counter()
        with self._timed("start"):
            if resume:
                self._restore(read_latest(self._checkpoints))
            else:
                delete_checkpoints(self._checkpoints)
        with MetricsWriter(self._metrics_path, keep_bytes=self.state.metrics_bytes) as self._metrics:
            self._began_at = self._saved_at = time.monotonic()
            self._end_epoch()
            if not self.state.finished:
                self._run_epochs()
            if not self._is_final and self._saved != (self.state.step, self.state.epochs_done):
                self._save()
        return self._result(time.perf_counter() - began)

    def _run_epochs(self) -> None:
        with ExitStack() as stack:
            with self._timed("start"):
                stack.enter_context(self.workers.open(self.state.step, self.total_steps))
            while not self.state.finished:
                with self._throughput.running():
                    self._advance()
                self._end_epoch()
                self._save_if_due()
            with self._timed("start"):
                stack.close()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._times[name] += time.perf_counter() - began

    def _advance(self) -> None:
        """Train on the next items, as many as may go by without a look at the clock."""
        state, config = self.state, self.config
        step = state.step
        stop = min(step + self.workers.leg(step), self._next_save(step))
        losses = self.workers.advance(step, stop)
        assert [at for at, *_ in losses] == list(range(step, stop)), f"steps {step}..{stop} were not all trained"
        self._pending += losses
        state.step = stop
        self._throughput.add(stop - step, sum(num_seeds for _, num_seeds, _ in losses))
        ends = stop % self.items_per_epoch == 0
        if ends or stop // config.log_every > step // config.log_every or len(self._pending) >= _MAX_PENDING:
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
        self._throughput.mark()
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
                self._log(step + 1)
        self._pending.clear()

    def _write(self, record: dict[str, Any]) -> None:
        self._metrics.write(record)
        if self._record is not None:
            self._record(record)

    def _log(self, step: int) -> None:
        state = self.state
        loss = state.window_sum / state.window_steps
        lr = update_rate(self.config, step - 1, self.items_per_epoch)
        self._write({"step": step, "epoch": step / self.items_per_epoch, "loss": loss, "lr": lr, **self._rate()})
        self._tell(step, loss)
        state.window_sum, state.window_steps = 0.0, 0

    def _tell(self, step: int, loss: float) -> None:
        """Show where training is."""
        numbers = {**self._rate(), "stall_s": self.workers.times["stall"]}
        self._progress("train", step, self.total_steps, "items", loss=loss, **numbers)

    def _rate(self) -> dict[str, float]:
        """Empty where this process trained nothing of the epoch."""
        rate = self._throughput.items_per_s
        return {} if rate is None else {"items_per_s": rate}

    def _end_epoch(self) -> None:
        """Do what is due at the end of an epoch, if one has just ended."""
        state, config = self.state, self.config
        if state.finished or state.step != (state.epochs_done + 1) * self.items_per_epoch:
            return
        self._read_losses()
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
        told = {"train_loss": state.losses[-1], **values, **state.best_so_far(config.metric), **self._rate()}
        self._write({"step": state.step, "epoch": epoch, **told})
        self._tell(state.step, state.losses[-1])
        self._throughput.end_epoch()
        state.loss_sum, state.loss_seeds, state.epochs_done = 0.0, 0, epoch
        state.stopped_early = not last and self._has_waited_enough()
        state.finished = last or state.stopped_early

    def _is_due(self, epoch: int) -> bool:
        """Whether an epoch that is not the last is evaluated."""
        return self._evaluates and epoch % self.config.evaluate_every == 0

    def _has_waited_enough(self) -> bool:
        """Whether early stopping ends training after the epochs done, if they are not the last."""
        state, patience = self.state, self.config.patience
        waited = state.epochs_done - state.best_epoch
        return patience is not None and self._is_due(state.epochs_done) and waited >= patience

    def _run_evaluation(self, epoch: int) -> Mapping[str, Metrics]:
        state = self.state
        with self._timed("evaluate"):
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
        logger.info("resumed from %s: step %d of %d", checkpoint.path, self.state.step, self.total_steps)

    def _result(self, total_s: float) -> TrainResult:
        state, throughput = self.state, self._throughput
        waits = {"stall": 0.0, "reduce": 0.0, **self.workers.times}
        times = {"compute": max(0.0, throughput.seconds - sum(waits.values())), **waits, **self._times}
        times["record"] = max(0.0, total_s - sum(times.values()))
        return TrainResult(
            epochs=state.epochs_done,
            steps=state.step,
            resumed_from=self._resumed_from,
            stopped_early=state.stopped_early,
            losses=tuple(state.losses),
            evaluations=tuple(state.evaluations),
            best_epoch=state.best_epoch,
            best=next((e for e in state.evaluations if e["epoch"] == state.best_epoch), {}),
            times=times,
            items_per_s=throughput.mean_items_per_s,
            seeds_per_s=throughput.seeds / max(1e-9, throughput.seconds),
        )


def update_rate(config: TrainConfig, step: int, items_per_epoch: int) -> float:
    """The learning rate of the optimizer step that item `step` belongs to."""
    updates_per_epoch = -(-items_per_epoch // config.accumulate)
    epoch, item = divmod(step, items_per_epoch)
    update = epoch * updates_per_epoch + item // config.accumulate
    return learning_rate(config, update, updates_per_epoch, config.epochs)
