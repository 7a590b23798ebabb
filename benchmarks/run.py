"""`penstock bench`: run one bench and print its records, as a table or as JSON lines."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penstock.benchmarks.harness import scratch_folder
from penstock.machine import hardware, versions


def _line(found: dict[str, Any]) -> str:
    ratio = "-" if found["ratio"] is None else f"{found['ratio']:.3g}"
    better = "higher" if found["higher_is_better"] else "lower"
    values = f"{found['ours']:.4g} against {found['peer']:.4g} {found['unit']}"
    return f"{found['case']:<24} ratio {ratio:>7} ({better} is better)  {values}  peer: {found['peer_name']}"


def run_bench(
    name: str, *, scale: float, repeats: int, directory: Path | None, device: str = "cpu", as_json: bool
) -> None:
    """Print every case as it is measured, the machine last. ValueError for a scale outside (0, 10] or no repeats."""
    if not 0 < scale <= 10 or repeats < 1:
        raise ValueError(f"scale={scale} must be in (0, 10] and repeats={repeats} at least 1")
    if device != "cpu" and name != "epoch":
        raise ValueError(f"--device {device} is for bench epoch; bench {name} measures the host")
    options = {"device": device} if name == "epoch" else {}
    with scratch_folder(directory) as folder:
        bench = importlib.import_module(f"penstock.benchmarks.{name}")
        records: Iterator[dict[str, Any]] = bench.run(scale=scale, repeats=repeats, folder=folder, **options)
        for found in records:
            print(json.dumps(found) if as_json else _line(found), flush=True)
    machine = {"machine": hardware(), "versions": versions(), "scale": scale}
    print(json.dumps(machine) if as_json else f"machine: {machine['machine']}", flush=True)
    sys.stdout.flush()
