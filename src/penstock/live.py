"""What a run looks like while it runs, on a terminal: a bar per stage, and a line per rank where there are several.

Ranks are described by the entries that `cluster.metrics` takes too: `rank`, `host`, `stage`, and, counted from the
rank's start, `step`, `busy_s` and `stalls` by cause; `items_per_s` and `hit_rates` are of late.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table

from penstock.engine.supervision.stragglers import RankTimes, Straggler, StragglerWatch
from penstock.epochs import EpochRecord
from penstock.fitting import fit_columns, fit_pieces
from penstock.storage.budget import format_bytes

_HEADINGS = ("rank", "host", "step", "items/s", "stall", "reduce", "hits", "")
_RANKS = (0, 5, 1, 1, 2, 3, 4, 0)  # what a column matters
_STAGES = 8  # shown together: those that moved last
_BAR = 24
_WINDOWS = 20  # of what ranks did, by which a straggler is found: of late


def format_amount(value: float, unit: str) -> str:
    """A number with its unit."""
    return format_bytes(value) if unit == "bytes" else f"{value:,.0f} {unit}"


def format_rate(value: float, unit: str) -> str:
    """Units per second."""
    return f"{format_bytes(value)}/s" if unit == "bytes" else f"{value:,.4g} {unit}/s"


def format_left(seconds: float) -> str:
    """How long something will take, as a clock shows it: 0:00:12."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def format_number(name: str, value: float) -> str:
    """A number beside its name, in the unit that the name tells."""
    if name.endswith("_s"):
        return f"{name.removesuffix('_s')} {value:.3g} s"
    if name.endswith("_rate"):
        return f"{name.replace('_', ' ')} {value:.0%}"
    return f"{name.replace('_', ' ')} {value:,.0f}" if abs(value) >= 1000 else f"{name.replace('_', ' ')} {value:.4g}"


def format_numbers(numbers: Mapping[str, float]) -> list[str]:
    """Names and values, in the order in which they matter."""
    return [format_number(name, value) for name, value in numbers.items()]


@dataclass(slots=True, kw_only=True)
class Stage:
    """Where a stage is. `rate` is in units per second, as the stage says itself, or else since it began, at which there
    were `first` units done; the time left follows from the latter, which counts what lies between."""

    unit: str
    first: int
    began: float
    rounds: int = 0
    done: int = 0
    total: int = 0
    rate: float = 0.0
    spent_s: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def left_s(self) -> float | None:
        """Seconds until it is done, if it goes as it went."""
        if self.done >= self.total or self.done <= self.first:
            return None
        return (self.total - self.done) * self.spent_s / (self.done - self.first)


class Stages:
    """Every stage that was heard of; one whose amount falls has begun again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.known: dict[str, Stage] = {}

    def update(self, name: str, done: int, total: int, unit: str, numbers: Mapping[str, float]) -> Stage:
        """Take what a `Progress` is told."""
        stage = self.known.pop(name, None)
        if stage is None or done < stage.done or stage.unit != unit:
            rounds = 0 if stage is None else stage.rounds + 1
            stage = Stage(unit=unit, first=done, began=self._clock(), rounds=rounds)
        self.known[name] = stage  # the last one is the one that moved last
        told = numbers.get(f"{unit}_per_s")
        stage.done, stage.total, stage.spent_s = done, total, max(self._clock() - stage.began, 1e-3)
        stage.rate = (done - stage.first) / stage.spent_s if told is None else told
        stage.numbers = {key: value for key, value in numbers.items() if key != f"{unit}_per_s"}
        return stage


def stage_line(name: str, stage: Stage) -> str:
    """A stage as a line of a log."""
    amounts = f"{name}: {format_amount(stage.done, stage.unit)} of {format_amount(stage.total, stage.unit)}"
    rate = format_rate(stage.rate, stage.unit) if stage.rate > 0 else ""
    left = "" if stage.left_s is None else f"{format_left(stage.left_s)} left"
    parts = ", ".join(part for part in (amounts, rate, left) if part)
    return "  ".join([parts, *format_numbers(stage.numbers)])


def epoch_line(record: EpochRecord, width: int | None = None) -> str:
    """The end of an epoch as a line, within `width` characters where there is one."""
    metric = record.metric.replace("_", " ")
    valid = "" if record.valid is None else f"valid {metric} {getattr(record.valid, record.metric):.4f}"
    best = "" if record.best is None else f"best {record.best:.4f} (epoch {record.best_epoch})"
    rate = "" if record.items_per_s is None else format_rate(record.items_per_s, "items")
    left = f"{format_left(record.left_s)} left" if record.left_s is not None and record.epoch < record.epochs else ""
    places = f"epoch {record.epoch} of {record.epochs}"
    return fit_pieces([(0, places), (0, f"loss {record.loss:.4f}"), (1, valid), (2, best), (4, rate), (3, left)], width)


class RankWindow:
    """Where each rank's time went since the last look."""

    def __init__(self) -> None:
        self._before: dict[int, dict[str, float]] = {}
        self._stragglers = StragglerWatch(_WINDOWS)

    def take(self, entries: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
        """Seconds by rank: `busy`, `stall` for its own feed, `reduce` for other ranks."""
        spent = {int(entry["rank"]): self._of(entry) for entry in entries}
        self._stragglers.add([_rank_times(entry, spent[int(entry["rank"])]) for entry in entries])
        return spent

    def straggler(self) -> Straggler | None:
        """The rank that others waited for of late, beyond noise."""
        return self._stragglers.find()

    def _of(self, entry: Mapping[str, Any]) -> dict[str, float]:
        stalls = entry.get("stalls") or {}
        stall_s = sum(value for cause, value in stalls.items() if cause != "reduce")
        now = {"busy": entry.get("busy_s", 0.0), "stall": stall_s, "reduce": stalls.get("reduce", 0.0)}
        before = self._before.get(int(entry["rank"]), {})
        self._before[int(entry["rank"])] = now
        if any(now[key] < before.get(key, 0.0) for key in now):  # the rank began anew
            before = {}
        return {key: value - before.get(key, 0.0) for key, value in now.items()}


def _rank_times(entry: Mapping[str, Any], spent: Mapping[str, float]) -> RankTimes:
    busy_s, host = spent["busy"] + spent["stall"], str(entry.get("host", "this machine"))
    return RankTimes(rank=int(entry["rank"]), host=host, busy_s=busy_s, waits={"feed": spent["stall"]})


class LiveView:
    """A `Progress` that rich draws, with a table of ranks below; told by one thread, drawn by rich's.

    At any width it shows names, bars, percentages and the time left; amounts, rates and other numbers where they fit.
    Epochs go to `console`, above what is drawn.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._stages, self._window = Stages(clock), RankWindow()
        self._rows: list[tuple[str, ...]] = []

    def __call__(self, stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        """See Progress."""
        self._stages.update(stage, done, total, unit, numbers)

    def epoch(self, record: EpochRecord) -> None:
        """Show the end of an epoch for good."""
        self._console.print(epoch_line(record, self._console.width), highlight=False, markup=False)

    def ranks(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Show what every rank does."""
        spent = self._window.take(entries)
        found = self._window.straggler()
        rows: list[tuple[str, ...]] = []
        for entry in sorted(entries, key=lambda entry: int(entry["rank"])):
            rank = int(entry["rank"])
            is_late = found is not None and found.rank == rank
            place = (str(rank), str(entry.get("host", "")))
            rows.append((*place, *_cells(entry), *_percents(spent[rank]), _hits(entry), "straggler" if is_late else ""))
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._bars(options.max_width)
        if self._rows:
            yield self._table(options.max_width)

    def _bars(self, width: int) -> Table:
        shown = dict(list(self._stages.known.items())[-_STAGES:])
        table = Table.grid(padding=(0, 2, 0, 0))
        names = max((len(name) for name in shown), default=0)
        bar = max(8, min(_BAR, width - names - 52))
        for _ in range(5):
            table.add_column(no_wrap=True)
        room = width - names - bar - len("100%") - len("0:00:00") - 8
        for name, stage in shown.items():
            left = "" if stage.left_s is None else format_left(stage.left_s)
            share = stage.done / max(1, stage.total)
            drawn = ProgressBar(total=max(1, stage.total), completed=stage.done, width=bar)
            table.add_row(name, drawn, f"{share:4.0%}", f"{left:>7}", _details(stage, room))
        return table

    def _table(self, width: int) -> Table:
        kept = fit_columns(_HEADINGS, self._rows, _RANKS, width, padding=2)
        table = Table(*(_HEADINGS[n] for n in kept), box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for row in self._rows:
            table.add_row(*(row[n] for n in kept), style="yellow" if row[-1] else None)
        return table


def _details(stage: Stage, room: int) -> str:
    rate = format_rate(stage.rate, stage.unit) if stage.rate > 0 else ""
    numbers = [(n + 2, text) for n, text in enumerate(format_numbers(stage.numbers))]
    pieces = [(1, format_amount(stage.done, stage.unit)), (2, rate), *numbers]
    return fit_pieces(pieces, max(0, room))


def _cells(entry: Mapping[str, Any]) -> tuple[str, str]:
    step, rate = entry.get("step"), entry.get("items_per_s")
    return "" if step is None else f"{step:,}", "" if rate is None else f"{rate:.4g}"


def _percents(spent: Mapping[str, float]) -> tuple[str, str]:
    total = max(1e-9, sum(spent.values()))
    return f"{spent['stall'] / total:.0%}", f"{spent['reduce'] / total:.0%}"


def _hits(entry: Mapping[str, Any]) -> str:
    rates = entry.get("hit_rates")
    return "" if not rates else f"{1 - rates.get('pack', 0.0):.0%}"
