"""Where training is, what it came to, and the randomness of one step."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from penstock.kernels.rng import fold, mix
from penstock.storage.errors import TryAgain


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Where training is, but for tensors: the JSON part of a checkpoint.

    `epochs_done` counts epochs whose end (evaluation, best weights) is behind us; it lags `step` by one epoch while
    that end is still to come. `loss_sum` weighs by seeds, over the running epoch; `window_*` is since the last log.
    """

    step: int = 0
    epochs_done: int = 0
    finished: bool = False
    stopped_early: bool = False
    loss_sum: float = 0.0
    loss_seeds: int = 0
    window_sum: float = 0.0
    window_steps: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_score: float = -math.inf
    best_loss: float = math.inf
    metrics_bytes: int = 0

    def best_so_far(self, metric: str) -> dict[str, float]:
        """`best_epoch` and `best`, its value of the metric that is judged by; empty before the first evaluation."""
        if not self.best_epoch:
            return {}
        return {"best_epoch": self.best_epoch, "best": self.best_loss if metric == "loss" else self.best_score}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What training came to, in this process and not in those that it continues. `losses` is the mean per epoch.

    `times` names every second of `TrainLoop.run`: `start` (checkpoint, opening and closing the feed), `compute`,
    `stall` for the feed, `reduce` for other replicas, `evaluate`, `checkpoint`, `record` (all else).
    """

    epochs: int
    steps: int
    resumed_from: int
    stopped_early: bool
    losses: tuple[float, ...]
    evaluations: tuple[dict[str, Any], ...]
    best_epoch: int
    best: dict[str, Any]
    times: dict[str, float]
    items_per_s: float
    seeds_per_s: float


class Stopped(TryAgain, RuntimeError):
    """Training was asked to stop and has written a checkpoint; the same command continues it."""


def seed_step(seed: int, step: int, device: torch.device) -> None:
    """Seed PyTorch's generators for one step, by counter; step -1 is what comes before the first."""
    with np.errstate(over="ignore"):  # the hash wraps; NumPy scalars would warn where Numba is off
        key = np.uint64(mix(np.uint64(seed)))  # compiled kernels return plain integers
        value = int(fold(key, np.uint64(step & 0xFFFFFFFFFFFFFFFF))) >> 1
    torch.default_generator.manual_seed(value)  # torch.manual_seed also asks every absent accelerator, 70 us
    if device.type == "cuda":
        with torch.cuda.device(device):  # else it would seed the current device, which may be another
            torch.cuda.manual_seed(value)
