"""Where training gets its mini-batches: packs that are cycled, windows that a producer rolls out, or memory."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from penstock.engine.feed import open_pack_feed
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.prefetch import Feed, FeedStats
from penstock.prepare import (
    Prepared,
    claim_split,
    deal_of,
    does_not_fit,
    own_splits,
    read_planned,
    sample_split,
    sampling_of,
    train_budgets,
)
from penstock.run import Run
from penstock.sampled_memory import forecast_in_memory
from penstock.sampler.producer import start_producer
from penstock.sampler.sizing import ROLLING_SHARE
from penstock.storage.budget import total_memory, trim_heap
from penstock.storage.errors import DoesNotFit, Outgrown

P = ParamSpec("P")
T = TypeVar("T")
OpenSteps = Callable[[int, int], AbstractContextManager[Feed]]


@dataclass(slots=True)
class TrainFeed:
    """What the trainer asks for steps; `opened` is the last feed that it was given, for its statistics.

    `memory` is what the process was predicted to take, see `Forecast.to_json`.
    """

    items_per_epoch: int
    open_steps: OpenSteps
    prepared: Prepared | None = None
    memory: dict[str, Any] | None = None
    opened: Feed | None = None

    def stats(self) -> FeedStats | None:
        """What the feed did in this process; None where it was not needed."""
        return None if self.opened is None else self.opened.stats

    def numbers(self) -> dict[str, float]:
        """What is worth showing while it runs."""
        stats = self.stats()
        return {} if stats is None else {"hit_rate": 1 - stats.hit_rates["pack"]}

    @contextmanager
    def open(self, start_step: int, stop_step: int) -> Iterator[Feed]:
        """Feed steps start_step <= s < stop_step."""
        with self.open_steps(start_step, stop_step) as self.opened:
            yield self.opened


def _from_memory(run: Run) -> TrainFeed:
    claim_split(run, "train")
    trace = sample_split(run, "train")
    planned = {split: read_planned(run, split) for split in own_splits(run)}
    forecast = forecast_in_memory(run, trace, planned)
    forecast.check(run.budgets.host_bytes, total_memory())

    def open_steps(start_step: int, stop_step: int) -> Feed:
        return open_memory_feed(
            run.graph,
            trace,
            start_step=start_step,
            stop_step=stop_step,
            row_dtype=run.config.plan.row_dtype,
            device=run.config.train.device,
            threads=run.threads,
        )

    run.graph.drop_mapped()  # sampling has read it all
    trim_heap()
    return TrainFeed(trace.meta.items_per_epoch, open_steps, memory=forecast.to_json())


def _from_packs(run: Run, prepared: Prepared) -> TrainFeed:
    def open_steps(start_step: int, stop_step: int) -> Feed:
        return open_pack_feed(
            prepared.packs,
            run.graph,
            start_step=start_step,
            stop_step=stop_step,
            host_memory=run.train_host_bytes,
            device=run.config.train.device,
            threads=run.threads,
        )

    return TrainFeed(prepared.summary.items_per_epoch, open_steps, prepared, prepared.memory)


def _with_budgets_of(run: Run, function: Callable[P, T]) -> Callable[P, T]:
    """Let a function's DoesNotFit say what the whole run needs, and not what its producer does."""

    def call(*args: P.args, **options: P.kwargs) -> T:
        try:
            return function(*args, **options)
        except Outgrown:
            raise
        except DoesNotFit as error:
            raise does_not_fit(run, error) from error

    return call


def _from_producer(run: Run, prepared: Prepared) -> TrainFeed:
    """A producer is started for the steps that are asked for and stopped behind them; its windows are never kept."""

    @contextmanager
    def open_steps(start_step: int, stop_step: int) -> Iterator[Feed]:
        budgets = train_budgets(run)
        with (
            _with_budgets_of(run, start_producer)(
                run.graph.path,
                prepared.packs,
                sampling_of(run, "train").config,
                run.config.plan.model_copy(update={"mode": "rolling"}),
                budgets,
                start_step=start_step,
                stop_step=stop_step,
                deal=deal_of(run, "train"),
                threads=1,  # beside the trainer, which waits for cores and not for windows
            ) as producer,
            open_pack_feed(
                prepared.packs,
                run.graph,
                start_step=start_step,
                stop_step=stop_step,
                host_memory=int(budgets.host_bytes * ROLLING_SHARE),
                device=run.config.train.device,
                threads=run.threads,
                producer_check=_with_budgets_of(run, producer.check),
                start_over=_with_budgets_of(run, producer.start_over),
                delete_behind=True,
            ) as feed,
        ):
            yield feed

    return TrainFeed(prepared.summary.items_per_epoch, open_steps, prepared, prepared.memory)


def open_train_feed(run: Run, prepared: Prepared | None) -> TrainFeed:
    """Say how to open what training reads: the packs that were prepared for it, a producer's windows, or memory."""
    if prepared is None:
        return _from_memory(run)
    return _from_packs(run, prepared) if prepared.summary.mode == "reuse" else _from_producer(run, prepared)
