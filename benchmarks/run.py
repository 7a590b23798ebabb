"""`penstock bench`: run one bench or all, and print their records, as a table, as JSON lines or as CSV."""

import csv
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from penstock.benchmarks.harness import machine, scratch_folder, shown
from penstock.display import progress
from penstock.report import git_commit

NAMES = ("sample", "pack", "feed", "epoch", "kernels", "pipeline", "cluster", "memory", "policies")
Form = Literal["text", "json", "csv"]
_LEAST_SCALE = 0.002  # graphs of 4,000 nodes; smaller ones measure how a bench is opened
_COLUMNS = (
    *("bench", "case", "title", "unit", "ours", "peer", "peer_name", "ratio", "higher_is_better", "repeats"),
    *("ours_spread", "peer_spread", "ours_repeats", "peer_repeats", "scale", "commit"),
)


def _line(found: dict[str, Any]) -> str:
    ratio = "-" if found["ratio"] is None else f"{found['ratio']:.3g}"
    better = "higher" if found["higher_is_better"] else "lower"
    target = f", target {found['target']:.3g}" if "target" in found else ""
    sides = (_side(found, "ours"), f"{_side(found, 'peer')} {found['unit']}")
    values = " against ".join(sides)
    title = "" if found["title"] == found["case"].replace("_", " ") else f"  ({found['title']})"
    peer = f"peer: {found['peer_name']}{title}"
    return f"{found['case']:<24} ratio {ratio:>7} ({better} is better{target})  {values}  {peer}"


def _side(found: dict[str, Any], side: str) -> str:
    spread = found[f"{side}_spread"]
    return f"{found[side]:.4g}" + ("" if spread is None else f" (spread {spread:.0%})")


def _row(found: dict[str, Any]) -> list[Any]:
    return [" ".join(map(str, cell)) if isinstance(cell := found.get(name, ""), list) else cell for name in _COLUMNS]


def _options(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """What only some benches take; ValueError where it was given for another."""
    takers = {
        "device": "epoch",
        "out_of_core": "pipeline",
        "trace": "policies",
        "row_bytes": "policies",
        "tiers": "policies",
    }
    for key, value in given.items():
        if value and takers[key] != name:
            flag = f"--{key.replace('_', '-')}"
            raise ValueError(f"{flag} is for bench {takers[key]}, not for bench {name}; leave it out")
    return {key: value for key, value in given.items() if value}


def parse_tiers(text: str) -> tuple[float, ...]:
    """Shares like `0.05,0.1`; ValueError where one is not above 0 and at most 1."""
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--tiers {text!r}: write shares of the rows like 0.05,0.1,0.2") from error
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"--tiers {text!r}: shares are above 0 and at most 1")
    return shares


def _say(form: Form) -> Callable[[dict[str, Any]], None]:
    if form == "json":
        return lambda found: print(json.dumps(found), flush=True)
    if form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(_COLUMNS)

        def say(found: dict[str, Any]) -> None:
            writer.writerow(_row(found))
            sys.stdout.flush()

        return say
    return lambda found: print(_line(found), flush=True)


def run_bench(
    name: str,
    *,
    scale: float,
    repeats: int,
    directory: Path | None,
    device: str = "cpu",
    out_of_core: bool = False,
    trace: Path | None = None,
    row_bytes: int | None = None,
    tiers: Sequence[float] = (),
    form: Form = "text",
    quiet: bool = False,
) -> None:
    """Print every case as it is measured, the machine last; `all` runs every bench in turn.

    ValueError for a scale outside [0.002, 10], no repeats, or an option of another bench. One of `all` that fails is
    said and the others go on; RuntimeError names it at the end.
    """
    if not _LEAST_SCALE <= scale <= 10 or repeats < 1:
        raise ValueError(f"--scale {scale:g} must be from {_LEAST_SCALE:g} to 10, and --repeats {repeats} at least 1")
    given = {
        "device": "" if device == "cpu" else device,
        "out_of_core": out_of_core,
        "trace": trace,
        "row_bytes": row_bytes,
        "tiers": tiers,
    }
    options, commit, failed = _options(name, given), git_commit(), list[str]()
    say = _say(form)
    for each in NAMES if name == "all" else (name,):
        with scratch_folder(directory) as folder, progress(quiet=quiet) as show, shown(show):
            show(f"bench {each}", 0, 1, "benches")
            try:
                for found in _records(each, scale, repeats, folder, options):
                    say({**found, "scale": scale, "commit": commit})
            except Exception as error:  # the boundary: other benches have nothing to do with it
                if name != "all":
                    raise
                print(f"penstock: bench {each}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                failed.append(each)
            show(f"bench {each}", 1, 1, "benches")
    if form == "json":
        print(json.dumps({**machine(), "scale": scale, "commit": commit}), flush=True)
    elif form == "text":
        print(f"machine: {machine()['machine']}, commit {commit}", flush=True)
    if failed:
        raise RuntimeError(f"of all benches, {', '.join(failed)} failed; their messages are above")


def _records(name: str, scale: float, repeats: int, folder: Path, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    bench = importlib.import_module(f"penstock.benchmarks.{name}")
    found: Iterator[dict[str, Any]] = bench.run(scale=scale, repeats=repeats, folder=folder, **options)
    yield from found
