"""Memory stays near the budget, and a full disk is a clear error after which the run goes on where it was."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.storage.budget import free_disk
from penstock.storage.errors import DoesNotFit
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.ingest import IngestOptions, compose, ingest_parquet

_CHILD = """
import sys
from pathlib import Path
from penstock.storage.budget import peak_rss_bytes, reset_peak_rss
from penstock.storage.ingest import IngestOptions, ingest_parquet
folder = Path(sys.argv[1])
reset_peak_rss()
start = peak_rss_bytes()
options = IngestOptions(undirected=True)
ingest_parquet(folder / "nodes.parquet", folder / "edges.parquet", folder / "out", options, host_memory=24 << 20)
print(peak_rss_bytes() - start)
"""


def _tables(folder: Path, num_nodes: int, num_edges: int, width: int) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    values = pa.FixedSizeListArray.from_arrays(pa.array(rng.random(num_nodes * width, np.float32)), width)
    pq.write_table(pa.table({"id": rng.permutation(num_nodes), "feature": values}), folder / "nodes.parquet")
    edges = {name: rng.integers(0, num_nodes, num_edges) for name in ("src", "dst")}
    pq.write_table(pa.table(edges), folder / "edges.parquet")
    return folder / "nodes.parquet", folder / "edges.parquet"


def test_memory_stays_near_the_budget(tmp_path: Path) -> None:
    _tables(tmp_path, 300_000, 2_500_000, 200)  # 240 MB of features in one row group, 40 MB of edges
    command = [sys.executable, "-c", _CHILD, str(tmp_path)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # beside the budget: compiled kernels, Arrow's pools and pages, and buffers of the C library
    assert grown < (24 + 160) << 20


def test_too_small_a_disk_is_refused_before_the_work(tmp_path: Path, small_disk: Path) -> None:
    tables = _tables(tmp_path, 10_000, 1000, 800)
    with pytest.raises(DoesNotFit, match=r"the graph store needs 30.* at .*disk.*, where .* are free"):
        ingest_parquet(*tables, small_disk / "g", IngestOptions(), host_memory=32 << 20)
    with pytest.raises(DoesNotFit, match=r"this graph needs"):
        generate_graph(small_disk / "h", GenerateConfig(num_nodes=100_000), host_memory=32 << 20)
    assert free_disk(small_disk) > 23 << 20


def test_a_disk_that_fills_up_leaves_no_store_and_can_go_on(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = _tables(tmp_path, 10_000, 300_000, 400)  # 16 MB of features, 5 MB of edges
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(6 << 20))
    # the check in advance would refuse this, so it is told that others take the space meanwhile
    monkeypatch.setattr(compose, "require_free_disk", lambda *_: None)
    out = small_disk / "g"
    with pytest.raises(DoesNotFit, match="the disk is full while writing"):
        ingest_parquet(*tables, out, IngestOptions(), host_memory=32 << 20)
    assert not (out / "manifest.json").exists() and (out / "features.npy").exists()
    stamp = (out / "features.npy").stat().st_mtime_ns
    ballast.unlink()
    store = ingest_parquet(*tables, out, IngestOptions(), host_memory=32 << 20)
    store.validate()
    assert store.num_edges == 300_000 and (out / "features.npy").stat().st_mtime_ns == stamp
