"""Killed with SIGKILL at random moments and run again, ingest and generate end with the same bytes."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from penstock.storage.errors import DataError
from penstock.storage.graph import open_graph
from penstock.storage.ingest import IngestOptions, ingest_parquet
from penstock.storage.manifest import read_json, write_json

_CHILD = """
import sys
from pathlib import Path
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.ingest import IngestOptions, ingest_parquet
kind, folder, out, memory = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) << 20
print("started", flush=True)
if kind == "generate":
    generate_graph(out, GenerateConfig(num_nodes=300_000, num_features=64, seed=3), host_memory=memory)
else:
    options = IngestOptions(undirected=True)
    ingest_parquet(folder / "nodes.parquet", folder / "edges.parquet", out, options, host_memory=memory)
"""


def _start(kind: str, folder: Path, out: Path, memory: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CHILD, kind, str(folder), str(out), str(memory)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "started\n"
    return child


def _finish(child: subprocess.Popen[str]) -> None:
    child.communicate()
    assert child.returncode == 0


def _tables(folder: Path) -> None:
    rng = np.random.default_rng(5)
    num_nodes, num_edges, width = 100_000, 1_000_000, 32
    ids = pa.array(rng.permutation(num_nodes)).cast(pa.string())
    values = pa.FixedSizeListArray.from_arrays(pa.array(rng.random(num_nodes * width, np.float32)), width)
    pq.write_table(pa.table({"id": ids, "feature": values}), folder / "nodes.parquet")
    ends = {name: ids.take(pa.array(rng.integers(0, num_nodes, num_edges))) for name in ("src", "dst")}
    pq.write_table(pa.table(ends), folder / "edges.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ingest", "generate"])
def test_killed_at_random_moments(tmp_path: Path, kind: str, folder_bytes: Callable[[Path], dict[str, bytes]]) -> None:
    if kind == "ingest":
        _tables(tmp_path)
    began = time.monotonic()
    _finish(_start(kind, tmp_path, tmp_path / "whole", 64))
    whole_s = time.monotonic() - began
    # the start of the interpreter counts in whole_s and not in the delay, so late moments are covered too
    moments, killed = random.Random(11), 0
    for _ in range(10):
        child = _start(kind, tmp_path, tmp_path / "cut", moments.choice((24, 64, 100)))
        time.sleep(moments.random() * 0.5 * whole_s)
        child.kill()
        child.communicate()
        killed += child.returncode == -9
    _finish(_start(kind, tmp_path, tmp_path / "cut", 64))
    assert killed >= 1
    open_graph(tmp_path / "cut").validate()
    assert folder_bytes(tmp_path / "cut") == folder_bytes(tmp_path / "whole")


def _small(folder: Path, bad: bool) -> tuple[Path, Path]:
    nodes = {"feature": [[1.0, 2.0]] * 5}
    pq.write_table(pa.table(nodes), folder / "nodes.parquet")
    pq.write_table(pa.table({"src": [0, 1], "dst": [1, 7 if bad else 2]}), folder / "edges.parquet")
    return folder / "nodes.parquet", folder / "edges.parquet"


def test_finished_steps_are_not_redone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    tables = _small(tmp_path, bad=True)
    with pytest.raises(DataError, match="dst=7"):
        ingest_parquet(*tables, out, IngestOptions(), host_memory=32 << 20)
    assert sorted(read_json(out / ".work" / "steps.json")) == ["ids", "nodes"]
    stamp = (out / "features.npy").stat().st_mtime_ns
    identity = read_json(out / ".work" / "identity.json")
    _small(tmp_path, bad=False)
    digest = xxhash.xxh3_128_hexdigest(tables[1].read_bytes())
    identity["inputs"]["the edge table"] = {"bytes": tables[1].stat().st_size, "xxh3": digest}
    write_json(out / ".work" / "identity.json", identity)  # as if the inputs had been so from the start
    store = ingest_parquet(*tables, out, IngestOptions(), host_memory=32 << 20)
    assert store.num_edges == 2 and (out / "features.npy").stat().st_mtime_ns == stamp


def test_changed_inputs_start_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="dst=7"):
        ingest_parquet(*_small(tmp_path, bad=True), out, IngestOptions(), host_memory=32 << 20)
    (out / "original_ids.npy").write_bytes(b"left by a build of other inputs")
    store = ingest_parquet(*_small(tmp_path, bad=False), out, IngestOptions(), host_memory=32 << 20)
    assert store.num_edges == 2 and not (out / "original_ids.npy").exists()
    store.validate()
