"""`penstock bench`: run one bench and print its records, as a table or as JSON lines."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penstock.benchmarks.harness import scratch_folder
from penstock.machine import hardware, versions

_LEAST_SCALE = 0.002  # graphs of 4,000 nodes; smaller ones measure how a bench is opened


def _line(found: dict[str, Any]) -> str:
    ratio = "-" if found["ratio"] is None else f"{found['ratio']:.3g}"
    better = "higher" if found["higher_is_better"] else "lower"
    target = f", target {found['target']:.3g}" if "target" in found else ""
    values = f"{found['ours']:.4g} against {found['peer']:.4g} {found['unit']}"
    return f"{found['case']:<24} ratio {ratio:>7} ({better} is better{target})  {values}  peer: {found['peer_name']}"


def _options(name: str, device: str, out_of_core: bool) -> dict[str, Any]:
    """What only some benches take."""
    if device != "cpu" and name != "epoch":
        raise ValueError(f"--device {device} is for bench epoch; bench {name} measures the host")
    if out_of_core and name != "pipeline":
        raise ValueError(f"--out-of-core is for bench pipeline, not for bench {name}")
    options: dict[str, dict[str, Any]] = {"epoch": {"device": device}, "pipeline": {"out_of_core": out_of_core}}
    return options.get(name, {})


def run_bench(
    name: str,
    *,
    scale: float,
    repeats: int,
    directory: Path | None,
    device: str = "cpu",
    out_of_core: bool = False,
    as_json: bool,
) -> None:
    """Print every case as it is measured, the machine last.

    ValueError for a scale outside [0.002, 10], no repeats, or an option of another bench.
    """
    if not _LEAST_SCALE <= scale <= 10 or repeats < 1:
        raise ValueError(f"--scale {scale:g} must be from {_LEAST_SCALE:g} to 10, and --repeats {repeats} at least 1")
    options = _options(name, device, out_of_core)
    with scratch_folder(directory) as folder:
        bench = importlib.import_module(f"penstock.benchmarks.{name}")
        records: Iterator[dict[str, Any]] = bench.run(scale=scale, repeats=repeats, folder=folder, **options)
        for found in records:
            print(json.dumps(found) if as_json else _line(found), flush=True)
    machine = {"machine": hardware(), "versions": versions(), "scale": scale}
    print(json.dumps(machine) if as_json else f"machine: {machine['machine']}", flush=True)
    sys.stdout.flush()
