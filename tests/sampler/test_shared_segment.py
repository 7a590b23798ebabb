"""The shared layout: less disk, the same rows, whatever the width."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.sampler.packer import write_packs
from penstock.sampler.pass_layout import fit_memory
from penstock.storage.errors import DoesNotFit
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import checksum_file
from penstock.storage.pack import read_pack_index
from penstock.storage.trace import Trace


def make_shared(make_plan: Any, graph: GraphStore, trace: Trace, **config: Any) -> Any:
    private = make_plan(graph, trace, host=64 << 20, policy="none", **config)
    plan = make_plan(
        graph,
        trace,
        host=64 << 20,
        policy="none",
        mode="reuse",
        disk=private.summary.disk_needed_bytes * 45 // 100,
        **config,
    )
    assert plan.summary.layout == "shared" and max(plan.segment_rows) > 100
    assert plan.summary.pack_bytes < 0.7 * private.summary.pack_bytes
    assert plan.summary.read_bytes_per_epoch > private.summary.read_bytes_per_epoch
    return plan


def test_rows_of_any_width_are_served(
    wide_graph: GraphStore, wide_trace: Trace, make_plan: Any, replay: Any, tmp_path: Path
) -> None:
    plan, out = make_shared(make_plan, wide_graph, wide_trace), tmp_path / "packs"
    meta = write_packs(plan, wide_graph, wide_trace, out, host_memory=8 << 20)
    table = np.array(wide_graph.features).view(np.uint8)
    batches = replay(out, table, wide_trace, laps=2)
    ids = [item.input_ids for item in wide_trace.items()]
    for step, batch in enumerate(batches):
        assert np.array_equal(batch, table[ids[step % len(ids)]])
    for window in range(meta.num_windows):
        index = read_pack_index(out, window)
        assert index.shared_bytes == index.offsets[0] > 0


def test_buckets_of_any_size_give_the_same_bytes(
    wide_graph: GraphStore, wide_trace: Trace, make_plan: Any, tmp_path: Path
) -> None:
    """The smaller memory sorts the segment in several buckets."""
    plan = make_shared(make_plan, wide_graph, wide_trace)
    with pytest.raises(DoesNotFit) as caught:
        write_packs(plan, wide_graph, wide_trace, tmp_path / "refused", host_memory=1000)
    smallest = int(str(caught.value).split("--host-memory ")[1].split()[0])
    assert fit_memory(plan, [0], smallest).bucket_rows < max(plan.segment_rows)
    found = []
    for memory in (smallest, 64 << 20):
        out = tmp_path / str(memory)
        write_packs(plan, wide_graph, wide_trace, out, host_memory=memory)
        found.append({path.name: checksum_file(path) for path in out.iterdir()})
    assert found[0] == found[1]


def test_a_row_is_stored_once_per_window(wide_graph: GraphStore, wide_trace: Trace, make_plan: Any) -> None:
    plan = make_shared(make_plan, wide_graph, wide_trace)
    ids = [item.input_ids for item in wide_trace.items()]
    for window, num_shared in enumerate(plan.segment_rows):
        size = plan.meta.window_items
        items = ids[window * size : (window + 1) * size]
        _, counts = np.unique(np.concatenate(items), return_counts=True)
        assert num_shared == np.count_nonzero(counts > 1)
        private = sum(head.num_rows for head in plan.heads[window * size : (window + 1) * size])
        assert private == np.count_nonzero(counts == 1)
