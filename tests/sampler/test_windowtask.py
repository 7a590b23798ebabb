"""Windows built alone: by anybody, in any order, with any means, the same bytes and the values of the graph."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.sampler.plan import PlanConfig
from penstock.sampler.windowtask import WindowJob, build_window, check_kept, make_job
from penstock.storage.budget import Budgets
from penstock.storage.deal import Deal
from penstock.storage.errors import DataError, DoesNotFit, Outgrown
from penstock.storage.graph import GraphStore
from penstock.storage.items import encode_item, payload_bytes
from penstock.storage.pack import decode_extent
from penstock.storage.trace import window_name

SAMPLE = SampleConfig(fanouts=(3, 3), batch_size=16, seed=4)
BUDGETS = Budgets(device_bytes=800, host_bytes=80_000, disk_bytes=220_000)
FolderBytes = Callable[[Path], dict[str, bytes]]


def job_of(graph: GraphStore, folder: Path, **changes: Any) -> WindowJob:
    settings: dict[str, Any] = {
        "start_step": 7,
        "stop_step": 75,
        "feeder_bytes": 300_000,
        "memory": 64 << 20,
        "budgets": BUDGETS,
        "plan": PlanConfig(),
    }
    settings |= changes
    budgets, plan = settings.pop("budgets"), settings.pop("plan")
    return make_job(graph, folder / "probe", SAMPLE, plan, budgets, **settings)


def items_of(graph: GraphStore, job: WindowJob, folder: Path, window: int) -> tuple[dict[int, bytes], int]:
    """Payloads by item and hits, after comparing every row with the graph's; `folder` holds nothing but the window."""
    index = build_window(graph, job, window, folder, memory=64 << 20)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        window_name(window, suffix) for suffix in ("json", "pack", "residents.npy")
    )
    table, residents = np.array(graph.features).view(np.uint8), np.load(folder / window_name(window, "residents.npy"))
    assert np.array_equal(residents, job.residents)
    tier = np.zeros((len(residents), table.shape[1]), np.uint8)
    tier[residents >= 0] = table[residents[residents >= 0]]
    data, items, hits = np.fromfile(folder / window_name(window, "pack"), np.uint8), {}, 0
    for offset, size in zip(index.offsets, index.bytes, strict=True):
        extent = decode_extent(data[offset : offset + size])
        assert np.array_equal(np.concatenate([tier, extent.rows])[extent.source], table[extent.item.input_ids])
        hits += int(np.count_nonzero(extent.source < len(tier)))
        tier[job.meta.device_slots + extent.admit_slots] = extent.rows[extent.admit_rows]
        payload = np.empty(payload_bytes(extent.item), np.uint8)
        encode_item(extent.item, payload)
        items[extent.head.item] = bytes(payload)
    return items, hits


@pytest.mark.parametrize("policy", ["belady", "static", "none"])
def test_windows_in_any_order_hold_the_items_of_a_trace(tiny_graph: GraphStore, tmp_path: Path, policy: Any) -> None:
    deal = Deal(replicas=2, rank=1, group_items=4, epoch_items=11)
    job = job_of(tiny_graph, tmp_path, plan=PlanConfig(policy=policy), deal=deal, stop_step=9)
    trace = sample_trace(
        tiny_graph, tmp_path / "trace", SAMPLE, num_epochs=2, deal=deal, host_memory=64 << 20, threads=1
    )
    expected = [bytes(window.payload(n)) for window in trace.windows() for n in range(len(window))]
    found: dict[int, bytes] = {}
    all_hits = 0
    for window in reversed(range(job.meta.num_windows)):
        items, hits = items_of(tiny_graph, job, tmp_path / str(window), window)
        found |= items
        all_hits += hits
    assert found == dict(enumerate(expected))
    assert job.meta.num_windows > 1 and job.meta.device_slots > 0 and (job.meta.host_slots > 0) == (policy != "none")
    assert all_hits > 0


def test_bytes_depend_on_nothing_but_job_and_number(
    tiny_graph: GraphStore, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    job = job_of(tiny_graph, tmp_path)
    received = WindowJob.from_json(job.to_json(), job.kept.copy())
    for name, given, memory, threads in (("a", job, 64 << 20, 1), ("b", received, 33 << 20, 2)):
        build_window(tiny_graph, given, 3, tmp_path / name, memory=memory, threads=threads)
    hopwise = replace(job, sample=job.sample.model_copy(update={"mode": "hop"}))
    build_window(tiny_graph, hopwise, 3, tmp_path / "c", memory=64 << 20)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b") == folder_bytes(tmp_path / "c")


def test_the_folder_never_takes_more_than_was_reserved(tiny_graph: GraphStore, tmp_path: Path) -> None:
    job, told = job_of(tiny_graph, tmp_path), list[int]()
    index = build_window(tiny_graph, job, 0, tmp_path / "w", memory=64 << 20, reserve=told.append)
    assert sum(index.bytes) < told[0] <= job.build_bytes <= job.feeder_bytes
    assert sum(index.bytes) <= job.window_bytes

    def refuse(_: int) -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        build_window(tiny_graph, job, 1, tmp_path / "v", memory=64 << 20, reserve=refuse)
    assert not list((tmp_path / "v").glob("window-*"))


def test_an_item_larger_than_the_batches_asks_for_a_new_set_up(tiny_graph: GraphStore, tmp_path: Path) -> None:
    job = job_of(tiny_graph, tmp_path)
    small = replace(job, meta=replace(job.meta, max_inputs=20))
    with pytest.raises(Outgrown, match="20 were expected; resume the run"):
        build_window(tiny_graph, small, 0, tmp_path / "w", memory=64 << 20)


def test_jobs_of_another_graph_and_of_rows_that_are_not_there_are_refused(
    tiny_graph: GraphStore, hub_graph: GraphStore, tmp_path: Path
) -> None:
    job = job_of(tiny_graph, tmp_path)
    with pytest.raises(DataError, match="same dataset"):
        build_window(hub_graph, job, 0, tmp_path / "w", memory=64 << 20)
    check_kept(job)
    for kept in (job.kept[1:], job.kept + 400):
        with pytest.raises(DataError, match="set it up anew"):
            check_kept(replace(job, kept=kept))


@pytest.mark.parametrize("small", ["disk", "feeder"])
def test_what_does_not_fit_names_what_would(tiny_graph: GraphStore, tmp_path: Path, small: str) -> None:
    def make(size: int) -> WindowJob:
        if small == "disk":
            return job_of(tiny_graph, tmp_path, budgets=replace(BUDGETS, disk_bytes=size))
        return job_of(tiny_graph, tmp_path, feeder_bytes=size)

    with pytest.raises(DoesNotFit) as caught:
        make(9000)
    numbers = [int(text.split()[-1].lstrip("(")) for text in str(caught.value).split(" bytes)")[:-1]]
    assert make(numbers[small == "feeder"]).meta.window_items >= 1
