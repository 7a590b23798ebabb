"""What every bench shares: interleaved repeats, the result record, the machine record, a graph to measure on.

Both sides of a case run alternately in one process, so that a slow minute of the machine hits both; the first round
warms caches and compilers and is dropped; the rest is summed up by medians.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import xxhash

from penstock.machine import hardware, versions
from penstock.storage.budget import available_memory
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore


def interleave(ours: Callable[[], float], peer: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Call both sides in turns and return the medians of the metric values that they return.

    The order within a round alternates, so that neither side always finds the caches that the other left.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} measures nothing; use at least 1")
    values: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            value = (ours, peer)[side]()
            if turn > 0:  # the first round is the warm-up
                values[side].append(value)
    return statistics.median(values[0]), statistics.median(values[1])


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
    """Make the JSON object of one case; `ratio` is ours / peer."""
    return {
        "bench": bench,
        "case": case,
        "unit": unit,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "ratio": ours / peer if peer else None,
        "higher_is_better": higher_is_better,
        "repeats": repeats,
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
    return generate_graph(folder / f"graph-{digest}", config, host_memory=available_memory() // 4)
