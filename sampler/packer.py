"""Execute a plan: one sequential scan of the feature table, one write of the packs, under a memory budget.

Missing rows are sorted by node id in every extent, so each part of the table adds one run of bytes to each extent, at a
place known beforehand. Reading the next part, gathering rows of this one and writing overlap. All windows are packed in
one pass where file handles and memory allow; finished windows are never redone.
"""

from dataclasses import asdict
from pathlib import Path

from penstock.sampler.accesses import Accesses, open_accesses
from penstock.sampler.journal import read_journal
from penstock.sampler.packing_pass import CHECKPOINT_S, PackingPass
from penstock.sampler.pass_layout import lay_out, split_memory, split_passes
from penstock.sampler.plan import Plan
from penstock.storage.budget import require_free_disk
from penstock.storage.errors import DataError
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
from penstock.storage.progress import Progress, silent
from penstock.storage.trace import Trace


def write_packs(
    plan: Plan,
    graph: GraphStore,
    trace: Trace,
    out: Path,
    *,
    host_memory: int,
    progress: Progress = silent,
    checkpoint_s: float = CHECKPOINT_S,
) -> PackSetMeta:
    """Write all packs of a `reuse` plan into the folder `out`, or what is still lacking, and publish it.

    What another row format changed is kept there too, see `row_source.read_row_error`.

    Bytes do not depend on `host_memory`, nor on kills and resumes. Raises DoesNotFit where memory or disk is too small
    (what was finished stays), DataError where `out` holds packs of another plan or a value exceeds float16.
    """
    if plan.mode != "reuse" or plan.arrays is None:
        raise ValueError("the plan is for rolling windows, which are packed by produce_windows; plan with mode=reuse")
    if plan.meta.graph != graph.fingerprint or plan.meta.trace != trace_digest(trace.meta):
        raise DataError(f"the plan is not of graph {graph.path} and trace {trace.path}; plan again")
    begin_packset(out, plan.meta)
    if is_complete(out):
        return plan.meta
    todo = [window for window in range(plan.meta.num_windows) if not has_window(out, window)]
    found = read_journal(out)
    if found is not None and found[0].plan == plan.digest:
        todo = sorted(set(todo) | set(found[0].windows))  # a pass is resumed as it was begun
    sizes = lay_out(plan, todo, 1 << 62).file_bytes
    before, total = 0, sum(sizes.values())

    def report(stage: str, done: int, _: int, unit: str, /, **numbers: float) -> None:
        progress(stage, before + done, total, unit, **numbers)

    with open_accesses(trace) as accesses:
        for windows in split_passes(plan, todo, host_memory):
            pack_windows(
                plan, accesses, windows, out, host_memory=host_memory, progress=report, checkpoint_s=checkpoint_s
            )
            before += sum(sizes[window] for window in windows)
    publish_packset(out, plan.meta)
    return plan.meta


def begin_packset(out: Path, meta: PackSetMeta) -> None:
    """Make the folder of a pack set; DataError where it holds another one, naming what differs."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "packset.json").exists():
        old, new = asdict(open_packset(out)), asdict(meta)
        differing = sorted(key for key in new if old[key] != new[key])
        if differing:
            raise DataError(
                f"{out} holds packs of another plan (other {', '.join(differing)}); delete the folder, or plan "
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
    """Pack some windows of a plan, counted from its first, in one pass."""
    num_streams = len(lay_out(plan, windows, 1 << 62).regions)
    memory = split_memory(plan, num_streams, host_memory)
    work = PackingPass(plan, accesses, windows, out, memory, progress=progress, checkpoint_s=checkpoint_s)
    if read_journal(out) is None:
        require_free_disk(out, work.layout.total_bytes, "packing")
    work.run()
