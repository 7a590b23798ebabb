"""Windows that anybody can build: each is sampled, planned and packed alone, as a pure function of a job and a number.

A rolling producer plans windows in order, since the host tier carries over. Feeders build any window, in any order, on
any host, and a window that was lost is built again elsewhere, so here the host tier starts empty with every window and
the device tier (and a static host tier) is the same for all. Bytes depend neither on threads nor on memory budgets.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.sampler.accesses import Accesses
from penstock.sampler.journal import journal_bytes
from penstock.sampler.known import Known
from penstock.sampler.movement import Tiers, find_next_uses
from penstock.sampler.neighbors import SampleConfig, make_trace_meta, sample_window
from penstock.sampler.packer import pack_windows
from penstock.sampler.plan import PlanConfig, feature_table
from penstock.sampler.policies import PolicyName
from penstock.sampler.recording import Recording, record
from penstock.sampler.rolling import (
    Probe,
    endless_trace,
    probe_items,
    rolling_meta,
    used_bytes,
    window_plan,
)
from penstock.sampler.scratch import ItemArrays
from penstock.storage.budget import Budgets, format_bytes
from penstock.storage.deal import Deal
from penstock.storage.directio import PAGE
from penstock.storage.errors import DataError, DoesNotFit, Outgrown
from penstock.storage.graph import GraphStore, Split
from penstock.storage.pack import PackIndex, PackSetMeta, read_pack_index, trace_digest
from penstock.storage.trace import TraceMeta, WindowIndex

MAX_WINDOW_ITEMS = 64  # longer windows save little (docs/decisions.md), and cost more when they are lost
LOCAL_WINDOWS = 3  # one being read, one ready, one being pulled
_MARGIN = 1.2  # later windows may be larger than what was probed


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowJob:
    """What all windows of a replica's split depend on, besides the graph.

    `kept` int64 [K] are node ids of the slots that never change, from device slot 0 on. `window_bytes` is what a pack
    should take, `build_bytes` what building it should take on disk, `feeder_bytes` what a feeder may hold for the job.
    """

    sample: SampleConfig
    plan: PlanConfig
    split: Split
    shuffle: bool
    deal: Deal | None
    stop_step: int
    meta: PackSetMeta
    window_bytes: int
    build_bytes: int
    feeder_bytes: int
    kept: NDArray[np.int64]

    @property
    def residents(self) -> NDArray[np.int64]:
        """Node id per slot when a window starts, device slots first, -1 where empty; the same for all windows."""
        out = np.full(self.meta.device_slots + self.meta.host_slots, -1, np.int64)
        out[: len(self.kept)] = self.kept
        return out

    def to_json(self) -> dict[str, Any]:
        """All but `kept`, which travels as bytes."""
        small = {name: getattr(self, name) for name in _SMALL}
        return small | {
            "sample": self.sample.model_dump(mode="json"),
            "plan": self.plan.model_dump(mode="json"),
            "deal": None if self.deal is None else asdict(self.deal),
            "meta": asdict(self.meta),
        }

    @staticmethod
    def from_json(value: dict[str, Any], kept: NDArray[np.int64]) -> "WindowJob":
        """Undo `to_json`; ValueError (pydantic's), TypeError or KeyError where it is malformed."""
        deal = value["deal"]
        return WindowJob(
            sample=SampleConfig.model_validate(value["sample"]),
            plan=PlanConfig.model_validate(value["plan"]),
            deal=None if deal is None else Deal(**deal),
            meta=PackSetMeta(**value["meta"]),
            kept=kept,
            **{name: value[name] for name in _SMALL},
        )


_SMALL = ("split", "shuffle", "stop_step", "window_bytes", "build_bytes", "feeder_bytes")


def make_job(
    graph: GraphStore,
    folder: Path,
    sample: SampleConfig,
    plan: PlanConfig,
    budgets: Budgets,
    *,
    start_step: int,
    stop_step: int,
    feeder_bytes: int,
    split: Split = "train",
    shuffle: bool = True,
    deal: Deal | None = None,
    memory: int,
    threads: int = 1,
    known_inputs: int = 0,
) -> WindowJob:
    """Size tiers and windows by some items at `start_step`, and for items of `known_inputs`; `folder` is scratch.

    `budgets` are the trainer's, its disk for windows that were pulled. DoesNotFit names the budget that is too small.
    """
    once = make_trace_meta(graph, sample.model_copy(update={"window_items": 1}), split, shuffle=shuffle, deal=deal)
    endless = endless_trace(once, stop_step)
    probe = probe_items(
        graph,
        folder,
        sample,
        plan,
        budgets,
        endless,
        start_step,
        memory=memory,
        threads=threads,
        share=1.0,
        known=Known(trace=trace_digest(once), num_inputs=min(known_inputs, graph.num_nodes)),
    )
    slots = probe.num_device + probe.num_host
    most = min(MAX_WINDOW_ITEMS, once.items_per_epoch)
    fitting = [
        items
        for items in range(1, most + 1)
        if LOCAL_WINDOWS * _pack_bytes(probe, items) + 8 * slots <= budgets.disk_bytes
        and _build_bytes(probe, items, slots) + _pack_bytes(probe, items) <= feeder_bytes
    ]
    if not fitting:
        raise DoesNotFit(
            f"a window of one item takes {format_bytes(_pack_bytes(probe, 1))}: --disk "
            f"{format_bytes(budgets.disk_bytes)} has to hold {LOCAL_WINDOWS} of them ("
            f"{LOCAL_WINDOWS * _pack_bytes(probe, 1) + 8 * slots} bytes), and a feeder's share of its disk, "
            f"{format_bytes(feeder_bytes)}, one and another that is being built "
            f"({_build_bytes(probe, 1, slots) + _pack_bytes(probe, 1)} bytes); raise the one that is too small "
            "(--disk, cluster.feeder_disk), or use a smaller batch size or smaller fanouts"
        )
    items = fitting[-1]
    _, meta = rolling_meta(graph, endless, plan, probe, items)
    num_kept = slots if plan.policy == "static" else probe.num_device
    return WindowJob(
        sample=sample,
        plan=plan,
        split=split,
        shuffle=shuffle,
        deal=deal,
        stop_step=stop_step,
        meta=meta,
        window_bytes=_pack_bytes(probe, items),
        build_bytes=_build_bytes(probe, items, slots),
        feeder_bytes=feeder_bytes,
        kept=probe.residents[:num_kept],
    )


def _pack_bytes(probe: Probe, items: int) -> int:
    """A window's pack and index: its first items miss most, as those that were probed from empty tiers."""
    mean = float(probe.extent_bytes[: min(items, len(probe.extent_bytes))].mean())
    return int(_MARGIN * items * mean) + 2 * PAGE


def _build_bytes(probe: Probe, items: int, slots: int) -> int:
    """A pack, its trace, its plan and its journal, all of which are there at once."""
    payload, inputs = float(probe.sizes.payload_bytes.mean()), float(probe.sizes.num_inputs.mean())
    scratch = items * (payload + PAGE + 24 * inputs) + journal_bytes(items) + 8 * slots + 16 * PAGE
    return _pack_bytes(probe, items) + int(_MARGIN * scratch)


def job_trace(graph: GraphStore, job: WindowJob) -> TraceMeta:
    """The trace that a job's windows are of; DataError where it was made for another graph."""
    sample = job.sample.model_copy(update={"window_items": job.meta.window_items})
    trace = endless_trace(make_trace_meta(graph, sample, job.split, shuffle=job.shuffle, deal=job.deal), job.stop_step)
    if job.meta.graph != graph.fingerprint or job.meta.trace != trace_digest(trace):
        raise DataError(
            f"the windows asked for are of graph {job.meta.graph}, {graph.path} is {graph.fingerprint} or is sampled "
            "otherwise; give feeders and trainers the same dataset and release"
        )
    return trace


def build_window(
    graph: GraphStore,
    job: WindowJob,
    window: int,
    folder: Path,
    *,
    memory: int,
    threads: int = 1,
    reserve: Callable[[int], None] = lambda num_bytes: None,
) -> PackIndex:
    """Build one window into `folder`, which must be its own: pack, residents and index, and nothing else is left.

    `reserve` is told, before the pack is written, how many bytes the folder will take at most, and may raise to end.
    Outgrown where an item is larger than the job's batches, DoesNotFit where memory or disk is too small, DataError for
    bad data.
    """
    trace = job_trace(graph, job)
    folder.mkdir(parents=True, exist_ok=True)
    traces, scratch = folder / "traces", folder / "scratch"
    scratch.mkdir(exist_ok=True)
    index = sample_window(graph, traces, job.sample, trace, window, host_memory=memory, threads=threads)
    if max(index.num_inputs) > job.meta.max_inputs:
        raise Outgrown(
            f"an item of window {window} reads {max(index.num_inputs)} rows, {job.meta.max_inputs} were expected; "
            "resume the run: it makes room for twice as many, or for these",
            num_inputs=max(index.num_inputs),
        )
    recording = _plan_alone(graph, job, index, traces, scratch)
    pack_bytes = sum(head.extent_bytes for head in recording.heads)
    more = journal_bytes(len(recording.heads)) + 8 * PAGE + 8 * len(job.residents)
    reserve(used_bytes(folder) + pack_bytes + more)
    with Accesses(traces, [index]) as accesses:
        plan = window_plan(graph, job.meta, window, recording)
        pack_windows(plan, accesses, [0], folder, host_memory=memory)
    recording.arrays.delete()
    shutil.rmtree(traces)
    shutil.rmtree(scratch)
    return read_pack_index(folder, window)


def _plan_alone(graph: GraphStore, job: WindowJob, index: WindowIndex, traces: Path, scratch: Path) -> Recording:
    """Plan a window whose host tier starts as in all others and is forgotten after it."""
    num_items, largest, meta = len(index.offsets), max(index.num_inputs), job.meta
    policy: PolicyName = job.plan.policy if meta.host_slots else "none"
    tiers = Tiers(
        np.zeros(graph.num_nodes, np.int32),
        policy=policy,
        num_device=meta.device_slots,
        num_host=meta.host_slots,
        max_inputs=largest,
        kept=job.kept,
    )
    with (
        Accesses(traces, [index]) as accesses,
        ItemArrays(scratch / "future.bin", "<i4", num_items, accesses.num_inputs) as uses,
    ):
        future = uses if policy == "belady" else None
        if future is not None:
            never = np.full(graph.num_nodes, num_items, np.int32)
            find_next_uses(accesses.ids, num_items, never, future, largest)
            tiers.policy.start(np.full(meta.host_slots, num_items, np.int32), num_items)
        recording = record(
            tiers,
            accesses,
            range(num_items),
            future,
            window_starts=(0,),
            table=feature_table(graph),
            row_bytes=meta.row_format.row_bytes,
            scratch=scratch,
            cyclic=False,
        )
        uses.delete()
    return recording


def check_kept(job: WindowJob) -> None:
    """DataError where a job that came from afar names slots or nodes that do not exist: kernels trust these numbers."""
    meta = job.meta
    wanted = meta.device_slots + (meta.host_slots if job.plan.policy == "static" else 0)
    if len(job.kept) != wanted or (wanted and not -1 <= int(job.kept.min()) <= int(job.kept.max()) < meta.num_nodes):
        raise DataError(f"a job keeps {len(job.kept)} rows of {meta.num_nodes} nodes in {wanted} slots; set it up anew")
