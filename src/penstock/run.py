"""A run folder: sample, plan, pack and train composed, each step skipped when done and continued when cut off.

| in the folder, for all experiments | written by |
|---|---|
| `machine.json` | every verb: budgets and disk rates; what the user leaves open stays as it was found at first |
| `train/`, `valid/`, `test/` | sampled: trace (deleted once packed), plan.json and packs of a split |
| `chunks/`, `features/` | chunked: the cut graph, packs of the chunks' features |

| beside them, or in `experiments/NAME/` | written by |
|---|---|
| `config.yaml` | every verb that was accepted: the configuration as it is now |
| `ranks/`, `chunked.json` | chunked: scratch of the ranks, the ranks that were chosen |
| `checkpoints/`, `metrics.jsonl` | training |
| `model/`, `result.json`, `curves.png`, `schedule.png`, `report.html` | the end of training |
| `status.json` | what the process is at, while there is one |

Weights bind the place that they are in: with checkpoints or a finished result, another graph or configuration is
refused. What they are made from is kept where it was made of the same (see `claims`), and cleared where it was not. One
process at a time has the folder with all its experiments. Nothing is written before what was asked for has been checked
(see `preflight`).
"""

import logging
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from penstock.config import RunConfig
from penstock.disk_rates import disk_rates
from penstock.engine.checkpoint import delete_checkpoints
from penstock.engine.models import build_model
from penstock.engine.trainer import Stopped, seed_step
from penstock.host_budget import choose_host_bytes
from penstock.identity import (
    SOURCE,
    Keys,
    Trained,
    changed_code,
    code_of,
    has_all_epochs,
    identity_of,
    read_trained,
    require_same,
    settle,
)
from penstock.preflight import check, has_labels
from penstock.process_memory import process_bytes, unloaded_bytes
from penstock.remote_run import bring_back, held_run, mirrored_run, staged_dataset
from penstock.report import write_config
from penstock.sampler.estimate import DiskRates
from penstock.status import Status
from penstock.storage.budget import Budgets, default_budgets, num_threads, total_memory
from penstock.storage.errors import InUse
from penstock.storage.graph import GraphMeta, GraphStore, Split, open_graph
from penstock.storage.manifest import read_json, write_json
from penstock.storage.progress import Progress, silent
from penstock.storage.remote.hostlock import describe_owner, flocked
from penstock.timings import Timings

logger = logging.getLogger(__name__)

_MACHINE = "machine.json"
_TRAINING = ("train", "epoch", "valid", "test", "refresh")  # stages within training, which ends itself
Item = TypeVar("Item")
_SHARED = ("train", "valid", "test", "chunks", "features", "local")
_RESULTS = ("exact", "sampled", "checkpoints", "model", "ranks", "tensorboard", "tracking", "wandb")
_RESULT_FILES = (
    *("config.yaml", "metrics.jsonl", "result.json", "curves.png", "chunked.json", "schedule.png"),
    *("timeline.json", "status.json", "report.html"),
)


class Run:
    """An open run folder; made by `open_run`, which holds its lock. A replica has one of its own on its host."""

    def __init__(
        self,
        config: RunConfig,
        graph: GraphStore,
        progress: Progress,
        stop_requested: threading.Event,
        *,
        rank: int = 0,
        replicas: int = 1,
        trained: Trained | None = None,
        empty_bytes: int | None = None,
        status: Status | None = None,
        host_bytes: int | None = None,
    ) -> None:
        self.rank, self.replicas, self.trained = rank, replicas, trained
        self.process_bytes = process_bytes(config.mode) if empty_bytes is None else empty_bytes
        self.untrained_bytes = self.process_bytes - unloaded_bytes()  # before training loads what it needs
        self.config, self.graph, self._show = config, graph, progress
        self.path, self.results = config.run_dir, config.results_dir
        self.timings, self.status = Timings(), status
        self.threads = config.train.threads or num_threads()
        self.stop_requested = stop_requested
        self.budgets, self.disk_rates = _resolve_machine(config, graph, self.process_bytes, host_bytes)

    def identity(self, **chosen: Any) -> Keys:
        """What the weights of this run depend on; `chosen` has what `auto` came to, under dotted keys."""
        if self.trained is None:
            code = code_of(self.config)
        else:  # as the weights began with it
            code = {key: value for key, value in self.trained.keys.items() if key == SOURCE}
        return identity_of(self.config, self.graph, {**chosen, **code})

    def model_facts(self) -> dict[str, Any]:
        """What is kept with a trained model: its graph, and a user's code as it was at the end."""
        return {"graph": self.graph.fingerprint, **code_of(self.config)}

    def progress(self, stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        """Show how far a step is, and end it if the run was asked to stop; it continues where it is.

        Training itself is not ended here: the trainer writes a checkpoint first.
        """
        self._show(stage, done, total, unit, **numbers)
        if self.status is not None:
            self.status(stage, done, total, unit, **numbers)
        if stage not in _TRAINING and self.stop_requested.is_set():
            raise Stopped(f"stopped in step {stage!r}; run the same command again to continue")

    def labelled(self, split: str) -> Progress:
        """`progress` of a split: its stages are called after it, `sample valid`."""

        def show(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
            self.progress(f"{stage} {split}", done, total, unit, **numbers)

        return show

    def batches(self, split: Split, feed: Iterable[Item], total: int) -> Iterator[Item]:
        """Hand on what is scored of a split, and show how far it is."""
        for done, batch in enumerate(feed, start=1):
            yield batch
            self.progress(split, done, total, "items")

    def poll(self) -> None:
        """End a wait that has no progress to show, as that for room in a cluster, if the run was asked to stop."""
        if self.stop_requested.is_set():
            raise Stopped("stopped while waiting; run the same command again to continue")

    @property
    def evaluated_splits(self) -> tuple[Split, ...]:
        """Splits that are sampled for evaluation: those that have labels, if there is one and the user wants it so."""
        return self.labelled_splits if self.evaluates and self.config.evaluate.mode == "sampled" else ()

    @cached_property
    def labelled_splits(self) -> tuple[Split, ...]:
        """Splits to evaluate on."""
        splits: tuple[Split, ...] = ("valid", "test")
        return tuple(split for split in splits if has_labels(self.graph, split))

    @property
    def evaluates(self) -> bool:
        """Whether there is a valid split to evaluate on, and the user wants it."""
        return self.config.evaluate.mode != "none" and "valid" in self.labelled_splits

    @property
    def evaluation_bytes(self) -> int:
        """Host memory that evaluation may use while the training feed is open."""
        return int(self.budgets.host_bytes * self.config.evaluate.memory_share) if self.evaluates else 0

    @property
    def train_host_bytes(self) -> int:
        """Host memory of the rest."""
        return self.budgets.host_bytes - self.evaluation_bytes


def make_model(run: Run) -> nn.Module:
    """Build the model with initial weights that depend on the seed alone."""
    return initial_model(run.config, run.graph.meta)


def initial_model(config: RunConfig, meta: GraphMeta) -> nn.Module:
    """The same for a graph that is not on this host."""
    seed_step(config.train.seed, -1, torch.device("cpu"))
    return build_model(config.model, meta.num_features, meta.num_classes)


def _read_machine(folder: Path) -> dict[str, Any]:
    """What an earlier verb found in this folder; nothing where there was none."""
    path = folder / _MACHINE
    if not path.is_file():
        return {}
    remedy = "delete it and run the same command again: what was left open is measured anew"
    value: dict[str, Any] = read_json(path, remedy, keys=("disk_rates",))
    return value


def _resolve_machine(
    config: RunConfig, graph: GraphStore, process_bytes: int, host_bytes: int | None
) -> tuple[Budgets, DiskRates]:
    """Budgets and disk rates of the run. What the user leaves open stays as `machine.json` has it: it follows from what
    was free when the run began, which is not what is free now, and a resumed run must plan the same. `host_bytes` has
    been chosen already where it is given.
    """
    path = config.run_dir / _MACHINE
    there = _read_machine(config.run_dir)
    found: dict[str, int] = there.get("found", {})  # budgets that nobody gave
    given, device = config.budgets, torch.device(config.train.device)
    device_bytes = found.get("device_bytes") if given.device_memory is None else given.device_memory
    # who drives ranks on other machines may have no GPU itself
    if device_bytes is None and device.type == "cuda" and torch.cuda.is_available():
        device_bytes = torch.cuda.mem_get_info(device)[0] // 2  # the other half is the model's
    if given.host_memory is None:
        host_bytes = found.get("host_bytes") or host_bytes
    budgets = default_budgets(
        config.run_dir,
        device_bytes=device_bytes,
        host_bytes=host_bytes or choose_host_bytes(config, graph, process_bytes, total_memory()),
        disk_bytes=found.get("disk_bytes") if given.disk is None else given.disk,
    )
    rates = DiskRates(**there["disk_rates"]) if there else disk_rates(config.run_dir)
    is_given = {"device_bytes": given.device_memory, "host_bytes": given.host_memory, "disk_bytes": given.disk}
    found |= {key: value for key, value in asdict(budgets).items() if is_given[key] is None}
    write_json(path, {"found": found, "budgets": asdict(budgets), "disk_rates": asdict(rates)})
    return budgets, rates


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; InUse names the process that has it, its host, and since when."""
    with ExitStack() as stack:
        try:
            left = stack.enter_context(flocked(folder / ".lock"))
        except BlockingIOError as error:
            raise InUse(
                f"{folder} is in use by {error}; wait for it (its experiments take turns), or choose another --run-dir"
            ) from None
        if left and socket.gethostname() not in left:
            # flock is kept among the processes of a host; some shared file systems keep it no further
            logger.warning(
                "%s was in use by %s, which did not end cleanly; if it is still at work there, stop it",
                folder,
                describe_owner(left),
            )
        yield


def _forget(config: RunConfig) -> None:
    """Delete results, and unless they are of one experiment among others, what they were made from."""
    for name in _RESULTS:
        shutil.rmtree(config.results_dir / name, ignore_errors=True)
    for name in _RESULT_FILES:
        (config.results_dir / name).unlink(missing_ok=True)
    if config.experiment is not None:
        return
    for name in _SHARED:
        shutil.rmtree(config.run_dir / name, ignore_errors=True)
    (config.run_dir / _MACHINE).unlink(missing_ok=True)
    shutil.rmtree(config.work_dir, ignore_errors=True)


def _forget_weights(folder: Path) -> None:
    """Make the folder nobody's; its packs may be of use, and its model is until there is another."""
    (folder / "result.json").unlink(missing_ok=True)  # first: a finished run without checkpoints would be none
    delete_checkpoints(folder / "checkpoints")


@contextmanager
def open_run(
    config: RunConfig,
    *,
    force: bool = False,
    resume: bool = True,
    if_changed: bool = False,
    progress: Progress = silent,
    stop_requested: threading.Event | None = None,
) -> Iterator[Run]:
    """Open or make the run folder; where dataset or run are at URIs, work on local copies and mirror the run's.

    InUse where another process has it; ValueError where what was asked for cannot work, DoesNotFit where there is no
    memory for it (both before anything is written); ValueError, too, where weights are there that were made of another
    graph or configuration (saying what differs); without `resume` weights are deleted, with `if_changed` those of
    something else, with `force` all that is there, or of an experiment its results. FormatError where the dataset is
    none.
    """
    stop = stop_requested or threading.Event()
    empty_bytes = process_bytes(config.mode)  # before checks load some of the kernels that it counts as to be loaded
    with staged_dataset(config, progress, stop):
        graph = open_graph(config.dataset)
        check(config, graph)
        found = {} if force else _read_machine(config.run_dir).get("found", {})
        known = config.budgets.host_memory is None and "host_bytes" in found
        host_bytes = None if known else choose_host_bytes(config, graph, empty_bytes, total_memory())
        config.results_dir.mkdir(parents=True, exist_ok=True)
        with _locked(config.run_dir), held_run(config, stop) as lock:
            if force:
                _forget(config)
            bring_back(config, anew=force or not resume)
            config, trained = _take_up(config, graph, resume=resume, if_changed=if_changed)
            write_config(config.results_dir / "config.yaml", config, graph.fingerprint)
            with mirrored_run(config, lock), closing(Status(config.results_dir)) as status:
                yield Run(
                    config,
                    graph,
                    progress,
                    stop,
                    trained=trained,
                    empty_bytes=empty_bytes,
                    host_bytes=host_bytes,
                    status=status,
                )


def _tell_changed_code(config: RunConfig, trained: Trained, *, if_changed: bool) -> None:
    """Warn where a user's code is not the one that weights began with; ValueError where that is to train anew."""
    changed = changed_code(config, trained)
    if changed is None:
        return
    if if_changed:
        raise ValueError(changed)
    is_done = has_all_epochs(config, trained)
    so = "its result is of the code before" if is_done else "training goes on with the code as it is now"
    logger.warning("%s; %s. To train anew with it: --resume=false, which keeps the packs", changed, so)


def _take_up(
    config: RunConfig, graph: GraphStore, *, resume: bool, if_changed: bool
) -> tuple[RunConfig, Trained | None]:
    """The configuration as weights that are there settle it, and those weights, unless they are not wanted any more."""
    trained = read_trained(config.results_dir)
    try:
        if trained is not None and resume:
            settled = settle(config, trained)
            require_same(settled, graph, trained)
            _tell_changed_code(settled, trained, if_changed=if_changed)
            return settled, trained
    except ValueError as error:
        if not if_changed:
            raise
        logger.warning("%s; training anew", error)
        bring_back(config, anew=True)
    if trained is not None:
        _forget_weights(config.results_dir)
    return settle(config, None), None
