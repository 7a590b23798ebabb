"""Where full-graph training is, which epoch was the best, and what it came to."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from penstock.engine.chunked.spec import RankReport
from penstock.engine.metrics import Metrics


@dataclass(slots=True, kw_only=True)
class ChunkedState:
    """Where training is: the JSON part of a checkpoint."""

    epochs_done: int = 0
    stopped_early: bool = False
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_score: float | None = None
    best_loss: float | None = None
    metrics_bytes: int = 0

    def improves(self, epoch: int, valid: Metrics, metric: str) -> bool:
        """Take note of an evaluation of valid; whether it is the best so far."""
        score = -valid.loss if metric == "loss" else float(getattr(valid, metric))
        best = (-math.inf, -math.inf)
        if self.best_score is not None and self.best_loss is not None:
            best = (self.best_score, -self.best_loss)
        if (score, -valid.loss) <= best:
            return False
        self.best_epoch, self.best_score, self.best_loss = epoch, score, valid.loss
        return True

    def best_so_far(self, metric: str) -> dict[str, float]:
        """`best_epoch` and `best`, its value of the metric that is judged by; empty before the first evaluation."""
        if self.best_score is None or self.best_loss is None:
            return {}
        return {"best_epoch": self.best_epoch, "best": self.best_loss if metric == "loss" else self.best_score}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkedResult:
    """What training came to. `weights` are the best ones where there was an evaluation; times are of this process.

    `times` names every second of `ChunkedTrainer.run`: `start` (ranks, checkpoint), `compute`, `stall` for histories on
    disk, `reduce` for other ranks, `evaluate` (exact passes), `checkpoint`, `record` (all else, attempts that failed
    among it). Of ranks that wait in an epoch the mean counts.
    """

    weights: dict[str, Tensor]
    state: ChunkedState
    resumed_from: int
    reports: tuple[RankReport, ...]
    epoch_s: tuple[float, ...]
    times: dict[str, float]
    history_errors: dict[int, float]

    @property
    def losses(self) -> tuple[float, ...]:
        """Training loss of every epoch."""
        return tuple(self.state.losses)
