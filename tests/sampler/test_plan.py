"""Plans: budgets are kept, what does not fit names a budget that does, figures are those of the packs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from penstock.sampler.estimate import DiskRates, summary_rows
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.sampler.packer import write_packs
from penstock.sampler.plan import PlanConfig
from penstock.storage.errors import DataError, DoesNotFit
from penstock.storage.graph import GraphStore
from penstock.storage.pack import feed_memory
from penstock.storage.trace import Trace

FAST = DiskRates(read_bytes_per_s=1e9, write_bytes_per_s=1e9, random_reads_per_s=1e5)


def named_budget(error: DoesNotFit, flag: str) -> int:
    return int(str(error).split(f"use {flag} ")[1].split()[0])


def test_the_host_budget_is_used_and_kept(make_plan: Any) -> None:
    slots: list[int] = []
    for host in range(45_000, 60_000, 1000):
        try:
            plan = make_plan(host=host)
        except DoesNotFit:
            assert not slots  # a larger budget never fits less
            continue
        meta, summary = plan.meta, plan.summary
        need = feed_memory(
            host_slots=meta.host_slots,
            row_bytes=80,
            max_extent_bytes=max(head.extent_bytes for head in plan.heads),
            max_inputs=meta.max_inputs,
            width=20,
        )
        assert need == summary.host_needed_bytes <= host
        slots.append(meta.host_slots)
    assert len(slots) > 8 and slots[0] > 0 and slots[-1] > 340  # of 367 rows that are read


@pytest.mark.parametrize("policy", ["belady", "static", "none"])
@pytest.mark.parametrize("mode", ["reuse", "rolling"])
@pytest.mark.parametrize("device", [0, 4000])
def test_too_small_a_host_budget_names_one_that_does(make_plan: Any, policy: str, mode: str, device: int) -> None:
    with pytest.raises(DoesNotFit) as caught:
        make_plan(host=1000, policy=policy, mode=mode, device=device)
    enough = named_budget(caught.value, "--host-memory")
    make_plan(host=enough, policy=policy, mode=mode, device=device)
    with pytest.raises(DoesNotFit):
        make_plan(host=enough * 3 // 4, policy=policy, mode=mode, device=device)


@pytest.mark.parametrize("mode", ["auto", "reuse", "rolling"])
def test_too_small_a_disk_names_one_that_does(
    make_plan: Any, wide_graph: GraphStore, wide_trace: Trace, mode: str
) -> None:
    def plan(disk: int) -> Any:
        return make_plan(wide_graph, wide_trace, host=64 << 20, policy="none", mode=mode, disk=disk)

    with pytest.raises(DoesNotFit) as caught:
        plan(5000)
    enough = named_budget(caught.value, "--disk")
    assert plan(enough).summary.disk_needed_bytes <= enough
    with pytest.raises(DoesNotFit):
        plan(enough * 3 // 4)


def test_device_rows_are_those_of_most_items(make_plan: Any, small_trace: Trace) -> None:
    plan = make_plan(device=10 * 80 + 79, host=50_000)
    assert plan.meta.device_slots == 10
    counts = np.bincount(np.concatenate([item.input_ids for item in small_trace.items()]), minlength=400)
    for residents in plan.arrays.residents:
        assert counts[residents[:10]].sum() == np.sort(counts)[-10:].sum()


def test_the_same_inputs_give_the_same_plan(make_plan: Any) -> None:
    one, two = make_plan(host=50_000), make_plan(host=50_000)
    assert one.digest == two.digest and one.summary == two.summary
    assert make_plan(host=52_000).digest != one.digest


def test_the_summary_tells_what_packing_then_does(
    tiny_graph: GraphStore, small_trace: Trace, make_plan: Any, tmp_path: Path
) -> None:
    plan = make_plan(host=50_000, device=800)
    summary, inputs = plan.summary, sum(len(item.input_ids) for item in small_trace.items())
    tiers = summary.device_hit_rows_per_epoch + summary.host_hit_rows_per_epoch + summary.missing_rows_per_epoch
    assert abs(tiers - inputs / 2) <= 2
    write_packs(plan, tiny_graph, small_trace, tmp_path / "packs", host_memory=4 << 20)
    packs = sum(path.stat().st_size for path in (tmp_path / "packs").glob("*.pack"))
    assert packs == summary.pack_bytes and abs(summary.read_bytes_per_epoch - packs / 2) < 1
    scratch = sum(path.stat().st_size for path in (tmp_path / "scratch-1").iterdir())
    assert scratch == summary.scratch_bytes
    whole = sum(path.stat().st_size for path in (tmp_path / "packs").iterdir())
    assert packs < whole + scratch < summary.disk_needed_bytes + 40_000  # but for small JSON files
    assert summary.pack_over_features == packs / (400 * 80)
    assert dict(summary_rows(summary))["mode"].startswith("reuse, private rows, policy belady")
    assert summary.read_amplification == pytest.approx(packs / (inputs * 80))


def test_the_best_policy_reads_the_smallest_share_of_what_items_use(make_plan: Any) -> None:
    shares = [make_plan(host=50_000, policy=policy).summary.read_amplification for policy in ("belady", "static")]
    shares.append(make_plan(host=1 << 20, policy="none").summary.read_amplification)
    assert shares[0] <= shares[1] < shares[2], "of so few rows both fill as many pages"


def test_the_table_explains_memory_and_when_packing_pays(make_plan: Any) -> None:
    some, all_rows = make_plan(host=50_000).summary, make_plan(host=1 << 20).summary
    assert some.missing_rows_per_epoch > 0 and all_rows.missing_rows_per_epoch == 0
    rows = dict(summary_rows(some, kept_bytes=50_000))
    assert rows["host memory needed"].endswith("of 48.8 KiB: 97.7 KiB less 48.8 KiB that evaluation keeps")
    assert rows["read per epoch"].endswith(f"{some.read_amplification:.2f} x the rows that items use")
    assert rows["packing pays"].startswith(("after ", "never: "))
    assert dict(summary_rows(all_rows))["packing pays"] == "at once: all rows that items use stay in memory"


def test_belady_reads_less_than_static_reads_less_than_none(make_plan: Any) -> None:
    read = [make_plan(host=50_000, device=4000, policy=p).summary.missing_rows_per_epoch for p in ("belady", "static")]
    read.append(make_plan(host=1 << 20, device=4000, policy="none").summary.missing_rows_per_epoch)
    assert read[0] < read[1] < read[2]


def test_auto_takes_what_fits_and_reads_soonest(
    make_plan: Any, wide_graph: GraphStore, wide_trace: Trace, tmp_path: Path
) -> None:
    def plan(disk: int, **config: Any) -> Any:
        return make_plan(wide_graph, wide_trace, host=64 << 20, policy="none", disk=disk, **config).summary

    private = plan(1 << 30)
    assert (private.mode, private.layout) == ("reuse", "private")
    disk = private.disk_needed_bytes * 7 // 10
    shared, rolling, auto = plan(disk, mode="reuse"), plan(disk, mode="rolling"), plan(disk)
    assert (shared.layout, rolling.mode) == ("shared", "rolling")
    rolling_s = rolling.read_s_per_epoch + rolling.pack_s
    assert auto.mode == ("reuse" if shared.read_s_per_epoch <= rolling_s else "rolling")
    assert rolling.window_items < 13 and rolling.disk_needed_bytes <= disk
    assert shared.pack_bytes < private.pack_bytes and shared.disk_needed_bytes <= disk


def test_a_trace_of_another_graph_is_refused(wide_graph: GraphStore, small_trace: Trace, make_plan: Any) -> None:
    with pytest.raises(DataError, match="sample again"):
        make_plan(wide_graph, small_trace)


def test_packs_of_a_rolling_plan_are_not_written(
    tiny_graph: GraphStore, small_trace: Trace, make_plan: Any, tmp_path: Path
) -> None:
    plan = make_plan(mode="rolling")
    assert plan.arrays is None and plan.meta.max_extent_bytes == 0
    with pytest.raises(ValueError, match="produce_windows"):
        write_packs(plan, tiny_graph, small_trace, tmp_path / "packs", host_memory=4 << 20)


def test_a_plan_of_another_trace_is_refused(
    tiny_graph: GraphStore, small_trace: Trace, make_plan: Any, tmp_path: Path
) -> None:
    other = Trace(small_trace.path, replace(small_trace.meta, seed=9))
    with pytest.raises(DataError, match="plan again"):
        write_packs(make_plan(), tiny_graph, other, tmp_path / "packs", host_memory=4 << 20)


def test_one_item_is_enough(tiny_graph: GraphStore, make_plan: Any, tmp_path: Path) -> None:
    config = SampleConfig(fanouts=(2,), batch_size=1000)
    trace = sample_trace(tiny_graph, tmp_path / "trace", config, host_memory=64 << 20, threads=1)
    plan = make_plan(tiny_graph, trace)
    assert plan.summary.num_items == 1 and plan.summary.missing_rows_per_epoch == 0  # cycled, it stays in the tier


@pytest.mark.parametrize("bad", [{"policy": "lru"}, {"mode": "once"}, {"row_dtype": "float8"}, {"polcy": "none"}])
def test_unknown_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PlanConfig(**bad)
