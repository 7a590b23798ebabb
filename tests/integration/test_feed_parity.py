"""Whatever the planner decides, batches are those of a table in memory, byte for byte."""

from pathlib import Path
from typing import Any

import pytest

from penstock.engine.feed import open_pack_feed
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.minibatch import MiniBatch
from penstock.sampler.estimate import DiskRates
from penstock.sampler.packer import write_packs
from penstock.sampler.plan import Plan, PlanConfig, plan_packs
from penstock.sampler.policies import PolicyName
from penstock.storage.budget import MIB, Budgets
from penstock.storage.graph import GraphStore
from penstock.storage.rows import RowDtype
from penstock.storage.trace import Trace

RATES = DiskRates(read_bytes_per_s=1e9, write_bytes_per_s=1e9, random_reads_per_s=1e5)


def content(batch: MiniBatch) -> tuple[Any, ...]:
    tensors = [batch.input_ids, batch.labels, batch.features]
    tensors += [tensor for block in batch.blocks for tensor in (block.indptr, block.indices)]
    return (batch.step, batch.item, batch.epoch, *(tensor.numpy().tobytes() for tensor in tensors))


def plan_with(
    graph: GraphStore,
    trace: Trace,
    config: PlanConfig,
    folder: Path,
    *,
    host_bytes: int,
    device_rows: int = 0,
    disk_bytes: int = 1 << 40,
) -> Plan:
    budgets = Budgets(device_bytes=device_rows * 80, host_bytes=host_bytes, disk_bytes=disk_bytes)
    return plan_packs(graph, trace, config, budgets, disk_rates=RATES, scratch=folder / "plan")


@pytest.mark.parametrize(
    ("policy", "row_dtype", "host_bytes", "device_rows"),
    [
        ("none", None, MIB, 0),
        ("static", "float32", 125_000, 0),
        ("belady", "float32", 125_000, 0),
        ("belady", "float32", 130_000, 30),
        ("belady", "float16", 115_000, 0),
        ("belady", "bfloat16", 115_000, 17),
        ("belady", "int8", 110_000, 0),
        ("belady", None, 64 * MIB, 0),
    ],
)
def test_plans_do_not_change_values(
    tiny_graph: GraphStore,
    tiny_trace: Trace,
    tmp_path: Path,
    policy: PolicyName,
    row_dtype: RowDtype | None,
    host_bytes: int,
    device_rows: int,
) -> None:
    config = PlanConfig(policy=policy, mode="reuse", row_dtype=row_dtype)
    plan = plan_with(tiny_graph, tiny_trace, config, tmp_path, host_bytes=host_bytes, device_rows=device_rows)
    write_packs(plan, tiny_graph, tiny_trace, tmp_path / "packs", host_memory=64 * MIB)
    with open_memory_feed(tiny_graph, tiny_trace, start_step=0, stop_step=40, row_dtype=row_dtype) as memory:
        expected = [content(batch) for batch in memory]
    for start in (0, 3, 15, 16, 27):
        with open_pack_feed(
            tmp_path / "packs", tiny_graph, start_step=start, stop_step=40, host_memory=host_bytes, threads=2
        ) as feed:
            assert [content(batch) for batch in feed] == expected[start:]
    stats = feed.stats
    assert (stats.host_rows > 0) == (policy != "none") and (stats.device_rows > 0) == (device_rows > 0)


def test_a_shared_layout_does_not_change_values(tiny_graph: GraphStore, tiny_trace: Trace, tmp_path: Path) -> None:
    config = PlanConfig(policy="none", mode="reuse")
    private = plan_with(tiny_graph, tiny_trace, config, tmp_path / "private", host_bytes=MIB).summary
    assert private is not None and private.layout == "private"
    plan = plan_with(tiny_graph, tiny_trace, config, tmp_path, host_bytes=MIB, disk_bytes=private.disk_needed_bytes - 1)
    assert plan.summary is not None and plan.summary.layout == "shared"
    write_packs(plan, tiny_graph, tiny_trace, tmp_path / "packs", host_memory=64 * MIB)
    with open_memory_feed(tiny_graph, tiny_trace, start_step=0, stop_step=40) as memory:
        expected = [content(batch) for batch in memory]
    for start in (0, 21):
        with open_pack_feed(tmp_path / "packs", tiny_graph, start_step=start, stop_step=40, host_memory=MIB) as feed:
            assert [content(batch) for batch in feed] == expected[start:]
