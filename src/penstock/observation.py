"""All that watches a run, as one object: trackers, Ray's metrics, the live view, the timeline.

The driver of a run opens it and hands its methods to whatever trains; `record` and `epoch` return at once, and neither
they nor what is behind them change what is computed.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from penstock.config import RunConfig
from penstock.effects import effective_flat
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.spec import RankReport
from penstock.engine.prefetch import FeedStats
from penstock.engine.supervision.stragglers import RankTimes, StragglerWatch
from penstock.epochs import EpochWatch, OnEpoch
from penstock.storage.errors import DoesNotFit
from penstock.storage.progress import Progress
from penstock.storage.spans import TRACE, SpanLog
from penstock.timeline import Timeline
from penstock.tracking.tracker import Trackers, open_trackers

logger = logging.getLogger(__name__)

_KEPT = (
    *("config.yaml", "result.json", "metrics.jsonl", "timeline.json", "report.html", "curves.png", "schedule.png"),
    *("model/model.json", "model/model.safetensors"),
)


class Leg(Protocol):
    """What a replica did in one call, see replica.Leg: a loss per item, and seconds."""

    @property
    def losses(self) -> Sequence[object]: ...
    @property
    def compute_s(self) -> float: ...
    @property
    def stall_s(self) -> float: ...
    @property
    def reduce_s(self) -> float: ...
    @property
    def feed(self) -> FeedStats | None: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def queue_bytes(self) -> int | None: ...


class Observation:
    """See the module; made by `observed`."""

    def __init__(
        self, config: RunConfig, trackers: Trackers, show: Progress, on_epoch: Sequence[OnEpoch | None]
    ) -> None:
        self.timeline = Timeline()
        self._steps, self._trackers = config.track.trace_steps, trackers
        self._show_ranks = getattr(show, "ranks", None)
        told = (getattr(show, "epoch", None), *on_epoch)
        self._epochs = EpochWatch(config.train, tuple(listener for listener in told if listener is not None))
        self._on_ray = config.cluster.address is not None or config.chunked.backend == "ray"
        self._run = config.results_dir.absolute().name
        self._metrics: Any = None
        self._totals: dict[int, dict[str, float]] = {}
        self.stragglers = StragglerWatch()

    def training_begins(self, *, evaluates: bool) -> None:
        """What follows is training, at first or after a failure; whether it `evaluates` the valid split."""
        self._epochs.begin(evaluates=evaluates)

    def record(self, record: Mapping[str, Any]) -> None:
        """Take a record of `metrics.jsonl`."""
        self._epochs.take(record)
        self._trackers.observe(record)
        self._observe_on_ray(record)

    def finished(self, result: Mapping[str, Any]) -> None:
        """Take the result of a run that is done: trackers get its numbers, under `result/`."""
        step = result["epochs"][-1]["step"] if result["epochs"] else result["metrics"]["steps"]
        self._trackers.observe({"step": step, **final_numbers(result)})

    def ranks(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Take what every rank did so far; for the keys see `cluster.metrics`."""
        if self._show_ranks is not None:
            self._show_ranks(entries)
        self._observe_on_ray({"ranks": entries})

    def _observe_on_ray(self, record: Mapping[str, Any]) -> None:
        if not self._on_ray:
            return
        try:
            if self._metrics is None:  # not before: Ray is initialised where ranks are opened
                from penstock.cluster.metrics import RayMetrics

                self._metrics = RayMetrics(self._run)
            self._metrics.observe(record)
        except Exception as error:  # the boundary: a cluster that is lost must not end a driver by its metrics
            self._on_ray = False
            logger.warning("Ray takes no metrics (%s: %s); training goes on without", type(error).__name__, error)

    def epoch(self, epoch: int, reports: Sequence[RankReport], layout: Layout, began_s: float) -> None:
        """Take what ranks did in an epoch of full-graph training, and draw it if it is of the steps that are asked
        for."""
        self.ranks([self._entry(epoch, report, layout) for report in reports])
        self.stragglers.add([_epoch_times(report) for report in reports])
        if self._steps is not None and self._steps[0] <= epoch < self._steps[1]:
            self.timeline.add_epoch(epoch, reports, layout, began_s)

    def leg(self, step: int, legs: Sequence[Leg], hosts: Sequence[str], waits: Mapping[str, float]) -> None:
        """Take what replicas did since the last call, up to `step`: a leg and a host by rank, and for what all of them
        waited so far."""
        self.ranks([self._leg_entry(rank, step, leg, hosts[rank], waits) for rank, leg in enumerate(legs)])
        self.stragglers.add([_leg_times(rank, leg, hosts[rank]) for rank, leg in enumerate(legs)])

    def _leg_entry(self, rank: int, step: int, leg: Leg, host: str, waits: Mapping[str, float]) -> dict[str, Any]:
        told = {"busy_s": leg.compute_s, "feed": leg.stall_s, "reduce": leg.reduce_s, "items": float(len(leg.losses))}
        totals = self._add(rank, told)
        wall_s = leg.compute_s + leg.stall_s + leg.reduce_s
        return {
            "rank": rank,
            "host": host,
            "step": step,
            "items": totals["items"],
            "items_per_s": told["items"] / max(1e-9, wall_s),
            "busy_s": totals["busy_s"],
            "stalls": {
                "feed" if leg.queue_bytes is None else "feeder": totals["feed"],
                "reduce": totals["reduce"],
                **waits,
            },
            **({} if leg.queue_bytes is None else {"queue_bytes": leg.queue_bytes}),
            **({} if leg.feed is None else _by_tier(leg.feed, leg.row_bytes)),
        }

    def restarted(self, restarts: int) -> None:
        """Take how often all ranks started anew so far."""
        self._observe_on_ray({"restarts": restarts})

    def _add(self, rank: int, told: dict[str, float]) -> dict[str, float]:
        """Add to a rank's totals; they go on where ranks start anew."""
        totals = self._totals.setdefault(rank, dict.fromkeys(told, 0.0))
        totals |= {key: totals[key] + value for key, value in told.items()}
        return totals

    def _entry(self, epoch: int, report: RankReport, layout: Layout) -> dict[str, Any]:
        """What a rank did up to and with this epoch."""
        told = {"busy_s": report.busy_s, "reduce": report.wait_s, "feed": report.history_stall_s}
        totals = self._add(report.rank, told)
        return {
            "rank": report.rank,
            "stage": layout.stage_of(report.rank),
            "step": epoch + 1,
            "busy_s": totals["busy_s"],
            "stalls": {"reduce": totals["reduce"], "feed": totals["feed"]},
        }

    def spans(self, rank: int, log: SpanLog, *, offset_s: float = 0.0) -> None:
        """Take what another process recorded."""
        self.timeline.add(rank, log, offset_s=offset_s)


def _epoch_times(report: RankReport) -> RankTimes:
    waits = {"history": report.history_stall_s}
    return RankTimes(rank=report.rank, host=report.host, busy_s=report.busy_s, waits=waits)


def _leg_times(rank: int, leg: Leg, host: str) -> RankTimes:
    return RankTimes(rank=rank, host=host, busy_s=leg.compute_s + leg.stall_s, waits={"feed": leg.stall_s})


def final_numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """What `result.json` adds to `metrics.jsonl`: last scores, best epoch, rate, hit rates, stalls, timings, memory."""
    metrics = {key: value for key, value in result["metrics"].items() if key not in ("steps", "epochs")}
    found = {
        **metrics,
        **result.get("throughput", {}),
        **{f"hit_rate_{tier}": share for tier, share in result.get("hit_rates", {}).items()},
        **result.get("stalls", {}),
        **result["timings"],
        "bytes_read": result.get("bytes_read"),
        "peak_rss_bytes": result["peak_rss_bytes"],
    }
    return {f"result/{key}": float(value) for key, value in found.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _by_tier(feed: FeedStats, row_bytes: int) -> dict[str, Any]:
    rows = {"device": feed.device_rows, "host": feed.host_rows, "pack": feed.pack_rows}
    return {"hit_rates": feed.hit_rates, "bytes": {tier: count * row_bytes for tier, count in rows.items()}}


@contextmanager
def observed(config: RunConfig, show: Progress, on_epoch: Sequence[OnEpoch | None] = ()) -> Iterator[Observation]:
    """Watch a run until it ends, however it does; `timeline.json` is written and artefacts are sent at the end.

    MissingDependency, at once, where a tracker's library is not installed.
    """
    run_dir = config.results_dir
    with open_trackers(config.track.trackers, run_dir, effective_flat(config)) as trackers:
        found = Observation(config, trackers, show, on_epoch)
        TRACE.watch(config.track.trace_steps)
        try:
            yield found
        finally:
            log = TRACE.export()
            TRACE.watch(None)
            if log.spans:
                found.timeline.add(None, log)
            if len(found.timeline):
                _write(found.timeline, run_dir / "timeline.json")
            trackers.artefacts([run_dir / name for name in _KEPT])


def _write(timeline: Timeline, path: Path) -> None:
    try:
        timeline.write(path)
    except (DoesNotFit, OSError) as error:  # a picture of the run must not hide how it ended
        logger.warning("%s could not be written: %s", path, error)
