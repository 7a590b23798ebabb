"""What every bench shares: interleaved repeats, the result record, the machine record, a graph to measure on.

Both sides of a case run alternately in one process, so that a slow minute of the machine hits both; the first round
warms caches and compilers and is dropped; the rest is summed up by medians.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import xxhash

from penstock.benchmarks.titles import title_of
from penstock.machine import hardware, versions
from penstock.storage.budget import available_memory
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore
from penstock.storage.progress import Progress, silent


class Median(float):
    """A median that knows the `values` it is of, in the order of the rounds."""

    values: tuple[float, ...]

    def __new__(cls, values: Sequence[float]) -> "Median":
        """Of one value or more."""
        made = super().__new__(cls, statistics.median(values))
        made.values = tuple(values)
        return made


_show: ContextVar[Progress] = ContextVar("show", default=silent)


@contextmanager
def shown(progress: Progress) -> Iterator[None]:
    """Show how far benches are while open."""
    token = _show.set(progress)
    try:
        yield
    finally:
        _show.reset(token)


def interleave(ours: Callable[[], float], peer: Callable[[], float], repeats: int) -> tuple[Median, Median]:
    """Call both sides in turns and return the medians of the metric values that they return.

    The order within a round alternates, so that neither side always finds the caches that the other left.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} measures nothing; use at least 1")
    values: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        _show.get()("measure", turn, repeats + 1, "rounds")
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            value = (ours, peer)[side]()
            if turn > 0:  # the first round is the warm-up
                values[side].append(value)
    _show.get()("measure", repeats + 1, repeats + 1, "rounds")
    return Median(values[0]), Median(values[1])


def _spread(value: float) -> float | None:
    """How far apart repeats were, as a share of their median; None where nothing was repeated."""
    found = getattr(value, "values", ())
    return (max(found) - min(found)) / abs(value) if len(found) > 1 and value else None


def record(
    bench: str,
    case: str,
    unit: str,
    ours: float,
    peer: float,
    peer_name: str,
    higher_is_better: bool,
    repeats: int,
) -> dict[str, Any]:
    """Make the JSON object of one case; `ratio` is ours / peer. Of medians, every repeat goes in, and their spread."""
    return {
        "bench": bench,
        "case": case,
        "title": title_of(bench, case),
        "unit": unit,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "ratio": ours / peer if peer else None,
        "higher_is_better": higher_is_better,
        "repeats": repeats,
        "ours_repeats": list(getattr(ours, "values", ())),
        "peer_repeats": list(getattr(peer, "values", ())),
        "ours_spread": _spread(ours),
        "peer_spread": _spread(peer),
    }


def machine() -> dict[str, Any]:
    """Describe what the numbers were measured on: the last JSON object of every bench."""
    return {"machine": hardware(), "versions": versions()}


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make a folder on a real disk for the bench, and delete it afterwards."""
    with TemporaryDirectory(prefix="penstock-bench-", dir=parent) as folder:
        yield Path(folder)


def open_bench_graph(folder: Path, config: GenerateConfig) -> GraphStore:
    """Open the synthetic graph of this config under `folder`; the first call generates it."""
    digest = xxhash.xxh3_64_hexdigest(config.model_dump_json().encode())
    return generate_graph(folder / f"graph-{digest}", config, host_memory=available_memory() // 4, progress=_show.get())
