"""Numbers of a run as Ray metrics, which every node of a cluster offers to Prometheus under `ray_` and these names.

Ranks count from their start; what is new since the last record is added to a counter, so a rank that starts anew does
not count backwards. `deploy/grafana.json` draws them. `observe` takes records of `metrics.jsonl`; a list `ranks` in
one has an entry per rank, each with its number, and of these keys what there is:

| key of a rank | is | becomes |
|---|---|---|
| `rank`, `stage`, `host` | place | tags |
| `items` | trained so far | `penstock_items_total` |
| `items_per_s` | of late | `penstock_items_per_s` |
| `bytes` | read so far, by tier | `penstock_bytes_total` |
| `hit_rates` | share of rows, by tier | `penstock_hit_rate` |
| `stalls` | seconds waited so far, by cause, see below | `penstock_stall_seconds_total` |
| `busy_s` | seconds computed so far | `penstock_busy_seconds_total` |
| `queue_bytes` | windows of feeders that wait for it | `penstock_queue_bytes` |

Causes are `feed` (disk or producer), `reduce` (another rank was late), `evaluate`, `checkpoint` and `feeder`.
"""

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

_RANK = ("run", "rank", "stage", "host")
# name: kind, tags, description
METRICS: dict[str, tuple[type[Counter] | type[Gauge], tuple[str, ...], str]] = {
    "penstock_loss": (Gauge, ("run",), "Training loss."),
    "penstock_epoch": (Gauge, ("run",), "Epochs done."),
    "penstock_step": (Gauge, ("run",), "Steps done."),
    "penstock_valid_accuracy": (Gauge, ("run",), "Accuracy on the valid split."),
    "penstock_run_items_per_s": (Gauge, ("run",), "Items per second of all ranks."),
    "penstock_bubble": (Gauge, ("run",), "Share of time in which ranks of the pipeline waited for others."),
    "penstock_restarts_total": (Counter, ("run",), "How often all ranks started anew."),
    "penstock_items_total": (Counter, _RANK, "Items trained."),
    "penstock_items_per_s": (Gauge, _RANK, "Items per second."),
    "penstock_bytes_total": (Counter, (*_RANK, "tier"), "Bytes that a tier gave: device, host, pack."),
    "penstock_hit_rate": (Gauge, (*_RANK, "tier"), "Share of rows that came from a tier."),
    "penstock_stall_seconds_total": (Counter, (*_RANK, "cause"), "Seconds waited."),
    "penstock_busy_seconds_total": (Counter, _RANK, "Seconds computed."),
    "penstock_queue_bytes": (Gauge, _RANK, "Bytes of packs that feeders have ready."),
}
# of a record, in the order in which a later one wins
_RECORD = {
    "loss": "penstock_loss",
    "train_loss": "penstock_loss",
    "epoch": "penstock_epoch",
    "step": "penstock_step",
    "valid_accuracy": "penstock_valid_accuracy",
    "items_per_s": "penstock_run_items_per_s",
    "bubble": "penstock_bubble",
    "restarts": "penstock_restarts_total",
}
_OF_RANK = {
    "items": "penstock_items_total",
    "items_per_s": "penstock_items_per_s",
    "busy_s": "penstock_busy_seconds_total",
    "queue_bytes": "penstock_queue_bytes",
}
_BY_KIND = {
    "bytes": ("penstock_bytes_total", "tier"),
    "hit_rates": ("penstock_hit_rate", "tier"),
    "stalls": ("penstock_stall_seconds_total", "cause"),
}


class RayMetrics:
    """The metrics of one run; made and used by one thread of its driver, in which Ray is initialised."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._made = {name: kind(name, description=text, tag_keys=tags) for name, (kind, tags, text) in METRICS.items()}
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}

    def observe(self, record: Mapping[str, Any]) -> None:
        """Take a record of `metrics.jsonl`, with `ranks` where there are some. Keys that are no metric are left out."""
        for key, name in _RECORD.items():
            self._take(name, record.get(key), {"run": self._run})
        for entry in record.get("ranks", ()):
            tags = {"run": self._run, **{key: str(entry.get(key, "")) for key in _RANK[1:]}}
            for key, name in _OF_RANK.items():
                self._take(name, entry.get(key), tags)
            for key, (name, tag) in _BY_KIND.items():
                for kind, value in (entry.get(key) or {}).items():
                    self._take(name, value, {**tags, tag: kind})

    def _take(self, name: str, value: float | None, tags: dict[str, str]) -> None:
        if value is None:
            return
        metric = self._made[name]
        if isinstance(metric, Gauge):
            metric.set(value, tags)
            return
        key = (name, tuple(tags.values()))
        before = self._counted.get(key, 0.0)
        new = value - before if value >= before else value  # it fell: a rank began to count anew
        self._counted[key] = value
        if new > 0:
            metric.inc(new, tags)
