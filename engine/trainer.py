"""Train a model over a feed in this process, with checkpoints that continue to the same bits.

Whatever a step draws at random (dropout) comes from a generator seeded by (seed, step), so a step does not depend on
the steps before it but through weights, optimizer and buffers, and those are in the checkpoint. The feed may come from
packs, from memory or from a rolling producer: it is asked for steps [start, stop) and nothing else.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine.metrics import Metrics
from penstock.engine.minibatch import MiniBatch
from penstock.engine.optim import flatten_state, restore_state
from penstock.engine.prefetch import device_seconds
from penstock.engine.products import torch_threads
from penstock.engine.stepper import Stepper
from penstock.engine.trainconfig import TrainConfig
from penstock.engine.trainloop import ItemLoss, Tensors, TrainLoop, update_rate
from penstock.engine.trainstate import Stopped, TrainResult, TrainState, seed_step
from penstock.storage.progress import Progress, silent
from penstock.storage.spans import TRACE

__all__ = ["Evaluate", "OpenFeed", "Stopped", "TrainConfig", "TrainResult", "TrainState", "Trainer", "seed_step"]

OpenFeed = Callable[[int, int], AbstractContextManager[Iterable[MiniBatch]]]
Evaluate = Callable[[nn.Module], Mapping[str, Metrics]]
_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_device(config: TrainConfig) -> None:
    """ValueError where this machine has no such device, or it cannot do the precision."""
    is_cuda = torch.device(config.device).type == "cuda"
    if is_cuda and not torch.cuda.is_available():
        raise ValueError(f"device={config.device}, but this machine has no CUDA device; set device to cpu")
    if config.precision == "float16" and not is_cuda:
        raise ValueError(f"precision=float16 needs a CUDA device, device={config.device!r}; use bfloat16 or float32")


def make_stepper(model: nn.Module, config: TrainConfig, *, grouped: bool) -> Stepper:
    """The stepper that a configuration describes, its model on the configured device; see `check_device`."""
    check_device(config)
    device = torch.device(config.device)
    return Stepper(
        model.to(device),
        config,
        device=device,
        autocast=_PRECISIONS[config.precision],
        scaled=config.precision == "float16",
        seed=config.seed,
        grouped=grouped,
    )


class ModelState:
    """A model with its optimizer and the best weights so far, and what of them a checkpoint holds."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper, self.best = stepper, dict[str, Tensor]()

    def keep_best(self) -> None:
        """See Workers."""
        self.best = {name: t.detach().cpu().clone() for name, t in self.stepper.model.state_dict().items()}

    def export(self) -> tuple[Tensors, dict[str, Any]]:
        """See Workers; on the CPU, since who asks may be on a machine without a GPU."""
        found = {"model": self.stepper.model.state_dict(), "optimizer": flatten_state(self.stepper.optimizer)}
        tensors = {name: {key: t.detach().cpu() for key, t in named.items()} for name, named in found.items()}
        if self.best:
            tensors["best"] = self.best
        return tensors, self.stepper.scaler.state_dict()

    def restore(self, tensors: Tensors, scaler: dict[str, Any]) -> None:
        """See Workers."""
        self.stepper.model.load_state_dict(dict(tensors["model"]))
        self.stepper.restored()
        restore_state(self.stepper.optimizer, dict(tensors["optimizer"]))
        if scaler:
            self.stepper.scaler.load_state_dict(scaler)
        self.best = dict(tensors.get("best", {}))

    def take_best(self) -> None:
        """Give the model the best weights, where any were kept."""
        if self.best:
            self.stepper.model.load_state_dict(self.best)


class _LocalWorkers(ModelState):
    """The model of this process as `trainloop.Workers`."""

    def __init__(self, stepper: Stepper, config: TrainConfig, items_per_epoch: int, evaluate: Evaluate | None) -> None:
        super().__init__(stepper)
        self.times = {"stall": 0.0}
        self._config, self._items_per_epoch = config, items_per_epoch
        self._total_steps = items_per_epoch * config.epochs
        self._evaluate = evaluate
        self.open_feed: OpenFeed | None = None
        self.release: Callable[[int], None] = lambda step: None

    @contextmanager
    def open(self, start: int, stop: int) -> Iterator[None]:
        assert self.open_feed is not None, "set by Trainer.run"
        self.stepper.model.train()
        with self.open_feed(start, stop) as feed:
            self.release = getattr(feed, "release", self.release)
            self._batches = iter(feed)
            yield

    def leg(self, step: int) -> int:
        return self._config.accumulate

    def advance(self, start: int, stop: int) -> list[ItemLoss]:
        losses: list[ItemLoss] = []
        self.stepper.begin_group()
        for step in range(start, stop):
            TRACE.at(step)
            began, device_s = time.perf_counter(), device_seconds(self._batches)
            batch = next(self._batches, None)
            got = time.perf_counter()
            device_s = device_seconds(self._batches) - device_s
            if batch is None:
                raise RuntimeError(f"the feed ended at step {step} of {self._total_steps}")
            assert batch.step == step, f"the feed gave step {batch.step}, wanted {step}"
            losses.append((step, batch.num_seeds, self.stepper.add(batch, step)))
            ended = time.perf_counter()
            self.times["stall"] += got - began - device_s
            TRACE.add("stall", f"item {step}", began, got)
            TRACE.add("compute", f"item {step}", got, ended)
        began = time.perf_counter()
        self.stepper.step(update_rate(self._config, start, self._items_per_epoch))
        TRACE.add("compute", "update", began, time.perf_counter())
        return losses

    def evaluate(self) -> Mapping[str, Metrics]:
        assert self._evaluate is not None, "the loop asks where there is an evaluation"
        model = self.stepper.model
        model.eval()
        try:
            with torch.no_grad():
                return self._evaluate(model)
        finally:
            model.train()


class Trainer:
    """Trains one model in this process; not safe for several threads, but `stop_requested` may be set by any.

    `identity` is JSON that must be equal for a checkpoint to be continued, beside the configuration. `evaluate` gets
    the model in evaluation mode and returns metrics by split, `valid` among them. `record` gets what is written to
    `metrics`.
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
        record: Callable[[Mapping[str, Any]], object] | None = None,
    ) -> None:
        self.model, self.config = model, config
        stepper = make_stepper(model, config, grouped=config.accumulate > 1)
        self._workers = _LocalWorkers(stepper, config, items_per_epoch, evaluate)
        self._loop = TrainLoop(
            config,
            self._workers,
            items_per_epoch=items_per_epoch,
            checkpoints=checkpoints,
            metrics=metrics,
            evaluates=evaluate is not None,
            identity=identity,
            stop_requested=stop_requested,
            progress=progress,
            record=record,
        )

    @property
    def state(self) -> TrainState:
        """Where training is."""
        return self._loop.state

    @property
    def total_steps(self) -> int:
        """Steps of all epochs."""
        return self._loop.total_steps

    def run(self, open_feed: OpenFeed, *, resume: bool = True) -> TrainResult:
        """Train to the end, see `TrainLoop.run`. The model then has the best weights, or the last ones where nothing
        was evaluated."""
        self._workers.open_feed = open_feed
        with torch_threads(self.config.threads):
            result = self._loop.run(resume=resume)
        self._workers.take_best()
        return result
