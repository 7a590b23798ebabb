"""Rolling windows: sampled, planned and packed ahead of the trainer, deleted behind it, on a bounded disk.

The producer is a process of its own (started with the spawn method), because sampling and packing want cores and memory
without the trainer's locks. The consumer deletes a window's files when it is done with them; the producer waits until
another window fits under the disk budget. Items are those that a trace of all epochs would have, so a producer that is
started anew at the trainer's step serves the same values, and nothing needs to be kept for a resume.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from penstock.sampler.accesses import Accesses
from penstock.sampler.journal import journal_bytes
from penstock.sampler.known import NAME, Known, read_known, write_known
from penstock.sampler.layouts import rolling_fixed_bytes, rolling_item_bytes
from penstock.sampler.lookahead import BYTES_PER_NODE, RollingPlanner
from penstock.sampler.movement import Tiers, cyclic_future, settle, take_census
from penstock.sampler.neighbors import SampleConfig, make_trace_meta, sample_window
from penstock.sampler.packer import begin_packset, pack_windows
from penstock.sampler.plan import Plan, PlanConfig, feature_table, packed_format, packset_meta
from penstock.sampler.policies import PolicyName
from penstock.sampler.recording import Recording
from penstock.sampler.scratch import ItemArrays
from penstock.sampler.sizing import ROLLING_MARGIN, ROLLING_SHARE, ItemSizes, choose_slots, device_slots
from penstock.storage.budget import MIB, Budgets, format_bytes
from penstock.storage.deal import Deal
from penstock.storage.directio import PAGE
from penstock.storage.errors import DoesNotFit, Outgrown
from penstock.storage.graph import GraphStore, SeedSet, open_graph
from penstock.storage.pack import PackSetMeta, feed_memory
from penstock.storage.progress import Progress, silent
from penstock.storage.trace import TraceMeta, WindowIndex, window_name

_PROBE_ITEMS = 32
_POLL_S = 0.05
_LEAST_MEMORY = 32 * MIB  # of the producer; below it, packing is slow and sampling may refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Rolling:
    """What a producer needs all along."""

    graph: GraphStore
    sample: SampleConfig
    trace: TraceMeta
    meta: PackSetMeta
    policy: PolicyName
    memory: int
    threads: int
    disk_bytes: int
    known: Known
    max_extent_bytes: int


def clear_windows(out: Path) -> None:
    """Delete what an earlier producer left in the folder, planned on tiers that are gone; what it knew is kept."""
    out.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != NAME:
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What some items told: their sizes, those of their extents from empty tiers, int64 [T], and the slots that fit.

    `residents` are node ids per slot, device slots first, after the items.
    """

    sizes: ItemSizes
    extent_bytes: NDArray[np.int64]
    num_device: int
    num_host: int
    residents: NDArray[np.int64]


def probe_items(
    graph: GraphStore,
    folder: Path,
    sample: SampleConfig,
    plan: PlanConfig,
    budgets: Budgets,
    meta: TraceMeta,
    start_step: int,
    *,
    memory: int,
    threads: int,
    share: float = ROLLING_SHARE,
    known: Known | None = None,
) -> Probe:
    """Sample some items where training starts into `folder`, which is deleted, and size the tiers by them and by what
    is known of others.

    Only `share` of the host budget is for feeding. DoesNotFit where not even no tier fits.
    """
    row_format = packed_format(graph, plan)
    probe = replace(meta, window_items=min(_PROBE_ITEMS, meta.items_per_epoch))
    index = sample_window(
        graph, folder, sample, probe, start_step // probe.window_items, host_memory=memory, threads=threads
    )
    with Accesses(folder, [index]) as accesses:
        count = len(accesses)
        sizes = ItemSizes(
            num_inputs=accesses.num_inputs,
            payload_bytes=accesses.payload_bytes,
            row_format=row_format,
            margin=ROLLING_MARGIN,
            known_inputs=0 if known is None else known.num_inputs,
            known_payload_bytes=0 if known is None else known.payload_bytes,
        )
        census = take_census(accesses.ids, count, graph.num_nodes, never=2 * count)
        num_device = device_slots(budgets.device_bytes, row_format, census)
        with ItemArrays(folder / "future.bin", "<i4", count, accesses.num_inputs) as uses:
            cyclic_future(accesses.ids, count, census, uses, sizes.max_inputs)
            num_host = choose_slots(
                accesses,
                sizes,
                census,
                uses,
                policy=plan.policy,
                num_device=num_device,
                host_bytes=budgets.host_bytes,
                rolling=True,
                share=share,
            )
            policy: PolicyName = plan.policy if num_host else "none"
            future = uses if policy == "belady" else None
            tiers = Tiers(
                census.counts, policy=policy, num_device=num_device, num_host=num_host, max_inputs=sizes.max_inputs
            )
            counts = settle(tiers, accesses.ids, count, future, max_laps=1)  # rolling tiers start empty
    shutil.rmtree(folder)
    return Probe(
        sizes=sizes,
        extent_bytes=sizes.extent_bytes(counts.misses, counts.admits),
        num_device=num_device,
        num_host=num_host,
        residents=tiers.residents(),
    )


def rolling_meta(
    graph: GraphStore, trace: TraceMeta, plan: PlanConfig, probe: Probe, window_items: int
) -> tuple[TraceMeta, PackSetMeta]:
    """What windows of so many items share, with room for items larger than those probed."""
    trace = replace(trace, window_items=window_items)
    packset = packset_meta(
        graph,
        trace,
        mode="rolling",
        policy=plan.policy,
        row_format=probe.sizes.row_format,
        num_device=probe.num_device,
        num_host=probe.num_host,
        window_items=window_items,
        num_items=trace.num_items,
        max_extent_bytes=0,
        max_inputs=min(graph.num_nodes, int(probe.sizes.max_inputs * ROLLING_MARGIN)),
    )
    return trace, packset


def endless_trace(once: TraceMeta, stop_step: int) -> TraceMeta:
    """A trace of as many epochs as hold the items before `stop_step`, from one of a single epoch."""
    return replace(once, num_epochs=max(1, -(-stop_step // once.items_per_epoch)))


def _window_items(disk_bytes: int, probe: Probe, items_per_epoch: int) -> int:
    sizes = probe.sizes
    item_bytes = rolling_item_bytes(
        float(probe.extent_bytes.mean()), float(sizes.payload_bytes.mean()), float(sizes.num_inputs.mean())
    )
    fixed = rolling_fixed_bytes(probe.num_device + probe.num_host, sizes.largest_extent_bytes)
    window_items = int((disk_bytes - fixed) // item_bytes)
    if window_items < 1:
        raise DoesNotFit(
            f"--disk {format_bytes(disk_bytes)} cannot hold three rolling windows of one item each; use --disk "
            f"{fixed + int(item_bytes) + 1} or more, a smaller batch size or smaller fanouts",
            disk_bytes=fixed + int(item_bytes) + 1,
        )
    return min(window_items, items_per_epoch)


def _ring_bytes(meta: PackSetMeta, host_bytes: int) -> int:
    """The largest extent that a feed of these packs has room for."""
    besides = feed_memory(
        host_slots=meta.host_slots,
        row_bytes=meta.row_format.row_bytes,
        max_extent_bytes=0,
        max_inputs=meta.max_inputs,
        width=meta.width,
    )
    return (host_bytes - besides) // 2


def _producer_memory(budgets: Budgets, num_nodes: int) -> int:
    """What sampling and packing have beside the planner."""
    return max(_LEAST_MEMORY, int(budgets.host_bytes * (1 - ROLLING_SHARE)) - BYTES_PER_NODE * num_nodes)


def produce_windows(
    graph_path: Path,
    out: Path,
    sample_config: SampleConfig,
    plan_config: PlanConfig,
    budgets: Budgets,
    *,
    start_step: int,
    stop_step: int,
    split: SeedSet = "train",
    shuffle: bool = True,
    deal: Deal | None = None,
    threads: int = 1,
    progress: Progress = silent,
    wait: Callable[[], None] = lambda: time.sleep(_POLL_S),
) -> None:
    """Make the windows that hold steps start_step <= s < stop_step, in order, as fast as the disk budget allows.

    Step s is item s of an endless trace, of a replica's own items with a `deal`. The folder `out` is cleared first.
    `wait` is called while there is no room, and may raise to end. Raises Outgrown where items are larger than those
    that windows were sized by, which the next call in this folder knows; DoesNotFit where a window cannot fit at all,
    DataError for bad data.
    """
    graph = open_graph(graph_path)
    clear_windows(out)
    once = make_trace_meta(
        graph, sample_config.model_copy(update={"window_items": 1}), split, shuffle=shuffle, deal=deal
    )
    endless = endless_trace(once, stop_step)
    memory, known = _producer_memory(budgets, graph.num_nodes), read_known(out, once)
    probe = probe_items(
        graph,
        out / "probe",
        sample_config,
        plan_config,
        budgets,
        endless,
        start_step,
        memory=memory,
        threads=threads,
        known=known,
    )
    window_items = _window_items(budgets.disk_bytes, probe, endless.items_per_epoch)
    window_items = known.most_items(budgets.disk_bytes, window_items)
    trace, meta = rolling_meta(graph, endless, plan_config, probe, window_items)
    rolling = Rolling(
        graph=graph,
        sample=sample_config,
        trace=trace,
        meta=meta,
        policy=plan_config.policy if meta.host_slots else "none",
        memory=memory,
        threads=threads,
        disk_bytes=budgets.disk_bytes,
        known=known,
        max_extent_bytes=_ring_bytes(meta, int(budgets.host_bytes * ROLLING_SHARE)),
    )
    begin_packset(out, meta)
    first, last = start_step // meta.window_items, (max(stop_step, start_step + 1) - 1) // meta.window_items
    planner = RollingPlanner(
        out / "traces",
        policy=rolling.policy,
        num_device=meta.device_slots,
        num_host=meta.host_slots,
        num_nodes=graph.num_nodes,
        table=feature_table(graph),
    )
    current = _sample(rolling, out, first)
    for window in range(first, last + 1):
        following = _sample(rolling, out, window + 1) if window < last else None
        _pack(rolling, out, planner, current, following, wait)
        progress("produce", window - first + 1, last - first + 1, "windows")
        if following is not None:
            current = following


def _sample(rolling: Rolling, out: Path, window: int) -> WindowIndex:
    try:
        index = sample_window(
            rolling.graph,
            out / "traces",
            rolling.sample,
            rolling.trace,
            window,
            host_memory=rolling.memory,
            threads=rolling.threads,
        )
    except DoesNotFit as error:
        raise _of_all(error) from error
    if max(index.num_inputs) > rolling.meta.max_inputs:
        _outgrown(rolling, out, index)
    return index


def _outgrown(rolling: Rolling, out: Path, index: WindowIndex) -> NoReturn:
    """Write down how large the items of a window are, so that the next start is for them."""
    write_known(out, rolling.known.largest(max(index.num_inputs), max(index.bytes)))
    raise Outgrown(
        f"an item of window {index.window} reads up to {max(index.num_inputs)} rows, its payload takes up to "
        f"{max(index.bytes)} bytes; {rolling.meta.max_inputs} rows in extents of {rolling.max_extent_bytes} bytes were "
        "expected; windows are sized anew"
    )


def _pack(
    rolling: Rolling,
    out: Path,
    planner: RollingPlanner,
    current: WindowIndex,
    following: WindowIndex | None,
    wait: Callable[[], None],
) -> None:
    """Plan a window, wait until it fits, pack and publish it, and delete its trace."""
    scratch = out / "scratch"
    scratch.mkdir(exist_ok=True)
    row_bytes = rolling.meta.row_format.row_bytes
    recording = planner.plan(current, following, row_bytes=row_bytes, scratch=scratch)
    plan = window_plan(rolling.graph, rolling.meta, current.window, recording)
    if max(head.extent_bytes for head in recording.heads) > rolling.max_extent_bytes:
        _outgrown(rolling, out, current)
    _wait_for_room(rolling, out, sum(head.extent_bytes for head in recording.heads), wait)
    with Accesses(out / "traces", [current]) as accesses:
        try:
            pack_windows(plan, accesses, [0], out, host_memory=rolling.memory)
        except DoesNotFit as error:
            raise _of_all(error) from error
    recording.arrays.delete()
    for suffix in ("json", "trace"):
        (out / "traces" / window_name(current.window, suffix)).unlink()


def _of_all(error: DoesNotFit) -> DoesNotFit:
    """What the whole run needs so that the producer's share of it suffices."""
    if error.host_bytes is None:
        return error
    needed = ceil(error.host_bytes / (1 - ROLLING_SHARE))
    return DoesNotFit(f"{error}: of the producer; use --host-memory {needed} or more", host_bytes=needed)


def window_plan(graph: GraphStore, meta: PackSetMeta, window: int, recording: Recording) -> Plan:
    """The plan of a single rolling window."""
    return Plan(
        mode="rolling",
        meta=meta,
        first_window=window,
        heads=recording.heads,
        segment_rows=(0,),
        arrays=recording.arrays,
        table=feature_table(graph),
        stored=graph.row_format,
        summary=None,
    )


def used_bytes(folder: Path) -> int:
    """Disk taken by all files below a folder; files may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            stat = path.lstat()
        except FileNotFoundError:
            continue
        total += max(stat.st_size, stat.st_blocks * 512)
    return total


def _wait_for_room(rolling: Rolling, out: Path, pack_bytes: int, wait: Callable[[], None]) -> None:
    slots, items = rolling.meta.device_slots + rolling.meta.host_slots, rolling.meta.window_items
    needed = pack_bytes + 8 * slots + journal_bytes(items) + 4 * PAGE  # residents, indexes
    while (used := used_bytes(out)) + needed > rolling.disk_bytes:
        if not any(out.glob("window-*.pack")):  # nothing that the trainer could free
            _too_large(rolling, out, pack_bytes, used, needed)
        wait()


def _too_large(rolling: Rolling, out: Path, pack_bytes: int, used: int, needed: int) -> NoReturn:
    """Try half as many items per window; DoesNotFit where there is one already."""
    items, disk_bytes = rolling.meta.window_items, rolling.disk_bytes
    message = (
        f"a window of {items} items takes {format_bytes(pack_bytes)}, which does not fit --disk "
        f"{format_bytes(disk_bytes)} beside {format_bytes(used)} of traces"
    )
    if items == 1:
        enough = used + needed
        raise DoesNotFit(f"{message}; use --disk {enough} or more", disk_bytes=enough)
    write_known(out, replace(rolling.known, window_items=items // 2, disk_bytes=disk_bytes))
    raise Outgrown(f"{message}; windows are made of fewer items")
