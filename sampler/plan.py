"""From a trace and budgets to a movement plan: which rows sit where at each step, and which come from disk.

Planning decides everything and writes nothing but scratch files; `packer` executes it. The device tier holds the rows
that most items read; the host tier follows a policy over what is left; the rest is in the packs. If the packs exceed
the disk budget, rolling windows and shared segments (see `layouts`) are compared by predicted time.
"""

import json
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict

from penstock.sampler.accesses import Accesses, open_accesses
from penstock.sampler.estimate import DiskRates, PlanSummary, break_even, measure_disk, random_read_s
from penstock.sampler.layouts import Choice, Mode, Terms, choose_layout
from penstock.sampler.movement import cyclic_future, take_census
from penstock.sampler.policies import PolicyName
from penstock.sampler.recording import PlanArrays, Recording, Table, record
from penstock.sampler.scratch import ItemArrays
from penstock.sampler.sizing import ROLLING_MARGIN, ItemSizes, choose_slots, device_slots, settle_with
from penstock.storage.budget import Budgets, format_bytes
from penstock.storage.errors import DataError
from penstock.storage.graph import GraphStore
from penstock.storage.pack import ExtentHead, PackMode, PackSetMeta, trace_digest
from penstock.storage.paths import AnyPath
from penstock.storage.progress import Progress, silent
from penstock.storage.rows import RowDtype, RowFormat
from penstock.storage.trace import Trace, TraceMeta


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

    def __repr__(self) -> str:
        meta, found = self.meta, self.summary
        packs = "" if found is None else f"; {format_bytes(found.pack_bytes)} of packs"
        return (
            f"Plan({self.mode}, {meta.policy}: {meta.num_items:,} items in {meta.num_windows:,} windows, "
            f"{meta.device_slots:,} device and {meta.host_slots:,} host slots{packs})"
        )

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
        sums=graph.feature_sums,
    )


def packed_format(graph: GraphStore, config: PlanConfig) -> RowFormat:
    """How rows lie in packs."""
    return RowFormat(dtype=config.row_dtype or graph.row_format.dtype, width=graph.row_format.width)


class _TracePlanner:
    """Plans the items of one trace; holds what all steps need. Memory: about 12 bytes per node and one item."""

    def __init__(
        self, graph: GraphStore, trace: Trace, config: PlanConfig, budgets: Budgets, accesses: Accesses, scratch: Path
    ) -> None:
        self.graph, self.trace, self.config, self.budgets = graph, trace, config, budgets
        self.accesses, self.scratch, self.rolling = accesses, scratch, config.mode == "rolling"
        self.sizes = ItemSizes(
            num_inputs=accesses.num_inputs,
            payload_bytes=accesses.payload_bytes,
            row_format=packed_format(graph, config),
            margin=ROLLING_MARGIN if self.rolling else 1.0,
        )
        self.census = take_census(accesses.ids, len(accesses), graph.num_nodes, never=2 * len(accesses))
        self.num_device = device_slots(budgets.device_bytes, self.sizes.row_format, self.census)

    def look_ahead(self, uses: ItemArrays) -> ItemArrays | None:
        """Find next uses, if the policy asks for them."""
        if self.config.policy != "belady":
            return None
        cyclic_future(self.accesses.ids, len(self.accesses), self.census, uses, self.sizes.max_inputs)
        return uses

    def fit_and_record(self, future: ItemArrays | None) -> tuple[int, Recording]:
        """Choose the slots of the host tier and record a lap with them."""
        num_host = choose_slots(
            self.accesses,
            self.sizes,
            self.census,
            future,
            policy=self.config.policy,
            num_device=self.num_device,
            host_bytes=self.budgets.host_bytes,
            rolling=self.rolling,
        )
        while True:
            recording = self._record(num_host, future)
            largest = max(head.extent_bytes for head in recording.heads)
            excess = self.sizes.memory(num_host, largest) - self.budgets.host_bytes
            if excess <= 0 or num_host == 0 or self.rolling:
                return num_host, recording
            # closing the lap made the last extent the largest
            num_host = max(0, num_host - 1 - excess // self.sizes.row_format.row_bytes)

    def _record(self, num_host: int, future: ItemArrays | None) -> Recording:
        policy: PolicyName = self.config.policy if num_host > 0 else "none"
        future = future if policy == "belady" else None
        ids, num_items, num_device = self.accesses.ids, len(self.accesses), self.num_device
        tiers, _ = settle_with(
            ids, self.sizes, self.census, future, policy=policy, num_device=num_device, num_host=num_host
        )
        return record(
            tiers,
            self.accesses,
            range(num_items),
            future,
            window_starts=range(0, num_items, self.trace.meta.window_items),
            table=feature_table(self.graph),
            row_bytes=self.sizes.row_format.row_bytes,
            scratch=self.scratch,
            cyclic=True,
        )

    def terms(self, num_host: int, rates: DiskRates, planning_bytes: int) -> Terms:
        """What the choice of a layout depends on."""
        return Terms(
            mode=self.config.mode,
            disk_bytes=self.budgets.disk_bytes,
            max_extent_bytes=(self.budgets.host_bytes - self.sizes.memory(num_host, 0)) // 2,
            largest_extent_bytes=self.sizes.largest_extent_bytes,
            window_items=self.trace.meta.window_items,
            items_per_epoch=self.trace.meta.items_per_epoch,
            num_nodes=self.graph.num_nodes,
            slots=self.num_device + num_host,
            rates=rates,
            scratch=self.scratch,
            planning_bytes=planning_bytes,
        )


def plan_packs(
    graph: GraphStore,
    trace: Trace,
    config: PlanConfig,
    budgets: Budgets,
    *,
    disk_rates: DiskRates | None = None,
    scratch: AnyPath,
    progress: Progress = silent,
) -> Plan:
    """Plan the packs of a whole trace; its bulk goes to files in the folder `scratch`, which must outlive packing.

    Rates of the disk are measured in `scratch` where they are not given. The same inputs, budgets and rates give the
    same plan. Raises DoesNotFit, naming the smallest budget that would do, and
    DataError where the trace is of another graph. Memory: about 12 bytes per node of the graph and one item.
    """
    if trace.meta.graph != graph.fingerprint:
        raise DataError(
            f"{trace.path} was sampled from graph {trace.meta.graph}, {graph.path} is {graph.fingerprint}; sample again"
        )
    scratch = Path(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    disk_rates = disk_rates or measure_disk(scratch)
    with open_accesses(trace) as accesses:
        progress("plan", 0, 4, "passes")
        planner = _TracePlanner(graph, trace, config, budgets, accesses, scratch)
        with ItemArrays(scratch / "future.bin", "<i4", len(accesses), accesses.num_inputs) as uses:
            progress("plan", 1, 4, "passes")
            future = planner.look_ahead(uses)
            progress("plan", 2, 4, "passes")
            num_host, recording = planner.fit_and_record(future)
            planning_bytes = uses.num_bytes if future is not None else 0
            uses.delete()
    progress("plan", 3, 4, "passes")
    choice = choose_layout(recording, planner.terms(num_host, disk_rates, planning_bytes))
    if choice.mode == "rolling":
        choice.arrays.delete()
    plan = _make_plan(planner, choice, recording, num_host, disk_rates)
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


def _planning_bytes(graph: GraphStore, meta: PackSetMeta, sizes: ItemSizes) -> int:
    """Counts, first uses and places per node; lists per host slot; the residents of every window; the largest item."""
    residents = 8 * (meta.device_slots + meta.host_slots) * meta.num_windows
    return 12 * graph.num_nodes + 36 * meta.host_slots + residents + 32 * sizes.max_inputs


def _make_plan(planner: _TracePlanner, choice: Choice, recording: Recording, num_host: int, rates: DiskRates) -> Plan:
    graph, trace, sizes = planner.graph, planner.trace, planner.sizes
    config, budgets, num_device = planner.config, planner.budgets, planner.num_device
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
        read_amplification=choice.read_bytes / (inputs * row_bytes) if inputs else None,
        pack_bytes=choice.pack_bytes,
        feature_bytes=graph.feature_bytes,
        pack_over_features=choice.pack_bytes / max(1, graph.feature_bytes),
        scratch_bytes=recording.arrays.num_bytes,
        disk_needed_bytes=choice.disk_bytes,
        host_needed_bytes=sizes.memory(num_host, choice.max_extent_bytes),
        planning_memory_bytes=_planning_bytes(graph, meta, sizes),
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
