"""A record per epoch, for who called `penstock.train`: made of what `metrics.jsonl` gets at the end of an epoch."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from penstock.engine.metrics import Metrics
from penstock.engine.trainconfig import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """What `penstock.train(config, on_epoch=callback)` tells at the end of an epoch.

    `epoch` of `epochs` are done (the first record says 1); `loss` is the mean training loss of the epoch. `valid` has
    `accuracy`, `micro_f1`, `macro_f1`, `loss` and `num_nodes` of the valid split, None where no evaluation was due.
    `best_epoch` is the epoch whose weights are the result so far and `best` its valid `metric` (`train.metric`), both
    None before the first evaluation. `items_per_s` counts mini-batches (full graph: chunks) per second of training,
    without evaluation and checkpoints; None where the epoch was all trained before this process went on with it.
    `epoch_s` are the seconds of the whole epoch in this process, and `left_s` those that the others will take if they
    go as these went; None as long as this process has trained none.
    """

    epoch: int
    epochs: int
    loss: float
    valid: Metrics | None
    best_epoch: int | None
    best: float | None
    metric: str
    items_per_s: float | None
    epoch_s: float
    left_s: float | None


OnEpoch = Callable[[EpochRecord], object]


class EpochWatch:
    """Makes an `EpochRecord` of the records of `metrics.jsonl` that end an epoch, and tells all `listeners`.

    An evaluation that is due only because the epoch is the last may have a record of its own; the two are told as one.
    """

    def __init__(self, config: TrainConfig, listeners: tuple[OnEpoch, ...]) -> None:
        self._config, self._listeners = config, listeners
        self.begin(evaluates=False)

    def begin(self, *, evaluates: bool) -> None:
        """Training begins, or begins anew after a failure; whether it `evaluates` the valid split."""
        self._evaluates = evaluates and self._config.evaluate_every > 0
        self._began_s = time.monotonic()
        self._epochs_s: list[float] = []
        self._held: Mapping[str, Any] = {}

    def take(self, record: Mapping[str, Any]) -> None:
        """Take a record of `metrics.jsonl`; those within an epoch tell nothing."""
        is_end = "train_loss" in record
        if not is_end and not self._held:
            return
        record, self._held = {**self._held, **record}, {}
        if self._evaluates and "valid_loss" not in record and record["epoch"] == self._config.epochs:
            self._held = record
            return
        made = self._make(record)
        for listener in self._listeners:
            listener(made)

    def _make(self, record: Mapping[str, Any]) -> EpochRecord:
        now_s = time.monotonic()
        epoch_s, self._began_s = now_s - self._began_s, now_s
        if record.get("items_per_s") is not None:  # else it was trained before, and only told again here
            self._epochs_s.append(epoch_s)
        known_s = self._epochs_s[1:] or self._epochs_s  # of the first there may be a part
        names = ("accuracy", "micro_f1", "macro_f1", "loss", "num_nodes")
        valid = {name: record[f"valid_{name}"] for name in names} if "valid_loss" in record else None
        epoch, epochs = int(record["epoch"]), self._config.epochs
        return EpochRecord(
            epoch=epoch,
            epochs=epochs,
            loss=record["train_loss"],
            valid=None if valid is None else Metrics(**valid),
            best_epoch=record.get("best_epoch"),
            best=record.get("best"),
            metric=self._config.metric,
            items_per_s=record.get("items_per_s"),
            epoch_s=epoch_s,
            left_s=(epochs - epoch) * fmean(known_s) if known_s else None,
        )
