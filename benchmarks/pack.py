"""`penstock bench pack`: bytes read and written per second while packing, against a plain copy of the feature table.

Both sides go past the page cache, reserve their files and sync them before the clock stops. The peer is the faster of
two copies in 4 MiB requests: one that reads and writes in turn, and one that reads ahead in a second thread. Peak
memory is that of a process that does nothing but plan and pack.
"""

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from time import perf_counter
from typing import Any

from penstock.benchmarks.harness import interleave, open_bench_graph, record
from penstock.sampler.estimate import DiskRates, measure_disk
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.sampler.packer import write_packs
from penstock.sampler.plan import Plan, PlanConfig, plan_packs
from penstock.storage.budget import GIB, MIB, Budgets, free_disk, num_threads, peak_rss_bytes
from penstock.storage.directio import IO_BYTES, PAGE, DirectFile, aligned_buffer, page_up
from penstock.storage.generate import GenerateConfig
from penstock.storage.graph import GraphStore, open_graph
from penstock.storage.trace import Trace, open_trace

NUM_NODES, NUM_FEATURES, NUM_ITEMS = 2_000_000, 128, 120  # packs about as large as the table
BATCH_SIZE, FANOUTS = 1024, (5, 10)
TIER_SHARE = 0.1
HOST_MEMORY = 512 * MIB
ALLOWANCE = 300 * MIB  # interpreter, compiled kernels, libraries


def _plan(graph: GraphStore, trace: Trace, rates: DiskRates, scratch: Path) -> Plan:
    """Plan with a host tier of about a tenth of the features."""
    row_bytes = graph.row_format.row_bytes
    inputs = max(max(window.index.num_inputs) for window in trace.windows())
    host_bytes = int(TIER_SHARE * graph.feature_bytes) + 5 * inputs * row_bytes
    budgets = Budgets(device_bytes=0, host_bytes=host_bytes, disk_bytes=free_disk(scratch.parent))
    return plan_packs(graph, trace, PlanConfig(mode="reuse"), budgets, disk_rates=rates, scratch=scratch)


def _packing(graph: GraphStore, trace: Trace, plan: Plan, out: Path, memory: int) -> Callable[[], float]:
    assert plan.summary is not None and plan.arrays is not None
    moved = plan.summary.pack_bytes + int(plan.arrays.needed.sum()) * MIB

    def rate() -> float:
        shutil.rmtree(out, ignore_errors=True)
        started = perf_counter()
        write_packs(plan, graph, trace, out, host_memory=memory)
        return moved / (perf_counter() - started)

    return rate


def _copy(source: Path, target: Path, *, read_ahead: bool) -> float:
    """Copy a file and return bytes read and written per second."""
    target.unlink(missing_ok=True)
    request = min(IO_BYTES, source.stat().st_size // PAGE * PAGE)  # a small table is less than one
    buffers = [aligned_buffer(request) for _ in range(2)]
    started = perf_counter()
    with DirectFile(source, "read") as reading, DirectFile(target, "write") as writing, ThreadPoolExecutor(1) as pool:
        num_bytes = reading.num_bytes // request * request
        writing.reserve(page_up(num_bytes))

        def read(offset: int) -> None:
            if offset < num_bytes:
                reading.read_into(buffers[offset // request % 2], offset, request)

        read(0)
        for offset in range(0, num_bytes, request):
            coming = pool.submit(read, offset + request) if read_ahead else None
            writing.write_from(buffers[offset // request % 2], offset, request)
            if coming is None:
                read(offset + request)
            else:
                coming.result()
        writing.sync()
    return 2 * num_bytes / (perf_counter() - started)


def _copying(source: Path, target: Path) -> Callable[[], float]:
    return lambda: max(_copy(source, target, read_ahead=ahead) for ahead in (False, True))


def _plan_and_pack(graph: Path, trace: Path, rates: DiskRates, folder: Path, memory: int, found: Any) -> None:
    opened, sampled = open_graph(graph), open_trace(trace)
    write_packs(
        _plan(opened, sampled, rates, folder / "scratch"), opened, sampled, folder / "packs", host_memory=memory
    )
    found.put(peak_rss_bytes())


def _peak_rss(graph: GraphStore, trace: Trace, rates: DiskRates, folder: Path, memory: int) -> int:
    """Peak memory of a process that plans and packs."""
    context = multiprocessing.get_context("spawn")
    found: SimpleQueue[int] = context.SimpleQueue()
    process = context.Process(target=_plan_and_pack, args=(graph.path, trace.path, rates, folder, memory, found))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"packing in a process of its own ended with exit code {process.exitcode}")
    shutil.rmtree(folder)
    return found.get()


def run(scale: float = 1.0, repeats: int = 5, *, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a record per case; graph, trace, packs and copies go to `folder`, on the disk that is to be measured."""
    num_nodes, batch_size = int(NUM_NODES * scale), max(32, int(BATCH_SIZE * min(1.0, scale)))
    train = min(0.9, NUM_ITEMS * batch_size / num_nodes)
    graph = open_bench_graph(folder, GenerateConfig(num_nodes=num_nodes, num_features=NUM_FEATURES, train=train))
    sampling = SampleConfig(fanouts=FANOUTS, batch_size=batch_size)
    trace = sample_trace(graph, folder / "trace", sampling, host_memory=4 * GIB, threads=num_threads())
    rates, memory = measure_disk(folder), max(48 * MIB, int(HOST_MEMORY * min(1.0, scale)))
    plan = _plan(graph, trace, rates, folder / "plan")
    values = interleave(
        _packing(graph, trace, plan, folder / "packs", memory), _copying(graph.feature_path, folder / "copy"), repeats
    )
    yield record("pack", "bandwidth", "bytes/s", *values, "sequential O_DIRECT copy", True, repeats)
    peak = _peak_rss(graph, trace, rates, folder / "alone", memory)
    yield record("pack", "peak_rss", "bytes", peak, memory + ALLOWANCE, "host memory + 300 MiB", False, 1)
