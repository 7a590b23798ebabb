"""From splits to packs: sample, plan, pack, each split in a folder of the run, each step skipped when done.

Training cycles the packs of a few sampled epochs, or follows a rolling producer. Evaluation packs once and reads in
order, without a host tier. All splits are planned before any is packed, so what cannot fit is found at the start.

A split's folder is made of a graph and of how it is sampled: of another it is made anew. Under other budgets complete
packs stay where they fit, all else is planned again; the items are the same.
"""

import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from penstock.claims import claim, made_of
from penstock.config import RunConfig
from penstock.engine.exact import require_exact_memory
from penstock.engine.models import needs_degrees
from penstock.packed import packs_fit, read_plan
from penstock.remedies import with_remedy
from penstock.run import Run, make_model
from penstock.sampled_memory import LargestItem, PlannedSplit, forecast_sampled, largest_item
from penstock.sampler.estimate import PlanSummary
from penstock.sampler.neighbors import SampleConfig, count_items, sample_trace
from penstock.sampler.packer import require_packing_memory, write_packs
from penstock.sampler.pass_layout import packing_bytes
from penstock.sampler.plan import Plan, PlanConfig, plan_packs
from penstock.storage.budget import Budgets, format_bytes, total_memory, trim_heap
from penstock.storage.deal import Deal
from penstock.storage.errors import DoesNotFit, FormatError
from penstock.storage.graph import Split
from penstock.storage.manifest import is_published, read_json, write_json
from penstock.storage.pack import is_complete
from penstock.storage.trace import Trace

logger = logging.getLogger(__name__)

_SAMPLE_MEMORY_SHARE = 0.5  # sampling holds windows and scratch tables; the topology itself is mapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A planned split; its packs are complete unless `summary.mode` is rolling."""

    packs: Path
    summary: PlanSummary
    memory: dict[str, Any] | None = None


def sample_config(config: RunConfig, split: Split) -> SampleConfig:
    """How a split is sampled; evaluation may have fanouts of its own, and items of a quarter of the size.

    Without a host tier all rows of an item are in its extent, so a smaller item keeps it within evaluation's share.
    """
    sampler = config.sampler.model_copy(update={"degrees": config.sampler.degrees or needs_degrees(config.model)})
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a split is sampled, and how many epochs of it."""

    config: SampleConfig
    epochs: int


def sampling_of(run: Run, split: Split) -> Sampling:
    """As the run needs it; or as the folder has it where that has more, of which the run then uses a part: those of the
    sampled epochs that training ends before, degrees that the model does not read.

    It depends on what the folder says of itself and on the configuration alone, so that all steps see the same.
    """
    config, epochs = sample_config(run.config, split), train_epochs(run) if split == "train" else 1
    there = made_of(run.path / split)
    if there.get("degrees") is True:
        config = config.model_copy(update={"degrees": True})
    cycles = run.config.train.epochs > epochs or run.config.plan.mode == "rolling"
    found = int(there.get("epochs", 0))
    if split == "train" and not cycles and epochs < found <= run.config.sampled_epochs:
        epochs = found
    return Sampling(config=config, epochs=epochs)


def sample_split(run: Run, split: Split) -> Trace:
    """Sample into `run/<split>/trace`."""
    is_done = is_published(run.path / split / "trace")
    sampling = sampling_of(run, split)
    with _of_whole(_SAMPLE_MEMORY_SHARE * _share(run, "train")), run.timings.during("sample"):
        trace = sample_trace(
            run.graph,
            run.path / split / "trace",
            sampling.config,
            split=split,
            shuffle=split == "train",
            num_epochs=sampling.epochs,
            deal=deal_of(run, split),
            host_memory=int(run.train_host_bytes * _SAMPLE_MEMORY_SHARE),
            threads=run.threads,
            progress=run.labelled(split),
        )
    logger.info("%s %s: %d items", "reused what was sampled of" if is_done else "sampled", split, trace.meta.num_items)
    return trace


def _share(run: Run, split: Split) -> float:
    """Of the host memory, see `_host_share`."""
    evaluation = run.config.evaluate.memory_share if run.evaluates else 0.0
    return 1.0 - evaluation if split == "train" else evaluation


@contextmanager
def _of_whole(share: float) -> Iterator[None]:
    """Let a step that had a share of the host memory say what the whole has to be."""
    try:
        yield
    except DoesNotFit as error:
        whole = None if error.host_bytes is None else math.ceil(error.host_bytes / share) + 1
        raise DoesNotFit(str(error), host_bytes=whole, disk_bytes=error.disk_bytes) from error


def train_budgets(run: Run) -> Budgets:
    """What training may use: the run's budgets, less what evaluation keeps."""
    kept = sum(read_summary(run, s).disk_needed_bytes for s in run.evaluated_splits if _has_plan(run, s))
    disk_bytes = max(0, run.budgets.disk_bytes - kept)
    return replace(run.budgets, host_bytes=run.train_host_bytes, disk_bytes=disk_bytes)


def read_planned(run: Run, split: Split) -> PlannedSplit:
    """What is known of a split that has been planned."""
    largest = read_json(run.path / split / "plan.json", keys=("largest_item",))["largest_item"]
    return PlannedSplit(summary=read_summary(run, split), largest=LargestItem.from_json(largest))


def read_summary(run: Run, split: Split) -> PlanSummary:
    """The summary of a split that has been planned."""
    return read_plan(run.path / split)


def read_memory(run: Run, split: Split) -> dict[str, Any] | None:
    """What the process was predicted to take, see `Forecast.to_json`; known of training."""
    value: dict[str, Any] | None = read_json(run.path / split / "plan.json").get("memory")
    return value


def _write_forecast(run: Run, plans: Iterable[Plan]) -> None:
    """Predict the process, once training and evaluation are planned, into training's `plan.json`.

    DoesNotFit where this container cannot hold it.
    """
    planned = [split for split in own_splits(run) if (run.path / split / "plan.json").is_file()]
    path = run.path / "train" / "plan.json"
    packing = max(packing_bytes(plan, run.budgets.host_bytes) for plan in plans)
    forecast = forecast_sampled(run, {split: read_planned(run, split) for split in ("train", *planned)}, packing)
    write_json(path, {**read_json(path), "memory": forecast.to_json()})
    forecast.check(run.budgets.host_bytes, total_memory())


def _plan_config(run: Run, split: Split) -> PlanConfig:
    config = run.config.plan
    return config if split == "train" else PlanConfig(policy="none", mode="reuse", row_dtype=config.row_dtype)


def claim_split(run: Run, split: Split) -> None:
    """Make sure that what the split's folder holds is of this graph, sampled so, and planned within these budgets."""
    sampling, deal = sampling_of(run, split), deal_of(run, split)
    wanted = {
        "graph": run.graph.fingerprint,
        "epochs": sampling.epochs,
        "fanouts": list(sampling.config.layer_fanouts),
        "deal": None if deal is None else asdict(deal),
        **sampling.config.model_dump(mode="json", exclude={"fanouts", "num_neighbors", "mode"}),
    }
    config, folder = _plan_config(run, split), run.path / split
    if (folder / "plan.json").is_file() and config.mode not in ("auto", read_summary(run, split).mode):
        (folder / "plan.json").unlink()
        shutil.rmtree(folder / "packs", ignore_errors=True)
    under = {"policy": config.policy, "row_dtype": config.row_dtype, "share": _host_share(run, split)}
    still_good = partial(_still_fits, run, split)
    claim(folder, wanted, under | asdict(run.budgets), kept=("trace",), still_good=still_good)


def _host_share(run: Run, split: Split) -> int:
    return run.train_host_bytes if split == "train" else run.evaluation_bytes


def _still_fits(run: Run, split: Split) -> bool:
    """Whether complete packs of a split may be used as they are."""
    budgets = replace(run.budgets, host_bytes=_host_share(run, split))
    return packs_fit(run.path / split, run.graph, _plan_config(run, split), budgets)


def _plan_split(run: Run, split: Split) -> tuple[Trace, Plan]:
    trace, config = sample_split(run, split), _plan_config(run, split)
    if split == "train":
        budgets = train_budgets(run)
    else:
        budgets = replace(run.budgets, device_bytes=0, host_bytes=run.evaluation_bytes)
    folder = run.path / split
    with _of_whole(_share(run, split)), run.timings.during("plan"):
        plan = plan_packs(
            run.graph,
            trace,
            config,
            budgets,
            disk_rates=run.disk_rates,
            scratch=folder / "plan",
            progress=run.labelled(split),
        )
    assert plan.summary is not None, "only the windows of a rolling producer have no summary"
    planned = {**asdict(plan.summary), "split": split, "largest_item": asdict(largest_item(trace))}
    write_json(folder / "plan.json", planned)
    read = format_bytes(plan.summary.read_bytes_per_epoch)
    logger.info("planned %s: %s, policy %s, %s read per epoch", split, plan.mode, config.policy, read)
    return trace, plan


def does_not_fit(run: Run, error: DoesNotFit) -> DoesNotFit:
    """Say what the whole run needs, of an error of training's share."""
    problem, use = str(error).partition("; use ")[0], []
    host, disk = error.host_bytes, error.disk_bytes
    if host is not None:
        host = math.ceil(host / _share(run, "train")) + 1
        use.append(f"--host-memory {host} or more")
    if disk is not None:
        disk += run.budgets.disk_bytes - train_budgets(run).disk_bytes
        use.append(f"--disk {disk} or more")
    return DoesNotFit(f"{problem}; use {' and '.join(use)}", host_bytes=host, disk_bytes=disk) if use else error


def _do_not_fit(run: Run, errors: dict[Split, DoesNotFit]) -> DoesNotFit:
    """What all splits lack together."""
    kept = sum(read_summary(run, s).disk_needed_bytes for s in run.evaluated_splits if _has_plan(run, s))
    host = [error.host_bytes for error in errors.values() if error.host_bytes is not None]
    disk = [error.disk_bytes for error in errors.values() if error.disk_bytes is not None]
    problems = "; ".join(f"{split} items: {str(error).partition('; use ')[0]}" for split, error in errors.items())
    return DoesNotFit(problems, host_bytes=max(host, default=None), disk_bytes=sum(disk) + kept if disk else None)


def _has_plan(run: Run, split: Split) -> bool:
    return (run.path / split / "plan.json").is_file()


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
    """Sample and plan those of `splits` whose packs are not complete; DoesNotFit names budgets with which all can be
    packed and fed."""
    splits = tuple(splits)
    return with_remedy(run, lambda: _plan_all(run, splits))


def _plan_all(run: Run, splits: Iterable[Split]) -> dict[Split, tuple[Trace, Plan]]:
    plans: dict[Split, tuple[Trace, Plan]] = {}
    errors: dict[Split, DoesNotFit] = {}
    for split in splits:
        claim_split(run, split)
        if _is_planned(run.path / split):
            logger.info("reused %s: it is sampled, planned and packed already", run.path / split)
            continue
        try:
            plans[split] = _plan_split(run, split)
        except DoesNotFit as error:
            errors[split] = error
    if errors:
        raise _do_not_fit(run, errors)
    for _, plan in plans.values():
        require_packing_memory(plan, run.budgets.host_bytes)
    if run.evaluates and run.config.evaluate.mode == "exact":
        targets = np.concatenate([run.graph.split_ids(split) for split in run.labelled_splits])
        with _of_whole(run.config.evaluate.memory_share):
            require_exact_memory(make_model(run), run.graph, host_memory=run.evaluation_bytes, targets=targets)
    if "train" in plans:
        run.graph.drop_mapped()  # sampling has read it all; what follows reads little of it
        trim_heap()
        _write_forecast(run, [plan for _, plan in plans.values()])
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
            with run.timings.during("pack"):
                show = run.labelled(split)
                write_packs(plan, run.graph, trace, folder / "packs", host_memory=host_bytes, progress=show)
            logger.info("packed %s into %s", split, folder / "packs")
        for scratch in ("trace", "plan"):
            shutil.rmtree(folder / scratch, ignore_errors=True)
        prepared[split] = Prepared(
            packs=folder / "packs", summary=read_summary(run, split), memory=read_memory(run, split)
        )
    return prepared
