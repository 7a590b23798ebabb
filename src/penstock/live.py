"""What a run looks like while it runs, on a terminal: a bar per stage, and a line per rank where there are several.

Ranks are described by the entries that `cluster.metrics` takes too: `rank`, `host`, `stage`, and, counted from the
rank's start, `step`, `busy_s` and `stalls` by cause; `items_per_s` and `hit_rates` are of late.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from penstock.engine.supervision.stragglers import RankTimes, Straggler, find_straggler
from penstock.storage.budget import format_bytes

_HEADINGS = ("rank", "host", "step", "items/s", "stall", "reduce", "hits", "")


def format_amount(value: float, unit: str) -> str:
    """A number with its unit."""
    return format_bytes(value) if unit == "bytes" else f"{value:,.0f} {unit}"


def format_numbers(numbers: Mapping[str, float]) -> str:
    """Names and values in a line."""
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())


class Rates:
    """Remembers when each stage began, to print its rate."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, int]] = {}

    def rate(self, stage: str, done: int) -> float:
        """Units per second since the stage was first seen."""
        begun, first = self._begun.setdefault(stage, (time.monotonic(), done))
        return (done - first) / max(time.monotonic() - begun, 1e-3)


class RankWindow:
    """Where each rank's time went since the last look."""

    def __init__(self) -> None:
        self._before: dict[int, dict[str, float]] = {}

    def take(self, entries: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
        """Seconds by rank: `busy`, `stall` for its own feed, `reduce` for other ranks."""
        return {int(entry["rank"]): self._of(entry) for entry in entries}

    def _of(self, entry: Mapping[str, Any]) -> dict[str, float]:
        stalls = entry.get("stalls") or {}
        stall_s = sum(value for cause, value in stalls.items() if cause != "reduce")
        now = {"busy": entry.get("busy_s", 0.0), "stall": stall_s, "reduce": stalls.get("reduce", 0.0)}
        before = self._before.get(int(entry["rank"]), {})
        self._before[int(entry["rank"])] = now
        if any(now[key] < before.get(key, 0.0) for key in now):  # the rank began anew
            before = {}
        return {key: value - before.get(key, 0.0) for key, value in now.items()}


def name_straggler(entries: Sequence[Mapping[str, Any]], spent: Mapping[int, Mapping[str, float]]) -> Straggler | None:
    """The rank that the others wait for, by what `RankWindow` found."""
    times = []
    for entry in entries:
        own = spent[int(entry["rank"])]
        host, busy_s = str(entry.get("host", "this machine")), own["busy"] + own["stall"]
        times.append(RankTimes(rank=int(entry["rank"]), host=host, busy_s=busy_s, waits={"feed": own["stall"]}))
    return find_straggler(times)


class LiveView:
    """A `Progress` that rich draws, with a table of ranks below; told by one thread, drawn by rich's."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<10}"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%"))
        self._bars = Progress(*columns, TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        self._tasks, self._rates = dict[str, TaskID](), Rates()
        self._window = RankWindow()
        self._table: Table | None = None

    def __call__(self, stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        """See Progress."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, text="")
        rate = format_amount(self._rates.rate(stage, done), unit)
        text = f"{format_amount(done, unit)}  {rate}/s  {format_numbers(numbers)}"
        self._bars.update(self._tasks[stage], completed=done, total=total, text=text)

    def ranks(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Show what every rank does."""
        spent = self._window.take(entries)
        found = name_straggler(entries, spent)
        straggler = None if found is None else found.rank
        table = Table(*_HEADINGS, box=None, padding=(0, 2, 0, 0))
        for entry in sorted(entries, key=lambda entry: int(entry["rank"])):
            rank = int(entry["rank"])
            row = (str(rank), str(entry.get("host", "")), *_cells(entry), *_percents(spent[rank]), _hits(entry))
            table.add_row(*row, "straggler" if rank == straggler else "", style="yellow" if rank == straggler else None)
        self._table = table

    def __rich__(self) -> RenderableType:
        return self._bars if self._table is None else Group(self._bars, self._table)


def _cells(entry: Mapping[str, Any]) -> tuple[str, str]:
    step, rate = entry.get("step"), entry.get("items_per_s")
    return "" if step is None else f"{step:,}", "" if rate is None else f"{rate:.4g}"


def _percents(spent: Mapping[str, float]) -> tuple[str, str]:
    total = max(1e-9, sum(spent.values()))
    return f"{spent['stall'] / total:.0%}", f"{spent['reduce'] / total:.0%}"


def _hits(entry: Mapping[str, Any]) -> str:
    rates = entry.get("hit_rates")
    return "" if not rates else f"{1 - rates.get('pack', 0.0):.0%}"
