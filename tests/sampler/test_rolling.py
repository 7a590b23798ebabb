"""Rolling windows: the same values as a trace of all epochs, on a disk that stays under its budget, from a process
that is killed, starves, fails or loses its parent."""

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.engine.feed import open_pack_feed
from penstock.sampler.lookahead import BYTES_PER_NODE, RollingPlanner
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.sampler.plan import PlanConfig, feature_table
from penstock.sampler.producer import Producer, start_producer
from penstock.sampler.rolling import produce_windows, used_bytes
from penstock.sampler.seeds import epoch_order
from penstock.storage.budget import Budgets
from penstock.storage.errors import DoesNotFit, Outgrown
from penstock.storage.graph import GraphStore
from penstock.storage.items import encode_item, payload_bytes
from penstock.storage.pack import decode_extent, has_window, open_packset, read_pack_index
from penstock.storage.trace import read_window_index, window_name

SAMPLE = SampleConfig(fanouts=(3, 3), batch_size=16, seed=4)
DISK = 220_000


def budgets(disk: int = DISK, host: int = 110_000) -> Budgets:
    return Budgets(device_bytes=800, host_bytes=host, disk_bytes=disk)


class Consumer:
    """Takes windows in order, checks every row of every item, and deletes what it has used."""

    def __init__(self, out: Path, graph: GraphStore, start_step: int) -> None:
        self.out, self.meta = out, open_packset(out)
        self.table = np.array(graph.features).view(np.uint8)
        self.window = start_step // self.meta.window_items
        slots = self.meta.device_slots + self.meta.host_slots
        self.tier: NDArray[np.uint8] = np.zeros((slots, 80), np.uint8)
        self.items: dict[int, bytes] = {}
        self.highest, self.hits, self.filled = 0, 0, False

    def take(self) -> bool:
        """Use the next window if it is there."""
        if not has_window(self.out, self.window):
            return False
        self.highest = max(self.highest, used_bytes(self.out))
        residents = np.load(self.out / window_name(self.window, "residents.npy"))
        if not self.filled:
            self.tier[residents >= 0] = self.table[residents[residents >= 0]]
            self.filled = True
        assert np.array_equal(self.tier[residents >= 0], self.table[residents[residents >= 0]])
        index = read_pack_index(self.out, self.window)
        data = np.fromfile(self.out / window_name(self.window, "pack"), np.uint8)
        for offset, size in zip(index.offsets, index.bytes, strict=True):
            self._use(data[offset : offset + size])
        for suffix in ("json", "pack", "residents.npy"):
            (self.out / window_name(self.window, suffix)).unlink()
        self.window += 1
        return True

    def _use(self, data: NDArray[np.uint8]) -> None:
        extent = decode_extent(data)
        batch = np.concatenate([self.tier, extent.rows])[extent.source]
        assert np.array_equal(batch, self.table[extent.item.input_ids])
        self.hits += int(np.count_nonzero(extent.source < len(self.tier)))
        self.tier[self.meta.device_slots + extent.admit_slots] = extent.rows[extent.admit_rows]
        payload = np.empty(payload_bytes(extent.item), np.uint8)
        encode_item(extent.item, payload)
        self.items[extent.head.item] = bytes(payload)


def sampled_items(graph: GraphStore, folder: Path, num_epochs: int) -> list[bytes]:
    trace = sample_trace(graph, folder, SAMPLE, num_epochs=num_epochs, host_memory=64 << 20, threads=1)
    return [bytes(window.payload(n)) for window in trace.windows() for n in range(len(window))]


@pytest.mark.parametrize("policy", ["belady", "static", "none"])
def test_windows_hold_the_items_of_an_endless_trace(tiny_graph: GraphStore, tmp_path: Path, policy: Any) -> None:
    out, consumers = tmp_path / "packs", list[Consumer]()

    def wait() -> None:
        if not consumers:
            consumers.append(Consumer(out, tiny_graph, 7))
        assert consumers[0].take()

    produce_windows(
        tiny_graph.path, out, SAMPLE, PlanConfig(policy=policy), budgets(), start_step=7, stop_step=75, wait=wait
    )
    consumer = consumers[0]
    while consumer.take():
        pass
    first = 7 // consumer.meta.window_items * consumer.meta.window_items
    expected = sampled_items(tiny_graph, tmp_path / "trace", 7)
    assert sorted(consumer.items) == list(range(first, max(consumer.items) + 1)) and max(consumer.items) >= 74
    for item, payload in consumer.items.items():
        assert payload == expected[item]
    assert consumer.highest <= DISK
    assert (consumer.hits > 0) == (policy != "none" or consumer.meta.device_slots > 0)


def test_windows_are_deleted_by_nobody_but_the_consumer(tiny_graph: GraphStore, tmp_path: Path) -> None:
    out = tmp_path / "packs"
    produce_windows(
        tiny_graph.path, out, SAMPLE, PlanConfig(), budgets(1 << 30), start_step=0, stop_step=30, wait=lambda: None
    )
    meta = open_packset(out)
    assert meta.mode == "rolling" and meta.window_items == meta.items_per_epoch
    assert all(has_window(out, window) for window in range(-(-30 // meta.window_items)))
    assert not list((out / "traces").glob("window-*"))


@pytest.mark.parametrize(("disk", "host", "flag"), [(9000, 1 << 20, "--disk"), (1 << 30, 1000, "--host-memory")])
def test_what_cannot_roll_names_a_budget_that_can(
    tiny_graph: GraphStore, tmp_path: Path, disk: int, host: int, flag: str
) -> None:
    def produce(disk: int, host: int) -> None:
        def wait() -> None:
            raise TimeoutError

        produce_windows(
            tiny_graph.path,
            tmp_path / "packs",
            SAMPLE,
            PlanConfig(),
            budgets(disk, host),
            start_step=0,
            stop_step=3,
            wait=wait,
        )

    with pytest.raises(DoesNotFit) as caught:
        produce(disk, host)
    enough = int(str(caught.value).split(f"use {flag} ")[1].split()[0])
    produce(max(disk, enough), host) if flag == "--disk" else produce(disk, max(host, enough))


def until(condition: Callable[[], bool], producer: Producer | None = None) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "gave up waiting"
        if producer is not None:
            producer.check()
        time.sleep(0.01)


def begin(graph: GraphStore, out: Path, **changes: Any) -> Producer:
    settings = {"start_step": 0, "stop_step": 45} | changes
    plan, limits = settings.pop("plan", PlanConfig()), settings.pop("limits", budgets())
    return start_producer(graph.path, out, SAMPLE, plan, limits, **settings)


@pytest.mark.slow
def test_a_killed_producer_is_told_and_a_new_one_serves_the_same(tiny_graph: GraphStore, tmp_path: Path) -> None:
    out, expected = tmp_path / "packs", sampled_items(tiny_graph, tmp_path / "trace", 5)
    with begin(tiny_graph, out) as producer:
        consumer = Consumer(out, tiny_graph, 0)
        until(consumer.take, producer)
        os.kill(producer.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="-9"):
            until(lambda: False, producer)
    step = max(consumer.items) + 1
    with begin(tiny_graph, out, start_step=step) as producer:
        later = Consumer(out, tiny_graph, step)
        while max(later.items, default=0) < 44:
            until(later.take, producer)
        producer.check()
    items = later.items | consumer.items
    assert all(items[item] == expected[item] for item in range(45))


@pytest.mark.slow
def test_what_ends_a_producer_reaches_the_consumer(tiny_graph: GraphStore, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="--disk"):
        begin(tiny_graph, tmp_path / "packs", limits=budgets(9000))


_PARENT = """
import sys, time
from pathlib import Path
from penstock.sampler.neighbors import SampleConfig
from penstock.sampler.plan import PlanConfig, feature_table
from penstock.sampler.producer import start_producer
from penstock.storage.budget import Budgets

producer = start_producer(
    Path(sys.argv[1]),
    Path(sys.argv[2]),
    SampleConfig(fanouts=(3, 3), batch_size=16),
    PlanConfig(),
    Budgets(device_bytes=0, host_bytes=110_000, disk_bytes=220_000),
    start_step=0,
    stop_step=1000,
)
print(producer.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_producer_ends_with_its_parent(tiny_graph: GraphStore, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    command = [sys.executable, str(script), str(tiny_graph.path), str(tmp_path / "packs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
        parent.wait()
        until(lambda: not _runs(child))


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture(scope="module")
def late_hub(tmp_path_factory: pytest.TempPathFactory, make_graph: Any) -> GraphStore:
    """2,000 nodes of in-degree 3, but for one of 900 that is a seed of the 90th item of 4 seeds."""
    num_nodes, rng = 2000, np.random.default_rng(0)
    order = epoch_order(np.arange(num_nodes, dtype=np.int32), 0, 0)
    edges = np.stack([rng.integers(0, num_nodes, 3 * num_nodes), np.repeat(np.arange(num_nodes), 3)], axis=1)
    hub = np.stack([np.arange(900), np.full(900, order[4 * 90])], axis=1)
    features = rng.normal(size=(num_nodes, 16)).astype(np.float32)
    graph: GraphStore = make_graph(num_nodes, np.concatenate([edges, hub]), features=features)
    return graph


HUB_SAMPLE = SampleConfig(fanouts=(-1,), batch_size=4, seed=0)


@pytest.mark.parametrize("disk", [1 << 30, 400_000])
def test_items_that_outgrow_their_windows_are_fed_from_larger_ones(
    late_hub: GraphStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, disk: int
) -> None:
    """The hub is beyond the items that windows are sized by; on the smaller disk its window has to be shorter, too."""
    limits = Budgets(device_bytes=0, host_bytes=600_000, disk_bytes=disk)
    trace = sample_trace(late_hub, tmp_path / "trace", HUB_SAMPLE, host_memory=64 << 20, threads=1)
    packs, table, seen = tmp_path / "packs", np.array(late_hub.features), 0
    with (
        start_producer(late_hub.path, packs, HUB_SAMPLE, PlanConfig(), limits, start_step=0, stop_step=130) as producer,
        open_pack_feed(
            packs,
            late_hub,
            start_step=0,
            stop_step=130,
            host_memory=450_000,
            threads=1,
            producer_check=producer.check,
            start_over=producer.start_over,
            delete_behind=True,
        ) as feed,
    ):
        for batch, item in zip(feed, trace.items(), strict=False):
            assert batch.step == item.index
            assert np.array_equal(batch.input_ids.numpy(), item.input_ids)
            assert np.array_equal(batch.features.numpy(), table[item.input_ids])
            seen += 1
    assert seen == 130 and "rolling windows start anew" in caplog.text


def test_what_was_met_is_known_to_whoever_starts_again(late_hub: GraphStore, tmp_path: Path) -> None:
    """As after a kill: nothing is left of the first call but the folder."""
    out, limits = tmp_path / "packs", Budgets(device_bytes=0, host_bytes=600_000, disk_bytes=1 << 30)

    def produce(**limit: int) -> None:
        budgets = replace(limits, **limit)
        produce_windows(late_hub.path, out, HUB_SAMPLE, PlanConfig(), budgets, start_step=0, stop_step=130)

    with pytest.raises(Outgrown, match="reads up to 9.. rows"):
        produce()
    produce()
    with pytest.raises(DoesNotFit, match="--host-memory") as caught:  # an item that is known to come does not fit
        produce(host_bytes=80_000)
    assert caught.value.host_bytes is not None
    produce(host_bytes=caught.value.host_bytes)


def test_planning_a_window_takes_twelve_bytes_per_node(make_graph: Any, tmp_path: Path) -> None:
    """Many nodes, few items: what is taken is arrays over all nodes, and little else."""
    num_nodes = 1_000_000
    graph: GraphStore = make_graph(num_nodes, np.array([[1, 0], [2, 0]]), train=np.arange(8))
    config = SampleConfig(fanouts=(2,), batch_size=1, window_items=4)
    trace = sample_trace(graph, tmp_path / "trace", config, host_memory=64 << 20, threads=1)
    indexes = [read_window_index(trace.path, window) for window in range(2)]
    (tmp_path / "scratch").mkdir()
    table = feature_table(graph)
    tracemalloc.start()
    try:
        planner = RollingPlanner(
            trace.path, policy="belady", num_device=1, num_host=2, num_nodes=num_nodes, table=table
        )
        planner.plan(indexes[0], indexes[1], row_bytes=4, scratch=tmp_path / "scratch").arrays.delete()
        planner.plan(indexes[1], None, row_bytes=4, scratch=tmp_path / "scratch").arrays.delete()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < BYTES_PER_NODE * num_nodes + (8 << 20)
