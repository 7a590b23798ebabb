"""Forms of `penstock bench`, what is in a record, and the comparison of policies on accesses of a user's own."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.__main__ import main
from penstock.benchmarks import run as benches
from penstock.benchmarks.harness import interleave, record
from penstock.benchmarks.policies import read_accesses
from penstock.benchmarks.titles import TITLES
from penstock.storage.errors import DataError
from penstock.storage.trace import open_trace
from penstock.storage.trace_import import write_accesses
from penstock.validation import validate_trace_window

README = (Path(__file__).parents[2] / "README.md").read_text()
Called = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Called:
    """A function that runs `penstock bench`; exit code, stdout, stderr."""

    def called(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["bench", *words])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return called


@pytest.fixture
def accesses(tmp_path: Path) -> Path:
    """Items of ten rows each of a table of 200; a few rows are hot."""
    rng = np.random.default_rng(0)
    rows = np.minimum(rng.geometric(0.02, 400), 200) - 1
    path = tmp_path / "accesses.parquet"
    pq.write_table(pa.table({"item": np.repeat(np.arange(40), 10), "row": rows}), path)
    return path


def test_the_rows_of_the_readme_have_its_names() -> None:
    table = README.partition("| case | peer | ratio | wanted |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert set(rows) == set(TITLES.values()) and len(rows) == len(TITLES)


def test_a_record_has_every_repeat_and_how_far_they_are_apart() -> None:
    ours, peer = iter([99.0, 1.0, 3.0, 2.0]), iter([99.0, 4.0, 4.0, 4.0])
    values = interleave(lambda: next(ours), lambda: next(peer), 3)
    found = record("feed", "bandwidth", "bytes/s", *values, "a peer", True, 3)
    assert found["ours_repeats"] == [1, 3, 2] and found["ours"] == 2 and found["ours_spread"] == 1
    assert found["peer_repeats"] == [4, 4, 4] and found["peer_spread"] == 0 and found["ratio"] == 0.5
    assert found["title"] == "bytes per second of the feed"
    assert record("x", "a_case", "s", 1.0, 2.0, "p", False, 1)["title"] == "a case"


def test_policies_are_compared_on_accesses_of_ones_own(call: Called, accesses: Path, tmp_path: Path) -> None:
    words = ("policies", "--trace", str(accesses), "--row-bytes", "4096", "--tiers", "0.1,0.5", "--quiet")
    code, out, err = call(*words, "--json")
    *found, machine = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and not err and machine["machine"] and machine["commit"] == found[0]["commit"]
    by_case = {each["case"]: each for each in found}
    assert list(by_case) == [
        f"{peer}_tier_{tier}" for tier in ("0.1", "0.5") for peer in ("static", "none", "belady4k")
    ]
    assert all(each["ratio"] <= 1 for case, each in by_case.items() if "4k" not in case), "belady reads least"
    assert by_case["none_tier_0.5"]["ours"] < by_case["none_tier_0.1"]["ours"] < by_case["none_tier_0.1"]["peer"]
    code, out, _ = call(*words, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["case"] for row in rows] == list(by_case)
    assert [float(row["ours"]) for row in rows] == [each["ours"] for each in found]
    trace = read_accesses(accesses, tmp_path / "trace")
    assert json.loads(call("policies", "--trace", str(trace.path), *words[3:], "--json")[1].splitlines()[0]) == found[0]


def test_a_trace_of_accesses_is_one_like_others(tmp_path: Path) -> None:
    items = [np.array([5, 3, 5, 9]), np.array([0]), np.array([9, 1]), np.array([3])]
    write_accesses(tmp_path / "trace", items, num_rows=10, num_items=4, num_epochs=2)
    trace = open_trace(tmp_path / "trace")
    (window,) = trace.windows()
    validate_trace_window(tmp_path / "trace", window.index)
    assert [window.item(n).input_ids.tolist() for n in range(4)] == [[5, 3, 9], [0], [9, 1], [3]]
    assert [window.item(n).epoch for n in range(4)] == [0, 0, 1, 1] and trace.meta.num_nodes == 10


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ([[1], [10]], {}, "item 1 reads row 10; rows go from 0 to 9"),
        ([[-1], [0]], {}, "item 0 reads row -1"),
        ([[1], []], {}, "item 1 has rows"),
        ([[1]], {}, "there are 1 items, not 2"),
        ([[1], [2], [3]], {}, "more than 2 items"),
        ([[1], [2]], {"num_epochs": 3}, "2 items cannot be 3 epochs"),
    ],
)
def test_accesses_that_are_none_are_named(
    tmp_path: Path, items: list[list[int]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_accesses(tmp_path / "t", [np.array(item, int) for item in items], num_rows=10, num_items=2, **options)


def test_a_table_of_accesses_is_checked(tmp_path: Path) -> None:
    for columns, message in (
        ({"item": [0, 1, 0], "row": [1, 2, 3]}, "row 2: item 0 comes after item 1; sort by item"),
        ({"item": [0], "rows": [1]}, "columns item and row"),
        ({"item": [0.5], "row": [1]}, "give integers"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=message):
            read_accesses(tmp_path / "a.parquet", tmp_path / "trace")
    with pytest.raises(DataError, match="none.parquet does not exist"):
        read_accesses(tmp_path / "none.parquet", tmp_path / "trace")


def test_options_of_other_benches_and_two_forms_are_refused(call: Called) -> None:
    for words, message in (
        (("feed", "--tiers", "0.1"), "--tiers is for bench policies, not for bench feed"),
        (("all", "--device", "cuda"), "--device is for bench epoch"),
        (("policies", "--tiers", "2"), "shares are above 0 and at most 1"),
        (("sample", "--json", "--csv"), "give one"),
    ):
        code, _, err = call(*words)
        assert code == 2 and message in err, err


def test_all_goes_on_past_a_bench_that_fails(call: Called, monkeypatch: pytest.MonkeyPatch, accesses: Path) -> None:
    def records(name: str, *_: Any) -> Any:
        if name == "pack":
            raise DataError("no packs today")
        yield record(name, "case", "s", 1.0, 2.0, "a peer", False, 1)

    monkeypatch.setattr(benches, "_records", records)
    code, out, err = call("all", "--json", "--quiet")
    assert code == 1 and "bench pack: DataError: no packs today" in err and "of all benches, pack failed" in err
    assert [json.loads(line)["bench"] for line in out.splitlines()[:-1]] == [n for n in benches.NAMES if n != "pack"]
