"""From a trace and budgets to a movement plan: which rows sit where at each step, and which come from disk.

Planning decides everything and writes nothing but scratch files; `packer` executes it. The device tier holds the rows
that most items read; the host tier follows a policy over what is left; the rest is in the packs. If the packs exceed
the disk budget, rolling windows and shared segments (see `layouts`) are compared by predicted time.
"""

import json
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict

from penstock.sampler.accesses import Accesses, open_accesses
from penstock.sampler.estimate import DiskRates, PlanSummary, break_even, random_read_s
from penstock.sampler.layouts import Choice, Mode, Terms, choose_layout
from penstock.sampler.movement import Census, LapCounts, Tiers, cyclic_future, take_census
from penstock.sampler.policies import PolicyName
from penstock.sampler.recording import PlanArrays, Recording, Table, record
from penstock.sampler.scratch import ItemArrays
from penstock.sampler.sizing import ItemSizes, MissCurve, choose_host_slots, miss_curve, settle_with
from penstock.storage.budget import Budgets
from penstock.storage.errors import DataError
from penstock.storage.graph import GraphStore
from penstock.storage.pack import ExtentHead, PackMode, PackSetMeta, trace_digest
from penstock.storage.progress import Progress, silent
from penstock.storage.rows import RowDtype, RowFormat
from penstock.storage.trace import Trace, TraceMeta

ROLLING_MARGIN = 1.25  # later windows may hold larger items than those planned on
ROLLING_SHARE = 0.75  # of host memory is for feeding; the rest is the producer's, which samples and packs meanwhile


class PlanConfig(BaseModel):
    """How rows move: `policy` rules the host tier, `mode` auto reuses where it fits, `row_dtype` None is as stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: PolicyName = "belady"
    mode: Mode = "auto"
    row_dtype: RowDtype | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A movement plan. In `rolling` mode it is a forecast only: `arrays` is None and each window is planned later.

    `first_window` and `heads[0].item` are 0 but for a rolling window; `segment_rows` are shared rows per window.
    """

    mode: PackMode
    meta: PackSetMeta
    first_window: int
    heads: tuple[ExtentHead, ...]
    segment_rows: tuple[int, ...]
    arrays: PlanArrays | None
    table: Table
    stored: RowFormat
    summary: PlanSummary | None

    @property
    def digest(self) -> str:
        """A digest of all extents and segments: equal plans give equal packs."""
        text = json.dumps([asdict(self.meta), self.first_window, self.segment_rows, [astuple(h) for h in self.heads]])
        return str(xxhash.xxh3_64_hexdigest(text.encode()))

    def summary_json(self) -> dict[str, object]:
        """What goes into `plan.json`."""
        return {} if self.summary is None else asdict(self.summary)


def feature_table(graph: GraphStore) -> Table:
    """Where the packer reads rows."""
    return Table(
        path=graph.feature_path,
        offset=graph.feature_offset,
        num_rows=graph.num_nodes,
        row_bytes=graph.row_format.row_bytes,
    )


def packed_format(graph: GraphStore, config: PlanConfig) -> RowFormat:
    """How rows lie in packs."""
    return RowFormat(dtype=config.row_dtype or graph.row_format.dtype, width=graph.row_format.width)


def device_slots(device_bytes: int, row_format: RowFormat, census: Census) -> int:
    """Rows of the device tier, which holds them decoded to float32; never more than are read at all."""
    return min(device_bytes // (4 * row_format.width), int(np.count_nonzero(census.counts)))


def choose_slots(
    accesses: Accesses,
    sizes: ItemSizes,
    census: Census,
    future: ItemArrays | None,
    *,
    policy: PolicyName,
    num_device: int,
    host_bytes: int,
    rolling: bool,
) -> int:
    """Rows of the host tier that the budget allows; DoesNotFit where not even none does.

    Rolling tiers start empty wherever training is, so that an item may miss all; and the producer needs its share.
    """
    device = Tiers(census.counts, policy="none", num_device=num_device, num_host=0, max_inputs=sizes.max_inputs)
    if policy == "none":
        curve = MissCurve(slots=np.zeros(1, np.int64), extents=np.zeros(1, np.int64))
    else:
        curve = miss_curve(accesses.ids, sizes, census.counts, device.place)
    del device

    def replay(slots: int) -> LapCounts:
        if rolling:
            return LapCounts(misses=sizes.num_inputs, admits=np.zeros_like(sizes.num_inputs), settled=True)
        name: PolicyName = policy if slots > 0 else "none"
        used = future if name == "belady" else None
        return settle_with(accesses.ids, sizes, census, used, policy=name, num_device=num_device, num_host=slots)[1]

    return choose_host_slots(
        replay,
        sizes=sizes,
        curve=curve,
        host_bytes=host_bytes,
        movable=policy != "none",
        share=ROLLING_SHARE if rolling else 1.0,
    )


def plan_packs(
    graph: GraphStore,
    trace: Trace,
    config: PlanConfig,
    budgets: Budgets,
    *,
    disk_rates: DiskRates,
    scratch: Path,
    progress: Progress = silent,
) -> Plan:
    """Plan the packs of a whole trace; its bulk goes to files in the folder `scratch`, which must outlive packing.

    The same inputs and budgets give the same plan. Raises DoesNotFit, naming the smallest budget that would do, and
    DataError where the trace is of another graph. Memory: about 12 bytes per node of the graph and one item.
    """
    if trace.meta.graph != graph.fingerprint:
        raise DataError(
            f"{trace.path} was sampled from graph {trace.meta.graph}, {graph.path} is {graph.fingerprint}; sample again"
        )
    scratch.mkdir(parents=True, exist_ok=True)
    row_format = packed_format(graph, config)
    with open_accesses(trace) as accesses:
        num_items = len(accesses)
        sizes = ItemSizes(
            num_inputs=accesses.num_inputs,
            payload_bytes=accesses.payload_bytes,
            row_format=row_format,
            margin=ROLLING_MARGIN if config.mode == "rolling" else 1.0,
        )
        progress("plan", 0, 4, "passes")
        census = take_census(accesses.ids, num_items, graph.num_nodes, never=2 * num_items)
        num_device = device_slots(budgets.device_bytes, row_format, census)
        with ItemArrays(scratch / "future.bin", "<i4", num_items, accesses.num_inputs) as uses:
            future = uses if config.policy == "belady" else None
            if future is not None:
                cyclic_future(accesses.ids, num_items, census, future, sizes.max_inputs)
            progress("plan", 1, 4, "passes")
            num_host = choose_slots(
                accesses,
                sizes,
                census,
                future,
                policy=config.policy,
                num_device=num_device,
                host_bytes=budgets.host_bytes,
                rolling=config.mode == "rolling",
            )
            progress("plan", 2, 4, "passes")
            policy: PolicyName = config.policy if num_host > 0 else "none"
            future = future if policy == "belady" else None
            tiers, _ = settle_with(
                accesses.ids, sizes, census, future, policy=policy, num_device=num_device, num_host=num_host
            )
            recording = record(
                tiers,
                accesses,
                range(num_items),
                future,
                window_starts=range(0, num_items, trace.meta.window_items),
                table=feature_table(graph),
                row_bytes=row_format.row_bytes,
                scratch=scratch,
                cyclic=True,
            )
            planning_bytes = uses.num_bytes if future is not None else 0
            uses.delete()
    progress("plan", 3, 4, "passes")
    terms = Terms(
        mode=config.mode,
        disk_bytes=budgets.disk_bytes,
        max_extent_bytes=(budgets.host_bytes - sizes.memory(num_host, 0)) // 2,
        largest_extent_bytes=sizes.largest_extent_bytes,
        window_items=trace.meta.window_items,
        items_per_epoch=trace.meta.items_per_epoch,
        num_nodes=graph.num_nodes,
        slots=num_device + num_host,
        rates=disk_rates,
        scratch=scratch,
        planning_bytes=planning_bytes,
    )
    choice = choose_layout(recording, terms)
    if choice.mode == "rolling":
        choice.arrays.delete()
    plan = _make_plan(graph, trace, config, budgets, choice, recording, sizes, num_device, num_host, disk_rates)
    progress("plan", 4, 4, "passes")
    return plan


def packset_meta(
    graph: GraphStore,
    trace: TraceMeta,
    *,
    mode: PackMode,
    policy: PolicyName,
    row_format: RowFormat,
    num_device: int,
    num_host: int,
    window_items: int,
    num_items: int,
    max_extent_bytes: int,
    max_inputs: int,
) -> PackSetMeta:
    """What all windows of a pack set share."""
    return PackSetMeta(
        graph=graph.fingerprint,
        trace=trace_digest(trace),
        mode=mode,
        policy=policy,
        row_dtype=row_format.dtype,
        width=row_format.width,
        num_nodes=graph.num_nodes,
        device_slots=num_device,
        host_slots=num_host,
        window_items=window_items,
        items_per_epoch=trace.items_per_epoch,
        num_items=num_items,
        max_extent_bytes=max_extent_bytes,
        max_inputs=max_inputs,
    )


def _make_plan(
    graph: GraphStore,
    trace: Trace,
    config: PlanConfig,
    budgets: Budgets,
    choice: Choice,
    recording: Recording,
    sizes: ItemSizes,
    num_device: int,
    num_host: int,
    rates: DiskRates,
) -> Plan:
    row_bytes, epochs = sizes.row_format.row_bytes, trace.meta.num_epochs
    inputs = int(sizes.num_inputs.sum())
    missing = inputs - recording.device_hits - recording.host_hits
    random_s = random_read_s(missing / epochs, row_bytes, rates)
    meta = packset_meta(
        graph,
        trace.meta,
        mode=choice.mode,
        policy=config.policy,
        row_format=sizes.row_format,
        num_device=num_device,
        num_host=num_host,
        window_items=choice.window_items,
        num_items=len(choice.heads),
        max_extent_bytes=choice.max_extent_bytes if choice.mode == "reuse" else 0,
        max_inputs=sizes.max_inputs,
    )
    per_epoch_s = choice.total_s / epochs
    summary = PlanSummary(
        mode=choice.mode,
        layout=choice.layout,
        policy=config.policy,
        row_dtype=sizes.row_format.dtype,
        row_bytes=row_bytes,
        num_items=len(choice.heads),
        items_per_epoch=trace.meta.items_per_epoch,
        window_items=choice.window_items,
        num_windows=meta.num_windows,
        device_slots=num_device,
        host_slots=num_host,
        device_bytes=budgets.device_bytes,
        host_bytes=budgets.host_bytes,
        disk_bytes=budgets.disk_bytes,
        input_rows_per_epoch=inputs // epochs,
        device_hit_rows_per_epoch=recording.device_hits // epochs,
        host_hit_rows_per_epoch=recording.host_hits // epochs,
        missing_rows_per_epoch=missing // epochs,
        missing_bytes_per_epoch=missing * row_bytes // epochs,
        read_bytes_per_epoch=choice.read_bytes // epochs,
        read_amplification=choice.read_bytes / max(1, missing * row_bytes),
        pack_bytes=choice.pack_bytes,
        feature_bytes=graph.feature_bytes,
        pack_over_features=choice.pack_bytes / max(1, graph.feature_bytes),
        scratch_bytes=recording.arrays.num_bytes,
        disk_needed_bytes=choice.disk_bytes,
        host_needed_bytes=sizes.memory(num_host, choice.max_extent_bytes),
        planning_memory_bytes=12 * graph.num_nodes + 32 * num_host + 32 * sizes.max_inputs,
        max_extent_bytes=choice.max_extent_bytes,
        max_inputs=sizes.max_inputs,
        read_s_per_epoch=choice.read_s / epochs,
        pack_s=choice.pack_s if choice.mode == "reuse" else choice.pack_s / epochs,
        random_read_s_per_epoch=random_s,
        break_even_epochs=break_even(choice.pack_s if choice.mode == "reuse" else 0.0, random_s, per_epoch_s),
        disk_rates=rates,
    )
    return Plan(
        mode=choice.mode,
        meta=meta,
        first_window=0,
        heads=choice.heads if choice.mode == "reuse" else (),
        segment_rows=choice.segment_rows if choice.mode == "reuse" else (),
        arrays=choice.arrays if choice.mode == "reuse" else None,
        table=feature_table(graph),
        stored=graph.row_format,
        summary=summary,
    )
