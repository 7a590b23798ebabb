"""`penstock bench policies`: bytes that an epoch reads under each policy of the host tier, for any trace of accesses.

The trace is of a generated graph, or given: a trace folder, or a Parquet table with a row per access, columns `item`
(whole numbers, ascending) and `row`. Ours is `belady` in packs; the peers are `peers.policies`, replayed with as much
memory for rows. Nothing is packed or read: traces say all that is needed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from penstock.benchmarks.feed import BATCH_SIZE, FANOUTS, NUM_FEATURES, NUM_ITEMS, NUM_NODES
from penstock.benchmarks.harness import open_bench_graph, record
from penstock.benchmarks.peers.policies import Peer, bytes_per_epoch
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.budget import GIB, num_threads
from penstock.storage.errors import DataError
from penstock.storage.generate import GenerateConfig
from penstock.storage.trace import Trace, open_trace
from penstock.storage.trace_import import write_accesses

ROW_BYTES = 4 * NUM_FEATURES
TIERS = (0.05, 0.1, 0.2)
_PEERS: dict[Peer, str] = {
    "static": "packs, static hot set",
    "none": "packs without a tier",
    "belady4k": "4 KiB reads, Belady cache",
}


def read_accesses(path: Path, folder: Path, *, num_rows: int | None = None) -> Trace:
    """Make a trace of a Parquet table with columns `item` and `row`; DataError where it is none."""
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    try:
        table = pq.read_table(path, columns=["item", "row"])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as a Parquet table with columns item and row: {error}") from error
    item, row = (table.column(name).to_numpy() for name in ("item", "row"))
    if not len(item) or item.dtype.kind not in "iu" or row.dtype.kind not in "iu":
        raise DataError(
            f"{path} has {len(item)} accesses, of {item.dtype} and {row.dtype}; give integers without nulls"
        )
    if (np.diff(item) < 0).any():
        place = int(np.flatnonzero(np.diff(item) < 0)[0]) + 1
        raise DataError(f"{path}, row {place}: item {item[place]} comes after item {item[place - 1]}; sort by item")
    starts: NDArray[Any] = np.flatnonzero(np.diff(item, prepend=item[0] - 1))
    highest = int(row.max())
    return write_accesses(folder, np.split(row, starts[1:]), num_rows=num_rows or highest + 1, num_items=len(starts))


def _generated(folder: Path, scale: float) -> Trace:
    num_nodes, batch_size = int(NUM_NODES * scale), max(32, int(BATCH_SIZE * min(1.0, scale)))
    train = min(0.9, NUM_ITEMS * batch_size / num_nodes)
    graph = open_bench_graph(folder, GenerateConfig(num_nodes=num_nodes, num_features=NUM_FEATURES, train=train))
    sampling = SampleConfig(fanouts=FANOUTS, batch_size=batch_size)
    return sample_trace(graph, folder / "trace", sampling, host_memory=4 * GIB, threads=num_threads())


def run(
    *,
    scale: float,
    repeats: int,
    folder: Path,
    trace: Path | None = None,
    row_bytes: int = ROW_BYTES,
    tiers: Sequence[float] = TIERS,
) -> Iterator[dict[str, Any]]:
    """Yield a record per share of the rows in the host tier and peer; lower is better."""
    if trace is None:
        found = _generated(folder, scale)
    else:
        found = open_trace(trace) if trace.is_dir() else read_accesses(trace, folder / "trace")
    for share in tiers:
        host_bytes = int(share * found.meta.num_nodes) * row_bytes
        ours = bytes_per_epoch(found, row_bytes, host_bytes, "belady")
        for peer, name in _PEERS.items():
            theirs = bytes_per_epoch(found, row_bytes, host_bytes, peer)
            yield {
                **record("policies", f"{peer}_tier_{share:g}", "bytes/epoch", ours, theirs, name, False, 1),
                "tier_share": share,
                "row_bytes": row_bytes,
            }
