"""Progress for people: rich bars on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from penstock.storage import logs
from penstock.storage.budget import format_bytes
from penstock.storage.progress import Progress as ProgressCallback
from penstock.storage.progress import silent

_LINE_EVERY_S = 5.0


def _amount(value: float, unit: str) -> str:
    return format_bytes(value) if unit == "bytes" else f"{value:,.0f} {unit}"


def _numbers(numbers: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())


class _Rates:
    """Remembers when each stage began, to print its rate."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, int]] = {}

    def rate(self, stage: str, done: int) -> float:
        begun, first = self._begun.setdefault(stage, (time.monotonic(), done))
        return (done - first) / max(time.monotonic() - begun, 1e-3)


class _Lines:
    """One line per stage and interval, text or JSON like the log's; the last call of a stage is always shown."""

    def __init__(self) -> None:
        self._shown: dict[str, float] = {}
        self._rates = _Rates()

    def __call__(self, stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        rate, now = self._rates.rate(stage, done), time.monotonic()
        if done < total and now - self._shown.get(stage, 0.0) < _LINE_EVERY_S:
            return
        self._shown[stage] = now
        speed = f", {_amount(rate, unit)}/s" if rate else ""
        shares = f"{_amount(done, unit)} of {_amount(total, unit)}{speed}"
        text = f"{stage}: {shares}  {_numbers(numbers)}".rstrip()
        if logs.writes_json():
            shown = {"stage": stage, "done": done, "total": total, "unit": unit, **numbers}
            logs.emit("penstock.progress", text, progress=shown)
        else:
            print(text, file=sys.stderr, flush=True)


class _Bars:
    """One bar per stage."""

    def __init__(self, bars: Progress) -> None:
        self._bars, self._tasks, self._rates = bars, dict[str, object](), _Rates()

    def __call__(self, stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, text="")
        text = f"{_amount(done, unit)}  {_amount(self._rates.rate(stage, done), unit)}/s  {_numbers(numbers)}"
        self._bars.update(self._tasks[stage], completed=done, total=total, text=text)  # type: ignore[arg-type]


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[ProgressCallback]:
    """Yield what long steps report to."""
    if quiet:
        yield silent
    elif not sys.stderr.isatty():
        yield _Lines()
    else:
        columns = (TextColumn("{task.description:<10}"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%"))
        console = Console(stderr=True)
        with Progress(*columns, TextColumn("{task.fields[text]}"), TimeRemainingColumn(), console=console) as bars:
            yield _Bars(bars)


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print names and values on stdout; without frame where it is not a terminal."""
    if not sys.stdout.isatty():
        width = max((len(name) for name, _ in rows), default=0)
        print(title)
        for name, value in rows:
            print(f"  {name:<{width}}  {value}")
        return
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_columns(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with headings on stdout; without frame where it is not a terminal."""
    if not sys.stdout.isatty():
        widths = [max(len(row[n]) for row in (headings, *rows)) for n in range(len(headings))]
        print(title)
        for row in (headings, *rows):
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(*headings, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
