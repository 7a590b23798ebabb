"""Progress for people: rich bars on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from penstock.live import LiveView, RankWindow, Rates, format_amount, format_numbers, name_straggler
from penstock.storage import logs
from penstock.storage.progress import Progress as ProgressCallback
from penstock.storage.progress import silent

_LINE_EVERY_S = 5.0
_REFRESHES = 4  # per second


class Lines:
    """One line per stage and interval, text or JSON like the log's; the last call of a stage is always shown."""

    def __init__(self) -> None:
        self._shown: dict[str, float] = {}
        self._rates, self._window = Rates(), RankWindow()

    def __call__(self, stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        rate, now = self._rates.rate(stage, done), time.monotonic()
        if done < total and now - self._shown.get(stage, 0.0) < _LINE_EVERY_S:
            return
        self._shown[stage] = now
        speed = f", {format_amount(rate, unit)}/s" if rate else ""
        shares = f"{format_amount(done, unit)} of {format_amount(total, unit)}{speed}"
        text = f"{stage}: {shares}  {format_numbers(numbers)}".rstrip()
        if logs.writes_json():
            shown = {"stage": stage, "done": done, "total": total, "unit": unit, **numbers}
            logs.emit("penstock.progress", text, progress=shown)
        else:
            print(text, file=sys.stderr, flush=True)

    def ranks(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Name the rank that the others wait for, if there is one."""
        now = time.monotonic()
        if now - self._shown.get("ranks", 0.0) < _LINE_EVERY_S:
            return
        self._shown["ranks"] = now
        found = name_straggler(entries, self._window.take(entries))
        if found is not None and logs.writes_json():
            logs.emit("penstock.progress", str(found), progress={"stage": "ranks", "straggler": found.to_json()})
        elif found is not None:
            print(f"ranks: {found}", file=sys.stderr, flush=True)


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[ProgressCallback]:
    """Yield what long steps report to."""
    if quiet:
        yield silent
    elif logs.writes_json() or not sys.stderr.isatty():
        yield Lines()
    else:
        view = LiveView()
        with Live(view, console=Console(stderr=True), refresh_per_second=_REFRESHES):
            yield view


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
