"""Train a model over a feed, with checkpoints that continue to the same bits.

Whatever a step draws at random (dropout) comes from a generator seeded by (seed, step), so a step does not depend on
the steps before it but through weights, optimizer and buffers, and those are in the checkpoint. The feed may come from
packs, from memory or from a rolling producer: it is asked for steps [start, stop) and nothing else.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from penstock.engine.checkpoint import Checkpoint, delete_checkpoints, read_latest, write_checkpoint
from penstock.engine.metrics import MetricName, Metrics, MetricsWriter, node_loss
from penstock.engine.minibatch import MiniBatch
from penstock.engine.optim import (
    OptimConfig,
    build_optimizer,
    flatten_state,
    learning_rate,
    restore_state,
    set_learning_rate,
)
from penstock.engine.trainstate import TrainResult, TrainState, seed_step
from penstock.storage.progress import Progress, silent

__all__ = ["Evaluate", "OpenFeed", "Stopped", "TrainConfig", "TrainResult", "TrainState", "Trainer", "seed_step"]

logger = logging.getLogger(__name__)

OpenFeed = Callable[[int, int], AbstractContextManager[Iterable[MiniBatch]]]
Evaluate = Callable[[nn.Module], Mapping[str, Metrics]]
_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EPOCH_CHECKPOINT_S = 10.0  # epochs shorter than this are not worth a checkpoint each: it costs three fsyncs
_MAX_PENDING = 256  # losses left on the device before they are read whatever `log_every` says
# A resumed run may change these: its weights do not depend on them.
_MAY_CHANGE = {"checkpoint_items", "checkpoint_minutes", "keep_checkpoints", "log_every", "threads"}


class Stopped(RuntimeError):
    """Training was asked to stop and has written a checkpoint; the same command continues it."""


class TrainConfig(OptimConfig):
    """How to train.

    Every `evaluate_every` epochs (0: never) the model is evaluated; the weights of the best valid `metric` are kept and
    are the result. Training stops early after `patience` epochs without a better one. `metric` micro_f1 is the accuracy
    where a node has one label; ties go to the lower loss. float16 needs a CUDA device.

    An optimizer step takes the mean gradient over the seeds of `accumulate` consecutive items of an epoch, on however
    many replicas they are dealt to.
    """

    epochs: Annotated[int, Field(ge=1)] = 10
    seed: Annotated[int, Field(ge=0)] = 0
    accumulate: Annotated[int, Field(ge=1)] = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    metric: MetricName = "micro_f1"
    patience: Annotated[int, Field(ge=1)] | None = None
    evaluate_every: Annotated[int, Field(ge=0)] = 1
    checkpoint_items: Annotated[int, Field(ge=1)] | None = None
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = 10.0
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    log_every: Annotated[int, Field(ge=1)] = 10
    threads: Annotated[int, Field(ge=1)] | None = None
    device: str = "cpu"


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Trainer:
    """Owns model, optimizer and position; not safe for several threads, but `stop_requested` may be set by any.

    `identity` is JSON that must be equal for a checkpoint to be continued, beside the configuration. `evaluate` gets
    the model in evaluation mode and returns metrics by split, `valid` among them.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        *,
        items_per_epoch: int,
        checkpoints: Path,
        metrics: Path,
        evaluate: Evaluate | None = None,
        identity: Mapping[str, Any] | None = None,
        stop_requested: threading.Event | None = None,
        progress: Progress = silent,
    ) -> None:
        self.device = torch.device(config.device)
        if config.precision == "float16" and self.device.type != "cuda":
            raise ValueError(
                f"precision=float16 needs a CUDA device, device={config.device!r}; use bfloat16 or float32"
            )
        if items_per_epoch < 1:
            raise ValueError("items_per_epoch=0: the train split is empty; give the graph a train split")
        if config.patience is not None and (evaluate is None or not config.evaluate_every):
            raise ValueError(
                f"patience={config.patience} needs an evaluation; set evaluate_every >= 1, or patience to none"
            )
        self.model = model.to(self.device)
        self.config, self.items_per_epoch = config, items_per_epoch
        self.optimizer = build_optimizer(self.model.parameters(), config)
        self.state = TrainState()
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self._dtype = _PRECISIONS[config.precision]
        self._evaluate = evaluate if config.evaluate_every else None
        self._checkpoints, self._metrics_path, self._progress = checkpoints, metrics, progress
        self._stop = stop_requested or threading.Event()
        own = {key: value for key, value in config.model_dump(mode="json").items() if key not in _MAY_CHANGE}
        self._identity = {**own, "items_per_epoch": items_per_epoch, **(identity or {})}
        self._release: Callable[[int], object] = int  # replaced by the feed's own, where it has one
        self._best: dict[str, Tensor] = {}
        self._pending: list[tuple[int, int, int, Tensor]] = []
        self._times = {"compute": 0.0, "stall": 0.0, "evaluate": 0.0, "checkpoint": 0.0}
        self._resumed_from = self._num_steps = self._num_seeds = 0
        self._saved_at, self._saved = time.monotonic(), (0, -1)  # step and finished epochs of the last checkpoint
        self._logged_at, self._logged_step = time.monotonic(), 0

    @property
    def total_steps(self) -> int:
        """Steps of all epochs."""
        return self.items_per_epoch * self.config.epochs

    def run(self, open_feed: OpenFeed, *, resume: bool = True) -> TrainResult:
        """Train to the end, from the newest checkpoint where there is one (or from the start: `resume=False`).

        The model then has the best weights, or the last ones where nothing was evaluated. Raises Stopped after a
        checkpoint when asked to stop, ValueError for a loss that is not finite or a checkpoint of another run.
        """
        if resume:
            self._restore(read_latest(self._checkpoints))
        else:
            delete_checkpoints(self._checkpoints)
        with (
            _torch_threads(self.config.threads),
            MetricsWriter(self._metrics_path, keep_bytes=self.state.metrics_bytes) as self._metrics,
        ):
            self._logged_at, self._logged_step = time.monotonic(), self.state.step
            self._end_epoch()
            if not self.state.finished:
                self._train(open_feed)
            if self._saved != (self.state.step, self.state.epochs_done):
                self._save()
        if self._best:
            self.model.load_state_dict(self._best)
        return self._result()

    def _train(self, open_feed: OpenFeed) -> None:
        self.model.train()
        with open_feed(self.state.step, self.total_steps) as feed:
            self._release = getattr(feed, "release", self._release)
            batches = iter(feed)
            while not self.state.finished:
                began = time.perf_counter()
                batch = next(batches, None)
                got = time.perf_counter()
                if batch is None:
                    raise RuntimeError(f"the feed ended at step {self.state.step} of {self.total_steps}")
                self._step(batch)
                self._times["stall"] += got - began
                self._times["compute"] += time.perf_counter() - got
                self._end_epoch()
                self._save_if_due()

    def _step(self, batch: MiniBatch) -> None:
        state = self.state
        assert batch.step == state.step, f"the feed gave step {batch.step}, wanted {state.step}"
        if batch.features.device.type != self.device.type:
            batch = batch.to(self.device)
        seed_step(self.config.seed, state.step, self.device)
        set_learning_rate(
            self.optimizer, learning_rate(self.config, state.step, self.items_per_epoch, self.config.epochs)
        )
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            logits = self.model(batch.blocks, batch.features)
        loss = node_loss(logits, batch.labels)
        self.optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self.config.grad_clip is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._pending.append((state.step, batch.item, batch.num_seeds, loss.detach()))
        state.step += 1
        self._num_steps += 1
        self._num_seeds += batch.num_seeds
        if len(self._pending) >= _MAX_PENDING or state.step % self.config.log_every == 0:
            self._read_losses()
        if state.step % self.config.log_every == 0:
            self._log()

    def _read_losses(self) -> None:
        """Bring the losses of the last steps from the device, all at once, and check them."""
        if not self._pending:
            return
        state = self.state
        values = torch.stack([loss for *_, loss in self._pending]).tolist()
        for (step, item, num_seeds, _), value in zip(self._pending, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss is {value} at step {step} (item {item}); lower lr={self.config.lr}, set grad_clip "
                    f"or use precision=float32; the checkpoint of step {self._saved[0]} is kept in {self._checkpoints}"
                )
            state.loss_sum += value * num_seeds
            state.loss_seeds += num_seeds
            state.window_sum += value
            state.window_steps += 1
        self._pending.clear()

    def _log(self) -> None:
        state, now = self.state, time.monotonic()
        rate = (state.step - self._logged_step) / max(1e-9, now - self._logged_at)
        loss = state.window_sum / state.window_steps
        lr = learning_rate(self.config, state.step - 1, self.items_per_epoch, self.config.epochs)
        record = {"step": state.step, "epoch": state.step / self.items_per_epoch, "loss": loss, "lr": lr}
        self._metrics.write({**record, "items_per_s": rate})
        self._progress("train", state.step, self.total_steps, "items", loss=loss, items_per_s=rate)
        state.window_sum, state.window_steps = 0.0, 0
        self._logged_at, self._logged_step = now, state.step

    def _end_epoch(self) -> None:
        """Do what is due at the end of an epoch, if one has just ended."""
        state = self.state
        if state.finished or state.step != (state.epochs_done + 1) * self.items_per_epoch:
            return
        self._read_losses()
        epoch = state.epochs_done + 1
        last = epoch == self.config.epochs
        due = self._evaluate is not None and (last or epoch % self.config.evaluate_every == 0)
        if due:
            self._save_if_due()  # an evaluation may be long, and need not be repeated from far back
        found = self._run_evaluation(epoch) if due else {}
        state.losses.append(state.loss_sum / state.loss_seeds)
        values = {key: value for split, m in found.items() for key, value in m.to_json(f"{split}_").items()}
        self._metrics.write({"step": state.step, "epoch": epoch, "train_loss": state.losses[-1], **values})
        state.loss_sum, state.loss_seeds, state.epochs_done = 0.0, 0, epoch
        patience = self.config.patience
        state.stopped_early = due and patience is not None and not last and epoch - state.best_epoch >= patience
        state.finished = last or state.stopped_early
        self._logged_at = time.monotonic() if due else self._logged_at

    def _run_evaluation(self, epoch: int) -> Mapping[str, Metrics]:
        assert self._evaluate is not None
        state, began = self.state, time.perf_counter()
        self.model.eval()
        try:
            with torch.no_grad():
                found = self._evaluate(self.model)
        finally:
            self.model.train()
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
            self._best = {name: t.detach().cpu().clone() for name, t in self.model.state_dict().items()}
        self._times["evaluate"] += time.perf_counter() - began
        return found

    def _save_if_due(self) -> None:
        config, state = self.config, self.state
        since = time.monotonic() - self._saved_at
        items = config.checkpoint_items is not None and state.step % config.checkpoint_items == 0
        minutes = config.checkpoint_minutes is not None and since >= config.checkpoint_minutes * 60
        epoch = state.step % self.items_per_epoch == 0 and since >= _EPOCH_CHECKPOINT_S
        if self._stop.is_set() and not state.finished:
            self._save()
            raise Stopped(
                f"stopped at step {state.step} of {self.total_steps}, with a checkpoint in {self._checkpoints}; "
                "run the same command again to continue"
            )
        if (items or minutes or epoch) and self._saved[0] != state.step:
            self._save()

    def _save(self) -> None:
        self._read_losses()
        began = time.perf_counter()
        self.state.metrics_bytes = self._metrics.num_bytes
        tensors = {"model": self.model.state_dict(), "optimizer": flatten_state(self.optimizer)}
        if self._best:
            tensors["best"] = self._best
        position = {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(self.state).items()}
        state = {"position": position, "identity": self._identity, "scaler": self._scaler.state_dict()}
        write_checkpoint(self._checkpoints, self.state.step, state, tensors, keep=self.config.keep_checkpoints)
        self._saved_at, self._saved = time.monotonic(), (self.state.step, self.state.epochs_done)
        self._release(self.state.step)  # a resumed run starts here, so a rolling feed may drop what lies before
        self._times["checkpoint"] += time.perf_counter() - began

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
        self.state = replace(TrainState(), **position)
        self.model.load_state_dict(checkpoint.tensors["model"])
        restore_state(self.optimizer, checkpoint.tensors["optimizer"])
        if checkpoint.state["scaler"]:
            self._scaler.load_state_dict(checkpoint.state["scaler"])
        self._best = checkpoint.tensors.get("best", {})
        self._resumed_from, self._saved = self.state.step, (self.state.step, self.state.epochs_done)
        logger.info("continuing %s at step %d", checkpoint.path, self.state.step)

    def _result(self) -> TrainResult:
        state, times = self.state, self._times
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
            **{f"{name}_s": value for name, value in times.items()},
            items_per_s=self._num_steps / busy,
            seeds_per_s=self._num_seeds / busy,
        )
