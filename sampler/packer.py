"""Execute a plan: one sequential scan of the feature table, one write of the packs, under a memory budget.

Missing rows are sorted by node id in every extent, so each part of the table adds one run of bytes to each extent, at a
place known beforehand. Reading the next part, gathering rows of this one and writing overlap. All windows are packed in
one pass where file handles and memory allow; finished windows are never redone.
"""

import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from penstock.sampler.accesses import Accesses, open_accesses
from penstock.sampler.finished import check_finished, finished_windows
from penstock.sampler.journal import Journal, delete_journal, read_journal
from penstock.sampler.packing_pass import CHECKPOINT_S, PackingPass, Stale
from penstock.sampler.pass_layout import PassMemory, fit_memory, lay_out, split_memory, split_passes
from penstock.sampler.plan import Plan
from penstock.storage.budget import Size, format_bytes, parse_memory, require_free_disk
from penstock.storage.errors import DataError, DoesNotFit
from penstock.storage.graph import GraphStore
from penstock.storage.pack import (
    PackSetMeta,
    has_window,
    is_complete,
    open_packset,
    publish_packset,
    trace_digest,
    write_packset,
)
from penstock.storage.paths import AnyPath
from penstock.storage.progress import Progress, silent
from penstock.storage.trace import Trace, window_name

logger = logging.getLogger(__name__)


def write_packs(
    plan: Plan,
    graph: GraphStore,
    trace: Trace,
    out: AnyPath,
    *,
    host_memory: Size,
    progress: Progress = silent,
    checkpoint_s: float = CHECKPOINT_S,
) -> PackSetMeta:
    """Write all packs of a `reuse` plan into the folder `out`, or what is still lacking, and publish it.

    What another row format changed is kept there too, see `row_source.read_row_error`.

    Bytes do not depend on `host_memory`, nor on kills and resumes with other memory; what was begun by another plan of
    the same trace begins anew, and the log says so. Raises DoesNotFit where memory or disk is too small (what was
    finished stays), DataError where `out` holds complete packs of another plan or a value exceeds float16.
    """
    if plan.mode != "reuse" or plan.arrays is None:
        raise ValueError("the plan is for rolling windows, which are packed by produce_windows; plan with mode=reuse")
    if plan.meta.graph != graph.fingerprint or plan.meta.trace != trace_digest(trace.meta):
        raise DataError(f"the plan is not of graph {graph.path} and trace {trace.path}; plan again")
    out, host_memory = Path(out), parse_memory(host_memory)
    _drop_begun_otherwise(out, plan.meta)
    begin_packset(out, plan.meta)
    if is_complete(out):
        return plan.meta
    every = range(plan.meta.num_windows)
    todo = sorted(set(every) - finished_windows(plan, out))
    sizes = lay_out(plan, todo, 1 << 62).file_bytes
    before, total = 0, sum(sizes.values())

    def report(stage: str, done: int, _: int, unit: str, /, **numbers: float) -> None:
        progress(stage, min(total, before + done), total, unit, **numbers)

    with open_accesses(trace) as accesses:
        _go_on(plan, accesses, todo, out, host_memory, report, checkpoint_s)
        todo = [window for window in todo if not has_window(out, window)]
        _clear(out, todo)
        before = total - sum(sizes[window] for window in todo)
        for windows in split_passes(plan, todo, host_memory):
            pack_windows(
                plan, accesses, windows, out, host_memory=host_memory, progress=report, checkpoint_s=checkpoint_s
            )
            before += sum(sizes[window] for window in windows)
    check_finished(plan, out, every)
    publish_packset(out, plan.meta)
    progress("pack", total, total, "bytes")  # passes count what they copied, and not what they pad
    return plan.meta


def require_packing_memory(plan: Plan, host_memory: int) -> None:
    """DoesNotFit, naming a --host-memory that would do, where a plan cannot be packed; before anything is written."""
    if plan.mode == "reuse":
        split_passes(plan, range(plan.meta.num_windows), host_memory)


def _go_on(
    plan: Plan,
    accesses: Accesses,
    todo: list[int],
    out: Path,
    host_memory: int,
    progress: Progress,
    checkpoint_s: float,
) -> None:
    """Finish the pass that a killed run began, in buffers of any size; say so where it has to begin anew."""
    begun = read_journal(out)
    if begun is None or not set(begun[0].windows) & set(todo):
        return
    try:
        journal, memory = begun[0], _memory_to_go_on(plan, begun[0], host_memory)
        work = PackingPass(plan, accesses, journal.windows, out, memory, progress=progress, checkpoint_s=checkpoint_s)
        work.run(begun)
    except Stale as reason:
        logger.warning("packing %s begins anew where windows are not finished: %s", out, reason)


def _memory_to_go_on(plan: Plan, journal: Journal, host_memory: int) -> PassMemory:
    if journal.plan != plan.digest:
        raise Stale("it was of another plan")
    num_streams = len(lay_out(plan, journal.windows, journal.bucket_rows or 1 << 62).regions)
    try:
        memory = split_memory(plan, num_streams, host_memory)
    except DoesNotFit as error:  # for so many windows in one pass
        raise Stale(str(error)) from error
    if memory.bucket_rows < journal.bucket_rows:
        raise Stale(f"{format_bytes(host_memory)} of host memory is too little for its buckets")
    return replace(memory, bucket_rows=journal.bucket_rows)


def _clear(out: Path, todo: list[int]) -> None:
    """Delete what a killed pass left of windows that are not finished; the journal first, as it speaks of them."""
    delete_journal(out)
    for leftover in [*out.glob("window-*.pack.partial"), *out.glob("bucket-*")]:
        leftover.unlink()
    for window in todo:  # one that was renamed, but got no index
        (out / window_name(window, "pack")).unlink(missing_ok=True)


def _drop_begun_otherwise(out: Path, meta: PackSetMeta) -> None:
    """Delete unfinished packs of another plan of the same trace: budgets may change between a kill and a resume."""
    if is_complete(out) or not (out / "packset.json").exists():
        return
    old = open_packset(out)
    if old == meta or (old.graph, old.trace) != (meta.graph, meta.trace):
        return
    logger.warning("packing %s begins anew: it was begun with other %s", out, _differing(old, meta))
    delete_journal(out)
    for index in out.glob("window-*.json"):  # first, so that nothing of the old plan ever looks finished
        index.unlink()
    shutil.rmtree(out)


def _differing(old: PackSetMeta, new: PackSetMeta) -> str:
    return ", ".join(sorted(key for key, value in asdict(new).items() if asdict(old)[key] != value))


def begin_packset(out: Path, meta: PackSetMeta) -> None:
    """Make the folder of a pack set; DataError where it holds another one, naming what differs."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "packset.json").exists():
        if differing := _differing(open_packset(out), meta):
            raise DataError(
                f"{out} holds packs of another plan (other {differing}); delete the folder, or plan "
                "with the same trace, budgets and settings"
            )
    else:
        write_packset(out, meta)


def pack_windows(
    plan: Plan,
    accesses: Accesses,
    windows: list[int],
    out: Path,
    *,
    host_memory: int,
    progress: Progress = silent,
    checkpoint_s: float = CHECKPOINT_S,
) -> None:
    """Pack some windows of a plan, counted from its first, in one pass; none of them may be finished."""
    memory = fit_memory(plan, windows, host_memory)
    work = PackingPass(plan, accesses, windows, out, memory, progress=progress, checkpoint_s=checkpoint_s)
    require_free_disk(out, work.layout.total_bytes, "packing")
    work.run()
