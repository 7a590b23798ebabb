"""Progress for people: bars on a terminal, lines elsewhere; and tables for what came of it."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from penstock.epochs import EpochRecord
from penstock.fitting import fit_columns
from penstock.live import LiveView, RankWindow, Stages, epoch_line, stage_line
from penstock.storage import logs
from penstock.storage.progress import Progress as ProgressCallback
from penstock.storage.progress import silent

_LINE_EVERY_S = 5.0
_REFRESHES = 4  # per second
_FRAME = 3  # characters that rich draws beside each column


class Lines:
    """A line per epoch, and per stage and interval, text or JSON like the log's; that a stage ended is said once."""

    def __init__(self) -> None:
        self._shown: dict[str, float] = {}
        self._stages, self._window = Stages(), RankWindow()

    def __call__(self, stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        now, found = time.monotonic(), self._stages.update(stage, done, total, unit, numbers)
        is_due = now - self._shown.setdefault(stage, now) >= _LINE_EVERY_S
        if not is_due and (done < total or found.rounds > 0):
            return
        self._shown[stage] = now
        rate = {"rate": found.rate} if found.rate > 0 else {}
        shown = {"stage": stage, "done": done, "total": total, "unit": unit, **rate, **numbers}
        _say(stage_line(stage, found), shown)

    def epoch(self, record: EpochRecord) -> None:
        """Say that an epoch ended."""
        _say(epoch_line(record), {"stage": "epoch", **asdict(record)})

    def ranks(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Name the rank that the others wait for, if there is one."""
        self._window.take(entries)
        now, found = time.monotonic(), self._window.straggler()
        if found is not None and now - self._shown.get("ranks", 0.0) >= _LINE_EVERY_S:
            self._shown["ranks"] = now
            _say(f"ranks: {found}", {"stage": "ranks", "straggler": found.to_json()})


def _say(text: str, shown: Mapping[str, Any]) -> None:
    if logs.writes_json():
        logs.emit("penstock.progress", text, progress=dict(shown))
    else:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[ProgressCallback]:
    """Yield what long steps report to."""
    if quiet:
        yield silent
    elif logs.writes_json() or not sys.stderr.isatty():
        yield Lines()
    else:
        console = Console(stderr=True)
        view = LiveView(console)
        # prints of a caller to a stdout that goes elsewhere are not to come out on stderr
        redirect = sys.stdout.isatty()
        with Live(view, console=console, refresh_per_second=_REFRESHES, redirect_stdout=redirect):
            yield view


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values on stdout; without frame where it is not a terminal."""
    if not sys.stdout.isatty():
        width = max((len(name) for name, _ in rows), default=0)
        print(title)
        for name, value in rows:
            print(f"  {name:<{width}}  {value}".rstrip())
        return
    Console().print(value_table(title, rows), markup=False, highlight=False)


def value_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Names and values, as a terminal shows them."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def print_columns(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], ranks: Sequence[int] | None = None
) -> None:
    """Print a table with headings on stdout; without frame where it is not a terminal.

    On a terminal columns are left out that do not fit: those of the highest `ranks` first, 0 never.
    """
    if not sys.stdout.isatty():
        widths = [max(len(row[n]) for row in (headings, *rows)) for n in range(len(headings))]
        print(title)
        for row in (headings, *rows):
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    console = Console()
    console.print(column_table(title, headings, rows, ranks, console.width), markup=False, highlight=False)


def column_table(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], ranks: Sequence[int] | None, width: int
) -> Table:
    """A table with headings, as a terminal of so many characters shows it; says below what it left out."""
    kept = fit_columns(headings, rows, ranks or (0,) * len(headings), width - 1, padding=_FRAME)
    missing = [name for n, name in enumerate(headings) if n not in kept and any(row[n] for row in rows)]
    caption = f"not shown at this width: {', '.join(missing)}" if missing else None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for n in kept:
        table.add_column(headings[n], no_wrap=True)
    for row in rows:
        table.add_row(*(row[n] for n in kept))
    return table
