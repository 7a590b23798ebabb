"""From a split to packs: sample, plan, pack, in a folder of the run; each step skipped when done.

Training cycles the packs of a few sampled epochs, or follows a rolling producer. Evaluation packs once and reads in
order, without a host tier.
"""

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from penstock.engine.models import needs_degrees
from penstock.run import Run
from penstock.sampler.estimate import DiskRates, PlanSummary
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.sampler.packer import write_packs
from penstock.sampler.plan import Plan, PlanConfig, plan_packs
from penstock.storage.budget import Budgets
from penstock.storage.graph import Split
from penstock.storage.manifest import read_json, write_json
from penstock.storage.pack import is_complete
from penstock.storage.trace import Trace

_EVALUATION_DISK_SHARE = 0.1
_SAMPLE_MEMORY_SHARE = 0.5  # sampling holds windows and scratch tables; the topology itself is mapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A planned split; its packs are complete unless `summary.mode` is rolling."""

    packs: Path
    summary: PlanSummary


def sample_config(run: Run, split: Split) -> SampleConfig:
    """How a split is sampled; evaluation may have fanouts of its own, and items of a quarter of the size.

    Without a host tier all rows of an item are in its extent, so a smaller item keeps it within evaluation's share.
    """
    config = run.config.sampler.model_copy(update={"degrees": needs_degrees(run.config.model)})
    if split == "train":
        return config
    fanouts = run.config.evaluate.fanouts
    update: dict[str, Any] = {"batch_size": max(1, config.batch_size // 4)}
    update |= {} if fanouts is None else {"fanouts": fanouts, "num_neighbors": None}
    return config.model_copy(update=update)


def sample_split(run: Run, split: Split, num_epochs: int) -> Trace:
    """Sample into `run/<split>/trace`."""
    return sample_trace(
        run.graph,
        run.path / split / "trace",
        sample_config(run, split),
        split=split,
        shuffle=split == "train",
        num_epochs=num_epochs,
        host_memory=int(run.budgets.host_bytes * _SAMPLE_MEMORY_SHARE),
        threads=run.threads,
        progress=run.progress,
    )


def split_budgets(run: Run, split: Split) -> Budgets:
    """What a split's packs and feed may use."""
    budgets = run.budgets
    if not run.evaluated_splits:
        return budgets
    share = _EVALUATION_DISK_SHARE * len(run.evaluated_splits)
    if split == "train":
        return replace(budgets, disk_bytes=int(budgets.disk_bytes * (1 - share)))
    disk_bytes = int(budgets.disk_bytes * _EVALUATION_DISK_SHARE)
    return Budgets(device_bytes=0, host_bytes=run.evaluation_bytes, disk_bytes=disk_bytes)


def train_epochs(run: Run) -> int:
    """Epochs of training that are sampled ahead; a rolling run plans by one and samples each anew."""
    return 1 if run.config.plan.mode == "rolling" else min(run.config.sampled_epochs, run.config.train.epochs)


def plan_split(run: Run, split: Split) -> tuple[Trace, Plan]:
    """Sample and plan; `plan.json` has the summary."""
    trace = sample_split(run, split, train_epochs(run) if split == "train" else 1)
    config = run.config.plan
    if split != "train":
        config = PlanConfig(policy="none", mode="reuse", row_dtype=config.row_dtype)
    folder = run.path / split
    plan = plan_packs(
        run.graph,
        trace,
        config,
        split_budgets(run, split),
        disk_rates=run.disk_rates,
        scratch=folder / "plan",
        progress=run.progress,
    )
    assert plan.summary is not None, "only the windows of a rolling producer have no summary"
    write_json(folder / "plan.json", asdict(plan.summary))
    return trace, plan


def read_summary(path: Path) -> PlanSummary:
    """Read a `plan.json`."""
    value = read_json(path)
    return PlanSummary(**{**value, "disk_rates": DiskRates(**value["disk_rates"])})


def plan_train(run: Run) -> PlanSummary:
    """The plan of training, made now unless the packs that follow it are there."""
    folder = run.path / "train"
    if is_complete(folder / "packs"):
        return read_summary(folder / "plan.json")
    _, plan = plan_split(run, "train")
    assert plan.summary is not None
    return plan.summary


def pack_split(run: Run, split: Split) -> Prepared:
    """Sample, plan and pack a split, or find that it is done; the trace and the plan's scratch are deleted after.

    Where the plan is to roll, nothing is packed here: the producer does, while training reads.
    """
    folder = run.path / split
    packs = folder / "packs"
    if not is_complete(packs):
        trace, plan = plan_split(run, split)
        if plan.mode == "reuse":
            host_bytes = split_budgets(run, split).host_bytes
            write_packs(plan, run.graph, trace, packs, host_memory=host_bytes, progress=run.progress)
    for scratch in ("trace", "plan"):
        shutil.rmtree(folder / scratch, ignore_errors=True)
    return Prepared(packs=packs, summary=read_summary(folder / "plan.json"))
