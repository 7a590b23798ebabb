"""`timeline.json`: what every rank did when, in the Trace Event Format that ui.perfetto.dev and chrome://tracing open.

A rank is a process there, named after its rank, host and process id; what it did is in lanes, its threads. Times are
microseconds since the first span. Clocks of hosts differ: `offset_s` is what is added to those of a rank, and the
driver knows it from when it asked and when it was answered, see `clock_offset`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.spec import RankReport
from penstock.storage.manifest import write_atomic
from penstock.storage.spans import SpanLog

# from top to bottom; others follow in the order in which they appear
LANES = ("epoch", "compute", "stall", "reduce", "feed-read", "assemble", "actions", "evaluate", "checkpoint")
_DRIVER = -1
_Lane = tuple[int, str, int]  # process, name, thread
_Event = tuple[_Lane, str, float, float, dict[str, Any]]  # start and stop are times of day


def clock_offset(asked_s: float, theirs_s: float, answered_s: float) -> float:
    """What to add to times of another host: it read its clock between two readings of ours, in the middle we say."""
    return (asked_s + answered_s) / 2 - theirs_s


class Timeline:
    """Collects spans of all ranks and of the driver, whose rank is None; used by one thread."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._events: list[_Event] = []
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._events)

    def add(self, rank: int | None, log: SpanLog, *, offset_s: float = 0.0) -> None:
        """Take what a process recorded; `offset_s` is added to its clock."""
        process = _DRIVER if rank is None else rank
        title = "driver" if rank is None else f"rank {rank}"
        self._names[process] = f"{title} on {log.host}, process {log.pid}"
        base = log.origin_s + offset_s
        for lane, thread, name, start, stop, args in log.spans:
            self._events.append(((process, lane, thread), name, base + start, base + stop, args))
        self._dropped += log.dropped

    def add_epoch(self, epoch: int, reports: Sequence[RankReport], layout: Layout, began_s: float) -> None:
        """Take an epoch of full-graph training that began at a time of day; ranks began it together."""
        for report in reports:
            place = f"replica {layout.replica_of(report.rank)}, " if layout.replicas > 1 else ""
            place += f"part {layout.part_of(report.rank)}, stage {layout.stage_of(report.rank)}"
            self._names.setdefault(report.rank, f"rank {report.rank} ({place})")
            for kind, chunk, (start, stop) in zip(report.kinds, report.chunks, report.spans.tolist(), strict=True):
                args = {"epoch": epoch, "chunk": chunk}
                self._events.append(((report.rank, "actions", 0), kind, began_s + start, began_s + stop, args))

    def to_json(self) -> dict[str, Any]:
        """The file's content: metadata of processes and lanes, then complete events by time."""
        lanes = sorted({lane for lane, *_ in self._events}, key=_lane_order)
        numbers = {lane: number for number, lane in enumerate(lanes, start=1)}
        first = min((start for _, _, start, _, _ in self._events), default=0.0)
        metadata = [_metadata("process_name", process, 0, name=name) for process, name in self._names.items()]
        metadata += [_metadata("process_sort_index", process, 0, sort_index=process) for process in self._names]
        for lane, number in numbers.items():
            metadata.append(_metadata("thread_name", lane[0], number, name=lane[1]))
            metadata.append(_metadata("thread_sort_index", lane[0], number, sort_index=number))
        events = [
            {
                "ph": "X",
                "name": name,
                "cat": lane[1],
                "pid": lane[0] + 1,
                "tid": numbers[lane],
                "ts": round((start - first) * 1e6, 3),
                "dur": round((stop - start) * 1e6, 3),
                "args": args,
            }
            for lane, name, start, stop, args in sorted(self._events, key=lambda event: (event[2], -event[3]))
        ]
        return {
            "traceEvents": [*metadata, *events],
            "displayTimeUnit": "ms",
            "otherData": {"began_s": first, "dropped_spans": self._dropped},
        }

    def write(self, path: Path) -> None:
        """Write the file, atomically."""
        write_atomic(path, json.dumps(self.to_json(), separators=(",", ":")).encode())


def _lane_order(lane: _Lane) -> tuple[int, int, str, int]:
    process, name, thread = lane
    return process, LANES.index(name) if name in LANES else len(LANES), name, thread


def _metadata(kind: str, process: int, lane: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process + 1, "tid": lane, "args": args}
