"""From splits to packs: sample, plan, pack, each split in a folder of the run, each step skipped when done.

Training cycles the packs of a few sampled epochs, or follows a rolling producer. Evaluation packs once and reads in
order, without a host tier. All splits are planned before any is packed, so what cannot fit is found at the start.

A split's folder is made of a graph and of how it is sampled: of another it is made anew. Under other budgets complete
packs stay where they fit, all else is planned again; the items are the same.
"""

import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from penstock.claims import claim
from penstock.config import RunConfig
from penstock.engine.models import needs_degrees
from penstock.run import Run
from penstock.sampler.estimate import DiskRates, PlanSummary
from penstock.sampler.neighbors import SampleConfig, count_items, sample_trace
from penstock.sampler.packer import require_packing_memory, write_packs
from penstock.sampler.plan import Plan, PlanConfig, plan_packs
from penstock.storage.budget import Budgets, format_bytes
from penstock.storage.deal import Deal
from penstock.storage.errors import DoesNotFit, FormatError
from penstock.storage.graph import Split
from penstock.storage.manifest import read_json, write_json
from penstock.storage.pack import is_complete
from penstock.storage.trace import Trace

logger = logging.getLogger(__name__)

_SAMPLE_MEMORY_SHARE = 0.5  # sampling holds windows and scratch tables; the topology itself is mapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A planned split; its packs are complete unless `summary.mode` is rolling."""

    packs: Path
    summary: PlanSummary


def sample_config(config: RunConfig, split: Split) -> SampleConfig:
    """How a split is sampled; evaluation may have fanouts of its own, and items of a quarter of the size.

    Without a host tier all rows of an item are in its extent, so a smaller item keeps it within evaluation's share.
    """
    sampler = config.sampler.model_copy(update={"degrees": needs_degrees(config.model)})
    if split == "train":
        return sampler
    fanouts = config.evaluate.fanouts
    update: dict[str, Any] = {"batch_size": max(1, sampler.batch_size // 4)}
    update |= {} if fanouts is None else {"fanouts": fanouts, "num_neighbors": None}
    return sampler.model_copy(update=update)


def deal_of(run: Run, split: Split) -> Deal | None:
    """Which items of a split are this replica's, see `deal_items`."""
    items = count_items(run.graph, split, sample_config(run.config, split).batch_size)
    return deal_items(run.config, split, run.rank, run.replicas, items)


def deal_items(config: RunConfig, split: Split, rank: int, replicas: int, epoch_items: int) -> Deal | None:
    """Which of a split's items a replica gets; None where there is only one. ValueError where it gets none."""
    if replicas == 1:
        return None
    group_items = config.train.accumulate if split == "train" else replicas
    return Deal(replicas=replicas, rank=rank, group_items=group_items, epoch_items=epoch_items)


def own_splits(run: Run) -> tuple[Split, ...]:
    """The splits to evaluate of which this replica has items."""
    counts = {s: count_items(run.graph, s, sample_config(run.config, s).batch_size) for s in run.evaluated_splits}
    return tuple(split for split, count in counts.items() if count > run.rank)


def train_epochs(run: Run) -> int:
    """Epochs of training that are sampled ahead; a rolling run plans by one and samples each anew, in memory all."""
    config = run.config
    if config.plan.mode == "rolling":
        return config.train.epochs if config.feed == "memory" else 1
    return min(config.sampled_epochs, config.train.epochs)


def sample_split(run: Run, split: Split) -> Trace:
    """Sample into `run/<split>/trace`. DoesNotFit has the `host_bytes` that the whole run needs."""
    memory = int(run.train_host_bytes * _SAMPLE_MEMORY_SHARE)
    try:
        return sample_trace(
            run.graph,
            run.path / split / "trace",
            sample_config(run.config, split),
            split=split,
            shuffle=split == "train",
            num_epochs=train_epochs(run) if split == "train" else 1,
            deal=deal_of(run, split),
            host_memory=memory,
            threads=run.threads,
            progress=run.progress,
        )
    except DoesNotFit as error:
        if error.host_bytes is None:
            raise
        needed = math.ceil(error.host_bytes * run.budgets.host_bytes / memory) + 1
        raise DoesNotFit(
            f"--host-memory {format_bytes(run.budgets.host_bytes)} is too small to sample the {split} split in "
            f"sampling's share of it ({error}); use --host-memory {needed} or more"
        ) from error


def train_budgets(run: Run) -> Budgets:
    """What training may use: the run's budgets, less what evaluation keeps."""
    planned = [split for split in run.evaluated_splits if (run.path / split / "plan.json").is_file()]
    kept = sum(read_summary(run, split).disk_needed_bytes for split in planned)
    disk_bytes = max(0, run.budgets.disk_bytes - kept)
    return replace(run.budgets, host_bytes=run.train_host_bytes, disk_bytes=disk_bytes)


def read_summary(run: Run, split: Split) -> PlanSummary:
    """The summary of a split that has been planned."""
    value = read_json(run.path / split / "plan.json", keys=("disk_rates",))
    value.pop("split", None)
    return PlanSummary(**{**value, "disk_rates": DiskRates(**value["disk_rates"])})


def _plan_config(run: Run, split: Split) -> PlanConfig:
    config = run.config.plan
    return config if split == "train" else PlanConfig(policy="none", mode="reuse", row_dtype=config.row_dtype)


def claim_split(run: Run, split: Split) -> None:
    """Make sure that what the split's folder holds is of this graph, sampled so, and planned within these budgets."""
    sampled = sample_config(run.config, split).model_dump(mode="json", exclude={"fanouts", "num_neighbors", "mode"})
    deal = deal_of(run, split)
    made_of = {
        "graph": run.graph.fingerprint,
        "epochs": train_epochs(run) if split == "train" else 1,
        "fanouts": list(sample_config(run.config, split).layer_fanouts),
        "deal": None if deal is None else asdict(deal),
        **sampled,
    }
    config, folder = _plan_config(run, split), run.path / split
    if (folder / "plan.json").is_file() and config.mode not in ("auto", read_summary(run, split).mode):
        (folder / "plan.json").unlink()
        shutil.rmtree(folder / "packs", ignore_errors=True)
    under = {"policy": config.policy, "row_dtype": config.row_dtype, "share": _host_share(run, split)}
    still_good = partial(_still_fits, run, split)
    claim(folder, made_of, under | asdict(run.budgets), kept=("trace",), still_good=still_good)


def _host_share(run: Run, split: Split) -> int:
    return run.train_host_bytes if split == "train" else run.evaluation_bytes


def _still_fits(run: Run, split: Split) -> bool:
    """Whether complete packs of a split may be used as they are."""
    folder, config = run.path / split, _plan_config(run, split)
    if not is_complete(folder / "packs"):
        return False
    summary = read_summary(run, split)
    row_dtype = config.row_dtype or run.graph.meta.feature_dtype
    return (
        (summary.policy, summary.row_dtype) == (config.policy, row_dtype)
        and summary.host_needed_bytes <= _host_share(run, split)
        and 4 * run.graph.meta.num_features * summary.device_slots <= run.budgets.device_bytes
        and sum(file.stat().st_size for file in (folder / "packs").iterdir()) <= run.budgets.disk_bytes
    )


def _plan_split(run: Run, split: Split) -> tuple[Trace, Plan]:
    trace, config = sample_split(run, split), _plan_config(run, split)
    if split == "train":
        budgets = train_budgets(run)
    else:
        budgets = replace(run.budgets, device_bytes=0, host_bytes=run.evaluation_bytes)
    folder = run.path / split
    plan = plan_packs(
        run.graph,
        trace,
        config,
        budgets,
        disk_rates=run.disk_rates,
        scratch=folder / "plan",
        progress=run.progress,
    )
    assert plan.summary is not None, "only the windows of a rolling producer have no summary"
    write_json(folder / "plan.json", {**asdict(plan.summary), "split": split})
    return trace, plan


def does_not_fit(run: Run, errors: dict[Split, DoesNotFit]) -> DoesNotFit:
    """Say what the whole run needs; each split was planned within its share."""
    train = errors.get("train")
    if train is not None and train.disk_bytes is not None and len(errors) == 1:
        kept = run.budgets.disk_bytes - train_budgets(run).disk_bytes
        needed = train.disk_bytes + kept
        return DoesNotFit(
            f"--disk {format_bytes(run.budgets.disk_bytes)} is too small: training needs "
            f"{format_bytes(train.disk_bytes)}, evaluation {format_bytes(kept)}; use --disk {needed} or more, "
            "fewer sampled_epochs, a narrower row dtype or more --host-memory",
            disk_bytes=needed,
        )
    if any(error.host_bytes is None for error in errors.values()):
        return next(iter(errors.values()))
    whole = run.budgets.host_bytes
    shares = {"train": run.train_host_bytes / whole}
    needed = max(
        math.ceil((error.host_bytes or 0) / shares.get(split, run.config.evaluate.memory_share))
        for split, error in errors.items()
    )
    names = ", ".join(f"{split} items {format_bytes(error.host_bytes or 0)}" for split, error in errors.items())
    return DoesNotFit(
        f"--host-memory {format_bytes(whole)} is too small: feeding needs, for {names} "
        f"(evaluation has {run.config.evaluate.memory_share:.0%} of it); use --host-memory {needed} or more, "
        "a smaller batch size or smaller fanouts",
        host_bytes=needed,
    )


def _is_planned(folder: Path) -> bool:
    """Whether the packs are complete, or are to be rolled out while training reads."""
    plan = folder / "plan.json"
    if not plan.is_file():
        return False
    try:
        value = read_json(plan, keys=("mode",))
    except FormatError as error:
        logger.warning("planned anew: %s", error)
        return False
    if value.get("split", folder.name) != folder.name:
        logger.warning("planned anew: %s is of the %s split", plan, value["split"])
        return False
    return value["mode"] == "rolling" or is_complete(folder / "packs")


def plan_splits(run: Run, splits: Iterable[Split]) -> dict[Split, tuple[Trace, Plan]]:
    """Sample and plan those of `splits` whose packs are not complete; DoesNotFit says what all of them need."""
    plans: dict[Split, tuple[Trace, Plan]] = {}
    errors: dict[Split, DoesNotFit] = {}
    for split in splits:
        claim_split(run, split)
        if _is_planned(run.path / split):
            continue
        try:
            plans[split] = _plan_split(run, split)
        except DoesNotFit as error:
            errors[split] = error
    if errors:
        raise does_not_fit(run, errors)
    for _, plan in plans.values():
        require_packing_memory(plan, run.budgets.host_bytes)
    return plans


def prepare(run: Run, splits: Iterable[Split]) -> dict[Split, Prepared]:
    """Sample, plan and pack splits, or find that it is done; traces and the plans' scratch are deleted after.

    Where the plan is to roll, nothing is packed here: the producer does, while training reads.
    """
    splits = tuple(splits)
    return pack_splits(run, splits, plan_splits(run, splits))


def pack_splits(run: Run, splits: Iterable[Split], plans: Mapping[Split, tuple[Trace, Plan]]) -> dict[Split, Prepared]:
    """Pack splits as they were planned; those without a plan are packed already, or roll."""
    prepared = {}
    for split in splits:
        folder = run.path / split
        if split in plans and plans[split][1].mode == "reuse":
            trace, plan = plans[split]
            host_bytes = run.budgets.host_bytes  # all of it: nothing is fed yet
            write_packs(plan, run.graph, trace, folder / "packs", host_memory=host_bytes, progress=run.progress)
        for scratch in ("trace", "plan"):
            shutil.rmtree(folder / scratch, ignore_errors=True)
        prepared[split] = Prepared(packs=folder / "packs", summary=read_summary(run, split))
    return prepared
