"""`penstock bench feed`: what a feed delivers without compute, and how many bytes an epoch takes, against peers.

`bandwidth` and `rows_vs_4k` feed packs without a host tier, so that every row comes from disk; `bandwidth_belady` is
the same with a host tier of a tenth of the features, where most of the work is in memory. Both sides of these read past
the page cache. `bytes_vs_*` give each policy the same host tier and count what a lap reads: ours and `static` extents
with their blocks, the 4 KiB peer pages of rows only. `mmap` is told apart because the page cache cannot be kept out.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.benchmarks.harness import interleave, open_bench_graph, record
from penstock.benchmarks.peers.direct4k import Direct4k
from penstock.benchmarks.peers.mmap_features import MmapFeatures
from penstock.benchmarks.peers.policies import bytes_per_epoch
from penstock.engine.feed import open_pack_feed
from penstock.engine.prefetch import FeedStats
from penstock.sampler.estimate import DiskRates, measure_disk
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.sampler.packer import write_packs
from penstock.sampler.plan import Plan, PlanConfig, plan_packs
from penstock.sampler.policies import PolicyName
from penstock.storage.budget import GIB, Budgets, free_disk, num_threads
from penstock.storage.directio import DirectFile, aligned_buffer, page_up
from penstock.storage.errors import DoesNotFit
from penstock.storage.generate import GenerateConfig
from penstock.storage.graph import GraphStore
from penstock.storage.trace import Trace

NUM_NODES, NUM_FEATURES, NUM_ITEMS = 2_000_000, 128, 60
BATCH_SIZE, FANOUTS = 1024, (10, 10)
TIER_SHARE = 0.1
_READ_BYTES = 64 << 20  # a buffer of the plain read; each read of it is cut into 4 MiB calls, as in the feed
_PASS_BYTES = 4 << 30  # that a timed pass moves at scale 1: opening a feed, which maps its buffers, is 3 % of it
_PEER_ROWS = 100_000  # per timed pass of the 4 KiB and the mmap peer: about a second


class _Bench:
    """A graph and its trace, and packs of it by policy, all in one folder."""

    def __init__(self, folder: Path, scale: float) -> None:
        num_nodes, batch_size = int(NUM_NODES * scale), max(32, int(BATCH_SIZE * min(1.0, scale)))
        train = min(0.9, NUM_ITEMS * batch_size / num_nodes)
        config = GenerateConfig(num_nodes=num_nodes, num_features=NUM_FEATURES, train=train)
        self.folder, self.graph = folder, open_bench_graph(folder, config)
        sampling = SampleConfig(fanouts=FANOUTS, batch_size=batch_size)
        self.trace = sample_trace(self.graph, folder / "trace", sampling, host_memory=4 * GIB, threads=num_threads())
        self.rates = measure_disk(folder)
        self.pass_bytes = max(GIB, int(_PASS_BYTES * min(1.0, scale)))
        self.plans: dict[PolicyName, Plan] = {}

    @property
    def tier_slots(self) -> int:
        """Rows of the host tier."""
        return int(self.graph.num_nodes * TIER_SHARE)

    def pack(self, policy: PolicyName) -> None:
        """Write the packs of a policy, with a host tier of `tier_slots` rows where it has one."""
        scratch = self.folder / f"plan-{policy}"
        plan = plan_for_tier(
            self.graph, self.trace, policy, 0 if policy == "none" else self.tier_slots, self.rates, scratch
        )
        write_packs(plan, self.graph, self.trace, self.folder / policy, host_memory=2 * GIB)
        self.plans[policy] = plan

    def feed(self, policy: PolicyName, laps: int) -> FeedStats:
        """Drain a feed from its opening to its last batch."""
        plan = self.plans[policy]
        memory = plan.summary.host_needed_bytes + plan.meta.max_extent_bytes if plan.summary else GIB
        with open_pack_feed(
            self.folder / policy,
            self.graph,
            start_step=0,
            stop_step=laps * self.trace.meta.num_items,
            host_memory=memory,
        ) as feed:
            for _ in feed:
                pass
            return feed.stats

    def lap_bytes(self, policy: PolicyName) -> int:
        """Bytes that a lap reads: a second one, so that filling the tiers is not counted."""
        return self.feed(policy, 2).bytes_read - self.feed(policy, 1).bytes_read

    def rates_of(self, policy: PolicyName) -> tuple[Callable[[], float], Callable[[], float]]:
        """Functions that feed for a while and return bytes read and pack rows per second."""
        plan = self.plans[policy]
        read_bytes = plan.summary.read_bytes_per_epoch if plan.summary else 0
        laps = max(1, round(self.pass_bytes / max(1, read_bytes)))

        def timed() -> tuple[FeedStats, float]:
            started = perf_counter()
            stats = self.feed(policy, laps)
            return stats, perf_counter() - started

        def bytes_rate() -> float:
            stats, seconds = timed()
            return stats.bytes_read / seconds

        def row_rate() -> float:
            stats, seconds = timed()
            return stats.pack_rows / seconds

        return bytes_rate, row_rate

    def plain_read(self, policy: PolicyName) -> Callable[[], float]:
        """A function that reads the policy's pack files from front to back and returns bytes per second."""
        paths = sorted((self.folder / policy).glob("*.pack"))
        buffer = aligned_buffer(_READ_BYTES)

        def rate() -> float:
            started, done = perf_counter(), 0
            while done < self.pass_bytes:
                for path in paths:
                    with DirectFile(path, "read") as file:
                        for offset in range(0, file.num_bytes, _READ_BYTES):
                            num_bytes = min(_READ_BYTES, file.num_bytes - offset)
                            file.read_into(buffer, offset, page_up(num_bytes))
                            done += num_bytes
            return done / (perf_counter() - started)

        return rate


def plan_for_tier(
    graph: GraphStore, trace: Trace, policy: PolicyName, slots: int, rates: DiskRates, scratch: Path
) -> Plan:
    """Find a budget whose plan has a host tier of `slots` rows, within 0.2 %; the rest of it depends on the plan.

    On small graphs the tier is what the least budget that holds the items leaves.
    """
    row_bytes = graph.row_format.row_bytes
    largest = max(max(window.index.num_inputs) for window in trace.windows())
    host_bytes = (slots + 8 * largest) * row_bytes
    for _ in range(8):
        plan = _plan_within(graph, trace, policy, host_bytes, rates, scratch)
        if policy == "none" or abs(plan.meta.host_slots - slots) <= slots // 500:
            break
        host_bytes += (slots - plan.meta.host_slots) * row_bytes
    return plan


def _plan_within(
    graph: GraphStore, trace: Trace, policy: PolicyName, host_bytes: int, rates: DiskRates, scratch: Path
) -> Plan:
    """Plan in `host_bytes`, or in the least that holds its items: those of a small graph are much of it."""
    budgets = Budgets(device_bytes=0, host_bytes=host_bytes, disk_bytes=free_disk(scratch.parent))
    config = PlanConfig(mode="reuse", policy=policy)
    try:
        return plan_packs(graph, trace, config, budgets, disk_rates=rates, scratch=scratch)
    except DoesNotFit as error:
        if error.host_bytes is None or error.host_bytes <= host_bytes:
            raise
        return _plan_within(graph, trace, policy, error.host_bytes, rates, scratch)


def _row_rate(gather: Callable[[NDArray[Any]], object], ids: NDArray[Any]) -> Callable[[], float]:
    def rate() -> float:
        started = perf_counter()
        gather(ids)
        return len(ids) / (perf_counter() - started)

    return rate


def _against_row_reads(bench: _Bench, repeats: int) -> Iterator[dict[str, Any]]:
    """The same rows, one by one from the feature table."""
    graph = bench.graph
    inputs = np.concatenate([window.item(0).input_ids for window in bench.trace.windows()])
    ids = np.array(np.resize(inputs, _PEER_ROWS))
    raw = np.empty((len(ids), graph.row_format.row_bytes), np.uint8)
    _, row_rate = bench.rates_of("none")
    with Direct4k(graph.feature_path, graph.feature_offset, graph.row_format.row_bytes) as direct:
        direct.gather(ids[:64], raw[:64])  # compiles
        peer = _row_rate(lambda wanted: direct.gather(wanted, raw), ids)
        values = interleave(row_rate, peer, repeats)
    yield record("feed", "rows_vs_4k", "rows/s", *values, "4 KiB O_DIRECT reads, 64 in flight", True, repeats)
    rows = raw.view(np.float32)
    with MmapFeatures(graph.feature_path, graph.feature_offset, NUM_FEATURES) as mapped:

        def cold() -> float:
            mapped.drop_cache()
            return _row_rate(lambda wanted: mapped.gather(wanted, rows), ids)()

        values = interleave(row_rate, cold, repeats)
    yield record("feed", "rows_vs_mmap", "rows/s", *values, "np.memmap, cache dropped before", True, repeats)


def _bytes_records(bench: _Bench) -> Iterator[dict[str, Any]]:
    """Ours as the feed counted them, the peers' by replaying their policy with as much memory for rows."""
    ours, row_bytes = bench.lap_bytes("belady"), bench.graph.row_format.row_bytes
    host_bytes = bench.plans["belady"].meta.host_slots * row_bytes
    static = bytes_per_epoch(bench.trace, row_bytes, host_bytes, "static")
    yield record("feed", "bytes_vs_static", "bytes/epoch", ours, static, "packs, static hot set", False, 1)
    pages = bytes_per_epoch(bench.trace, row_bytes, host_bytes, "belady4k")
    yield record("feed", "bytes_vs_belady4k", "bytes/epoch", ours, pages, "4 KiB reads, Belady cache", False, 1)


def run(scale: float = 1.0, repeats: int = 5, *, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a record per case; graph, trace and packs go to `folder`, on the disk that is to be measured."""
    bench = _Bench(folder, scale)
    bench.pack("none")
    values = interleave(bench.rates_of("none")[0], bench.plain_read("none"), repeats)
    yield record("feed", "bandwidth", "bytes/s", *values, "sequential O_DIRECT read", True, repeats)
    yield from _against_row_reads(bench, repeats)
    bench.pack("belady")
    values = interleave(bench.rates_of("belady")[0], bench.plain_read("belady"), repeats)
    yield record("feed", "bandwidth_belady", "bytes/s", *values, "sequential O_DIRECT read", True, repeats)
    yield from _bytes_records(bench)
