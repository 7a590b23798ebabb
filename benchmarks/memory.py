"""`penstock bench memory`: the peak resident size of whole runs against what `plan` predicts for them.

Every run is `penstock train` in a process of its own. The resident sizes of it and of its children are read from
`/proc` some thirty times a second and added up; the largest sum is what was measured, unless the process's own
high-water mark (VmHWM), which misses nothing, is larger. A child that has not yet begun its own program is left out:
until then it shows the memory of its parent. Predictions may be a tenth too high, and never too low.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from penstock.benchmarks.harness import open_bench_graph, record
from penstock.storage.budget import MIB
from penstock.storage.errors import DataError
from penstock.storage.generate import GenerateConfig
from penstock.storage.manifest import read_json

_POLL_S = 0.03
_SAMPLED = ("--fanouts", "5,10", "--batch-size", "256", "--hidden", "64", "--lr", "0.003")
_FULL = ("--mode", "chunked", "--layers", "3", "--hidden", "64", "--chunks", "8", "--stages", "2", "--epochs", "2")


def _stack(pid: int) -> str:
    """Where the stack of a process begins: drawn anew for each program, so a child with its parent's runs none yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[25]


def _rss_bytes(process: psutil.Process, parent_stack: str | None = None) -> int:
    """Resident bytes of a process and of all below it; none where it is a fork of its parent."""
    try:
        stack = _stack(process.pid)
        own = 0 if stack == parent_stack else int(process.memory_info().rss)
        return own + sum(_rss_bytes(child, stack) for child in process.children())
    except (psutil.Error, OSError):  # it has just ended
        return 0


def tree_rss_bytes(process: psutil.Process) -> int:
    """Resident bytes of a process and of all below it, now; pages that they share count for each."""
    return _rss_bytes(process)


def measure_run(arguments: list[str], run_dir: Path) -> tuple[int, dict[str, Any]]:
    """Run `penstock train`; returns the largest resident size of its processes, and its `result.json`."""
    command = [sys.executable, "-m", "penstock", "train", *arguments, "--run-dir", str(run_dir), "--quiet"]
    environment, peak = {**os.environ, "PYTHONSAFEPATH": "1"}, 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:  # our stdout is for results
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, tree_rss_bytes(tree))
            time.sleep(_POLL_S)
    if process.returncode:
        raise DataError(f"penstock train {' '.join(arguments)} ended with exit code {process.returncode}")
    result: dict[str, Any] = read_json(run_dir / "result.json")
    return max(peak, int(result["peak_rss_bytes"])), result


def run(*, scale: float, repeats: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a record per run: measured over predicted; at most 1, and at least 0.9."""
    quick = GenerateConfig(
        num_nodes=int(1_000_000 * scale), num_features=256, avg_degree=16, train=0.03, valid=0.005, test=0.01
    )
    small = GenerateConfig(num_nodes=int(50_000 * scale) + 1000, num_features=64, avg_degree=16)
    graphs = {True: open_bench_graph(folder, quick), False: open_bench_graph(folder, small)}
    eighth = str(max(96 * MIB, graphs[True].feature_bytes // 8))  # items do not shrink with the graph
    double = ("--host-memory", str(max(256 * MIB, graphs[True].feature_bytes // 4)))
    large = ("--host-memory", str(1024 * MIB))  # a quarter of it holds all in-edges of the largest hub
    cases: dict[str, tuple[bool, tuple[str, ...]]] = {
        "quickstart": (True, (*_SAMPLED, "--epochs", "3", "--host-memory", eighth)),
        "rolling": (True, (*_SAMPLED, "--epochs", "6", "--pack-mode", "rolling", *double)),  # both processes at work
        "wide": (True, (*_SAMPLED, "--epochs", "1", "--hidden", "512", "--batch-size", "1024", *double)),
        "gat": (True, (*_SAMPLED, "--epochs", "1", "--model", "gat", *double)),
        "in_memory": (True, (*_SAMPLED, "--epochs", "1", "--set", "feed=memory", *double)),
        "exact_evaluation": (True, (*_SAMPLED, "--epochs", "1", "--set", "evaluate.mode=exact", *large)),
        "full_graph": (False, (*_FULL, *large)),
        "full_graph_recomputed": (False, (*_FULL, "--set", "chunked.recompute=always", *large)),
    }
    for name, (is_quick, options) in cases.items():
        found = [
            measure_run([str(graphs[is_quick].path), *_last_wins(options)], folder / f"{name}-{turn}")
            for turn in range(repeats)
        ]
        measured, predicted = max(peak for peak, _ in found), found[0][1]["memory"]["predicted_peak_bytes"]
        facts = {"target": 1.0, "components": found[0][1]["memory"]["components"]}
        yield {**record("memory", name, "bytes", measured, predicted, "plan", False, repeats), **facts}


def _last_wins(options: tuple[str, ...]) -> list[str]:
    """A flag that is given twice counts as it is given last."""
    pairs = dict(zip(options[::2], options[1::2], strict=True))
    return [word for pair in pairs.items() for word in pair]
