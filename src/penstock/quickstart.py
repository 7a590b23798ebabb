"""`penstock quickstart`: the main job on a generated graph, beside the same job with everything in memory.

The two runs are processes of their own, so that the peak memory of each is its own.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from penstock.display import print_table, progress
from penstock.exit_codes import DOES_NOT_FIT, RETRY
from penstock.machine import hardware, versions
from penstock.storage.budget import MIB, format_bytes, parse_memory, require_free_disk
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import read_json, write_json

NUM_FEATURES = 256
BUDGET_SHARE = 8  # the host memory given is this fraction of the features
LEAST_NODES = 50_000  # an eighth of the features of fewer does not hold what packing needs
_BATCH_NODES = 1_000_000 // 256  # nodes per seed of a batch: an eighth of fewer features holds smaller batches
_LARGEST_BATCH = 256
_KILLED = 128  # and the signal, as shells say it
_REMEDIES = {
    DOES_NOT_FIT: "give what the message above names (--host-memory), or other --num-nodes",
    RETRY: "run the same command again, which goes on",
}
_SETTINGS = {
    "--fanouts": "5,10",
    "--hidden": "64",
    "--epochs": "3",
    "--lr": "0.003",
}


def _train(graph: GraphStore, run_dir: Path, host_memory: int | None, quiet: bool) -> dict[str, Any]:
    """Run `penstock train` as a user would; its error has been printed when it fails."""
    command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    command += ["-m", "penstock", "train", str(graph.path), "--run-dir", str(run_dir)]
    command += [word for pair in _SETTINGS.items() for word in pair]
    command += ["--batch-size", str(min(_LARGEST_BATCH, graph.num_nodes // _BATCH_NODES))]
    command += ["--in-memory"] if host_memory is None else ["--host-memory", str(host_memory)]
    command += ["--quiet"] if quiet else []
    code = subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False).returncode
    if code:
        remedy = _REMEDIES.get(code, "run the same command again")
        print(f"penstock: training in {run_dir} ended so, with exit code {code}; {remedy}", file=sys.stderr)
        sys.exit(code if code > 0 else _KILLED - code)
    result: dict[str, Any] = read_json(run_dir / "result.json")
    return result


def run_quickstart(
    directory: Path, *, num_nodes: int, host_memory: str | None = None, result_json: Path | None, quiet: bool
) -> dict[str, Any]:
    """Generate, train out of core, train in memory, compare; write `directory/result.json` and return it.

    ValueError for fewer than `LEAST_NODES`; where training fails, the process exits as it did.
    """
    if num_nodes < LEAST_NODES:
        raise ValueError(f"--num-nodes {num_nodes} is too few to train out of core; use {LEAST_NODES} or more")
    given = None if host_memory is None else parse_memory(host_memory)
    config = GenerateConfig(
        num_nodes=num_nodes, num_features=NUM_FEATURES, avg_degree=16, train=0.03, valid=0.005, test=0.01
    )
    feature_bytes = 4 * NUM_FEATURES * num_nodes
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "graph" / "manifest.json").is_file():
        require_free_disk(directory, int(2.5 * feature_bytes), "the quick start")
    with progress(quiet=quiet) as show:
        graph = generate_graph(directory / "graph", config, host_memory=256 * MIB, progress=show)
    budget = given or feature_bytes // BUDGET_SHARE
    packed = _train(graph, directory / "out-of-core", budget, quiet)
    in_memory = _train(graph, directory / "in-memory", None, quiet)
    metrics = {
        "test_accuracy": packed["metrics"]["test_accuracy"],
        "in_memory_test_accuracy": in_memory["metrics"]["test_accuracy"],
        "feature_bytes": feature_bytes,
        "host_memory_bytes": budget,
        "peak_rss_bytes": packed["peak_rss_bytes"],
        "in_memory_peak_rss_bytes": in_memory["peak_rss_bytes"],
        "train_s": packed["timings"]["train_s"],
        "in_memory_train_s": in_memory["timings"]["train_s"],
        "losses_equal": packed["metrics"]["train_losses"] == in_memory["metrics"]["train_losses"],
    }
    result = {
        "schema": packed["schema"],
        "status": "ok",
        "metrics": metrics,
        "artefacts": {name: str(directory / name) for name in ("graph", "out-of-core", "in-memory")},
        "versions": versions(),
        "hardware": hardware(),
    }
    for target in (directory / "result.json", result_json):
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target, result)
    if not quiet:
        print_table("quick start", _rows(metrics))
    return result


def _rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    share = metrics["host_memory_bytes"] / metrics["feature_bytes"]
    ratio = metrics["train_s"] / max(1e-9, metrics["in_memory_train_s"])
    return [
        ("features", format_bytes(metrics["feature_bytes"])),
        ("host memory given", f"{format_bytes(metrics['host_memory_bytes'])} ({share:.2g} of the features)"),
        ("test accuracy", f"{metrics['test_accuracy']:.4f}"),
        ("test accuracy in memory", f"{metrics['in_memory_test_accuracy']:.4f}"),
        ("losses", "equal, bit for bit" if metrics["losses_equal"] else "differ"),
        ("peak memory of the process", format_bytes(metrics["peak_rss_bytes"])),
        ("peak memory in memory", format_bytes(metrics["in_memory_peak_rss_bytes"])),
        ("training time against in memory", f"{ratio:.2f}x (reading the features into memory counts)"),
    ]
