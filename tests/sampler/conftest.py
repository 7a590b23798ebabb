"""A small trace, plans of it, and a feed so plain that it cannot be wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.sampler.estimate import DiskRates
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.sampler.plan import Plan, PlanConfig, plan_packs
from penstock.storage.budget import Budgets
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore
from penstock.storage.items import encode_item, payload_bytes
from penstock.storage.pack import decode_extent, open_packset, read_pack_index
from penstock.storage.trace import Trace, window_name

RATES = DiskRates(read_bytes_per_s=1e9, write_bytes_per_s=1e9, random_reads_per_s=5e4)
MakePlan = Callable[..., Plan]
Replay = Callable[..., list[NDArray[Any]]]


@pytest.fixture(scope="session")
def small_trace(tiny_graph: GraphStore, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Two epochs of `tiny_graph`, 10 items each, in windows of 6 items: the last window is short."""
    config = SampleConfig(fanouts=(3, 3), batch_size=16, window_items=6)
    out = tmp_path_factory.mktemp("trace") / "trace"
    return sample_trace(tiny_graph, out, config, num_epochs=2, host_memory=64 << 20, threads=1)


@pytest.fixture(scope="session")
def wide_graph(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """A graph whose rows of 4160 float32 divide no page, and whose table has several blocks."""
    config = GenerateConfig(num_nodes=300, avg_degree=6, num_features=4160, num_classes=4, train=0.5, seed=3)
    return generate_graph(tmp_path_factory.mktemp("wide") / "graph", config, host_memory=64 << 20)


@pytest.fixture(scope="session")
def wide_trace(wide_graph: GraphStore, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """One epoch of it, in windows of 4 items."""
    config = SampleConfig(fanouts=(2, 2), batch_size=12, window_items=4)
    out = tmp_path_factory.mktemp("trace") / "trace"
    return sample_trace(wide_graph, out, config, host_memory=64 << 20, threads=1)


@pytest.fixture
def make_plan(tiny_graph: GraphStore, small_trace: Trace, tmp_path: Path) -> MakePlan:
    """Plan `small_trace`, or another; budgets in bytes by name, the rest goes to PlanConfig."""
    count = 0

    def make(
        graph: GraphStore = tiny_graph,
        trace: Trace = small_trace,
        *,
        device: int = 0,
        host: int = 1 << 20,
        disk: int = 1 << 30,
        **config: Any,
    ) -> Plan:
        nonlocal count
        count += 1
        return plan_packs(
            graph,
            trace,
            PlanConfig(**config),
            Budgets(device_bytes=device, host_bytes=host, disk_bytes=disk),
            disk_rates=RATES,
            scratch=tmp_path / f"scratch-{count}",
        )

    return make


def _read_item(folder: Path, window: int, n: int, row_bytes: int) -> tuple[Any, NDArray[np.uint8]]:
    index = read_pack_index(folder, window)
    data = np.fromfile(folder / window_name(window, "pack"), np.uint8)
    extent = decode_extent(data[index.offsets[n] : index.offsets[n] + index.bytes[n]])
    runs = [data[first * 4096 : (first + pages) * 4096] for first, pages in extent.shared_runs]
    laid = np.concatenate([*runs, np.empty(0, np.uint8)])
    shared = [laid[at : at + row_bytes] for at in extent.shared_offsets]
    rows = [*extent.rows, *shared]
    return extent, np.array(rows, np.uint8).reshape(len(rows), row_bytes)


@pytest.fixture
def replay() -> Replay:
    """Execute a pack set as its docstring says and return the gathered row bytes of every step.

    `table` uint8 [N, row_bytes] is where the tiers are filled from at the start. Payloads and residents are checked.
    """

    def run(folder: Path, table: NDArray[np.uint8], trace: Trace, *, laps: int) -> list[NDArray[Any]]:
        payloads = [bytes(window.payload(n)) for window in trace.windows() for n in range(len(window))]
        meta = open_packset(folder)
        row_bytes = table.shape[1]
        num_device, slots = meta.device_slots, meta.device_slots + meta.host_slots
        residents = np.load(folder / window_name(0, "residents.npy"))
        tier = np.zeros((slots, row_bytes), np.uint8)
        tier[residents >= 0] = table[residents[residents >= 0]]
        batches = []
        for _ in range(laps):
            for window in range(meta.num_windows):
                expected = np.load(folder / window_name(window, "residents.npy"))
                assert np.array_equal(tier[expected >= 0], table[expected[expected >= 0]])
                for n in range(len(read_pack_index(folder, window).offsets)):
                    extent, rows = _read_item(folder, window, n, row_bytes)
                    assert bytes(_payload(extent.item)) == payloads[extent.head.item]
                    batches.append(np.concatenate([tier, rows])[extent.source])
                    tier[num_device + extent.admit_slots] = rows[extent.admit_rows]
            wrap = np.load(folder / window_name(meta.num_windows - 1, "wrap.npy"))
            tier[num_device + wrap[1]] = tier[num_device + wrap[0]]
        return batches

    return run


def _payload(item: Any) -> NDArray[np.uint8]:
    out = np.empty(payload_bytes(item), np.uint8)
    encode_item(item, out)
    return out
