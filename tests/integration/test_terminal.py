"""What a terminal shows at 80 and at 150 columns, letter by letter; golden/terminal_*.txt is what it should be."""

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from penstock.display import Lines, column_table, value_table
from penstock.engine.chunked.estimate import HEADINGS, RANKS
from penstock.engine.metrics import Metrics
from penstock.epochs import EpochRecord
from penstock.fitting import fit_columns, fit_pieces
from penstock.live import LiveView, Stages

VALID = Metrics(accuracy=0.86, micro_f1=0.86, macro_f1=0.85, loss=0.5, num_nodes=100)
EPOCH = EpochRecord(
    epoch=3,
    epochs=10,
    loss=0.7761,
    valid=VALID,
    best_epoch=2,
    best=0.862,
    metric="micro_f1",
    items_per_s=64.51,
    epoch_s=2.0,
    left_s=14.2,
)
RANK_ENTRIES: tuple[dict[str, Any], ...] = (
    {
        "rank": 0,
        "host": "node-a.example",
        "step": 1200,
        "items_per_s": 5.25,
        "busy_s": 6.0,
        "stalls": {"feed": 1.0, "reduce": 3.0},
    },
    {
        "rank": 1,
        "host": "node-b.example",
        "step": 1200,
        "busy_s": 9.5,
        "stalls": {"reduce": 0.5},
        "hit_rates": {"pack": 0.25},
    },
)
SPLITS = (
    ("pipeline", "4", "1", "32", "1.25 s", "12 %", "192 MiB", "0 B", "1.5 GiB", "96 MiB in memory", "kept", "yes"),
    ("hybrid", "2", "2", "32", "1.5 s", "7 %", "64 MiB", "384 MiB", "1.1 GiB", "48 MiB on disk", "recomputed", "no"),
)
ENDED = (
    ("epochs", "3 of 3"),
    ("valid accuracy", "0.8602"),
    ("time", "1 min 5 s: prepare 3.37 s, train 58.3 s, test 1.34 s, save 1.37 s; and words that make the line long"),
)


class Clock:
    """Goes on when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def _grown(entry: dict[str, Any], times: int) -> dict[str, Any]:
    stalls = {cause: times * value for cause, value in entry["stalls"].items()}
    return {**entry, "busy_s": times * entry["busy_s"], "stalls": stalls}


def shown(width: int) -> str:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    view = LiveView(console, clock)
    view("sample valid", 0, 5, "items")
    view("pack train", 0, 1 << 30, "bytes")
    view("train", 0, 1200, "items")
    clock.now = 4.0
    view("sample valid", 5, 5, "items", edges=41234.0)
    view("pack train", 1 << 28, 1 << 30, "bytes")
    view("train", 300, 1200, "items", loss=1.25, items_per_s=64.51, stall_s=1.352, hit_rate=0.985)
    for times in range(1, 6):
        view.ranks([_grown(entry, times) for entry in RANK_ENTRIES])
    view.epoch(EPOCH)
    console.print(view)
    for table in (
        column_table("ways to run runs/deep on 4 ranks", HEADINGS, SPLITS, RANKS, width),
        value_table("run runs/papers: ok", ENDED),
    ):
        console.print(table, markup=False, highlight=False)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


@pytest.mark.parametrize("width", [80, 150])
def test_a_terminal_shows_what_fits(width: int) -> None:
    golden = Path(__file__).parent / "golden" / f"terminal_{width}.txt"
    text = shown(width)
    assert max(map(len, text.splitlines())) <= width
    assert text == golden.read_text()


def test_bars_percentages_and_time_left_stay_where_there_is_hardly_room() -> None:
    lines = [line for line in shown(44).splitlines() if line.startswith(("pack train", "train"))]
    assert len(lines) == 2
    assert all("━" in line and "25%" in line and "0:00:12" in line for line in lines)


def test_a_stage_that_begins_again_has_a_rate_of_its_own() -> None:
    clock = Clock()
    stages = Stages(clock)
    stages.update("pack", 0, 100, "bytes", {})
    clock.now = 1.0
    assert stages.update("pack", 80, 100, "bytes", {}).rate == 80.0
    clock.now = 5.0
    again = stages.update("pack", 10, 400, "bytes", {})
    assert again.rate == 0.0 and again.left_s is None
    clock.now = 7.0
    assert stages.update("pack", 50, 400, "bytes", {}).rate == 20.0


def test_a_line_has_one_rate(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    lines("train", 5, 10, "items", items_per_s=12.5, loss=1.0)
    lines("train", 10, 10, "items", items_per_s=64.5, loss=0.5, stall_s=0.25)
    lines.epoch(EPOCH)
    stage, epoch = capsys.readouterr().err.splitlines()
    assert stage == "train: 10 items of 10 items, 64.5 items/s  loss 0.5  stall 0.25 s"
    assert epoch == (
        "epoch 3 of 10  loss 0.7761  valid micro f1 0.8600  best 0.8620 (epoch 2)  64.51 items/s  0:00:14 left"
    )


def test_what_is_scored_every_epoch_says_once_that_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    for _ in range(3):
        for done in (1, 2):
            lines("valid", done, 2, "items")
    assert len(capsys.readouterr().err.splitlines()) == 1


PIECES = st.lists(st.tuples(st.integers(0, 4), st.text("ab", max_size=12)), max_size=8)


@given(pieces=PIECES, width=st.integers(0, 60))
def test_lines_fit_but_for_what_matters_most(pieces: list[tuple[int, str]], width: int) -> None:
    first = "  ".join(text for rank, text in pieces if rank == 0 and text)
    found = fit_pieces(pieces, width)
    assert len(found) <= max(width, len(first))
    assert fit_pieces(pieces, None) == "  ".join(text for _, text in pieces if text)


@given(
    cells=st.lists(st.text("ab", max_size=9), min_size=1, max_size=6),
    ranks=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    width=st.integers(0, 60),
)
def test_columns_fit_but_for_what_matters_most(cells: list[str], ranks: list[int], width: int) -> None:
    headings, own = ["ab"] * len(cells), ranks[: len(cells)]
    kept = fit_columns(headings, [cells], own, width, padding=3)
    size = sum(max(2, len(cells[n])) + 3 for n in kept)
    assert size <= width or all(own[n] == 0 for n in kept)
    assert all(n in kept for n in range(len(cells)) if own[n] == 0 and cells[n])
