"""What an epoch's reports say of the run: where time went, what was sent, how old histories were.

| number | is |
|---|---|
| `items_per_s` | chunks of all replicas over `epoch_s` |
| `bubble` | share of the ranks' time in which they waited for rows of another stage |
| `imbalance` | the busiest rank's time over the mean, less 1 |
| `sent_bytes`, `wait_s` | between ranks, and the longest that a rank waited for others |
| `row_age_mean`, `row_age_max` | epochs since historical rows were computed, as they are read |
| `cut_fraction` | edges between chunks over all edges |
"""

from collections.abc import Sequence
from typing import Any

from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.spec import RankReport
from penstock.storage.chunks import ChunkMeta


def epoch_record(reports: Sequence[RankReport], meta: ChunkMeta, layout: Layout, epoch_s: float) -> dict[str, Any]:
    """Flat numbers of one epoch for `metrics.jsonl`."""
    busy = [report.busy_s for report in reports]
    longest = max(float(report.spans[-1, 1]) for report in reports)
    return {
        "epoch_s": epoch_s,
        "items_per_s": meta.num_chunks * layout.replicas / epoch_s,
        "bubble": max(0.0, 1 - sum(busy) / max(1e-9, layout.num_ranks * longest)),
        "imbalance": max(busy) / max(1e-9, sum(busy) / len(busy)) - 1,
        "sent_bytes": sum(report.bytes_sent for report in reports),
        "wait_s": max(report.wait_s for report in reports),
        "history_read_bytes": sum(report.history_read_bytes for report in reports),
        "history_written_bytes": sum(report.history_written_bytes for report in reports),
        "history_stall_s": max(report.history_stall_s for report in reports),
        "row_age_mean": sum(report.mean_age for report in reports) / len(reports),
        "row_age_max": max(report.oldest_row for report in reports),
        "cut_fraction": meta.cut_edges / max(1, meta.num_edges),
        "peak_rss_bytes": max(report.peak_rss_bytes for report in reports),
    }


def divide_epoch(reports: Sequence[RankReport], epoch_s: float) -> dict[str, float]:
    """The seconds of an epoch by what ranks did, in the mean: `compute`, `stall` (histories on disk), `reduce`."""
    stall_s = sum(report.history_stall_s for report in reports) / len(reports)
    wait_s = sum(report.wait_s for report in reports) / len(reports)
    return {"compute": max(0.0, epoch_s - stall_s - wait_s), "stall": stall_s, "reduce": wait_s}
