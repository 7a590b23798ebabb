"""The main job: prepare, feed, train, evaluate, report."""

import logging
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from penstock.chunked_training import train_chunked
from penstock.config import RunConfig
from penstock.curves import draw_curves
from penstock.engine.evaluate import evaluate_exact, evaluate_feed
from penstock.engine.feed import open_pack_feed
from penstock.engine.metrics import Metrics
from penstock.engine.modelfile import save_model
from penstock.engine.outputs import Outputs
from penstock.engine.trainer import Stopped, Trainer, TrainResult
from penstock.epochs import OnEpoch
from penstock.feeds import TrainFeed, open_train_feed
from penstock.identity import Keys, has_all_epochs
from penstock.locations import require_writable
from penstock.observation import Observation, observed
from penstock.prepare import Prepared, prepare
from penstock.remote_run import reopen
from penstock.replicated_training import train_replicated
from penstock.report import copy_result, write_result
from penstock.run import Run, make_model, open_run
from penstock.sampler.row_source import read_row_error
from penstock.stopping import soft_interrupt
from penstock.storage.errors import DataError, DoesNotFit
from penstock.storage.graph import Split
from penstock.storage.paths import AnyPath
from penstock.storage.progress import Progress
from penstock.storage.spans import TRACE
from penstock.summary import Result
from penstock.timings import timings_section
from penstock.watching import Show, shown

logger = logging.getLogger(__name__)


class Evaluation:
    """Scores a model on splits: on packs of sampled items, or exactly over all neighbours."""

    def __init__(self, run: Run, packs: Mapping[Split, Prepared]) -> None:
        self._run, self._packs = run, packs

    def __call__(self, model: nn.Module, splits: tuple[Split, ...]) -> dict[str, Metrics]:
        """Metrics by split."""
        with TRACE.during("evaluate", " and ".join(splits)):
            return self._score(model, splits)

    def _score(self, model: nn.Module, splits: tuple[Split, ...]) -> dict[str, Metrics]:
        run = self._run
        if run.config.evaluate.mode == "sampled":
            return {split: self._sampled(model, split) for split in splits}
        found = evaluate_exact(
            model,
            run.graph,
            splits,
            run.results / "exact" / "train",
            host_memory=run.evaluation_bytes,
            threads=run.threads,
            device=run.config.train.device,
            progress=run.labelled(" and ".join(splits)),
        )
        return {split: metrics for split, metrics in found.items()}

    def _sampled(self, model: nn.Module, split: Split) -> Metrics:
        run, prepared = self._run, self._packs[split]
        with open_pack_feed(
            prepared.packs,
            run.graph,
            start_step=0,
            stop_step=prepared.summary.num_items,
            host_memory=run.evaluation_bytes,
            device=run.config.train.device,
            threads=run.threads,
        ) as feed:
            batches = run.batches(split, feed, prepared.summary.num_items)
            return evaluate_feed(model, batches, run.graph.meta.num_classes)


def _run_trainer(
    run: Run, feed: TrainFeed, evaluation: Evaluation, model: nn.Module, identity: Keys, watch: Observation
) -> TrainResult:
    trainer = Trainer(
        model,
        run.config.train,
        items_per_epoch=feed.items_per_epoch,
        checkpoints=run.results / "checkpoints",
        metrics=run.results / "metrics.jsonl",
        evaluate=(lambda trained: evaluation(trained, ("valid",))) if run.evaluates else None,
        identity={"run": identity},
        stop_requested=run.stop_requested,
        progress=lambda *place, **numbers: run.progress(*place, **numbers, **feed.numbers()),
        record=watch.record,
    )
    watch.training_begins(evaluates=run.evaluates)
    return trainer.run(feed.open)


def _metrics(run: Run, trained: TrainResult, final: Mapping[str, Metrics]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for split, metrics in final.items():
        found |= metrics.to_json(f"{split}_")
    return {
        **found,
        "train_losses": list(trained.losses),
        "epochs": trained.epochs,
        "steps": trained.steps,
        "best_epoch": trained.best_epoch,
        "stopped_early": trained.stopped_early,
        "feature_bytes": run.graph.feature_bytes,
        "host_memory_bytes": run.budgets.host_bytes,
    }


def _movement(feed: TrainFeed, stall_s: float) -> dict[str, Any]:
    """What was read, from where, and what the trainer waited for; of this process, not of those it continued."""
    stats = feed.stats()
    if stats is None:
        return {}
    summary = None if feed.prepared is None else feed.prepared.summary
    error = None if feed.prepared is None else read_row_error(feed.prepared.packs)
    rows = stats.device_rows + stats.host_rows + stats.pack_rows
    useful = rows * summary.row_bytes if summary else 0
    return {
        "bytes_read": stats.bytes_read,
        "read_amplification": stats.bytes_read / useful if useful else None,
        "hit_rates": stats.hit_rates,
        "stalls": {"stall_s": stall_s, "read_s": stats.read_s, "assemble_s": stats.assemble_s},
        "plan": None if summary is None else asdict(summary),
        "memory": feed.memory,
        "row_error": None if error is None else asdict(error),
    }


def _job(run: Run, result_json: Path | str | None, watch: Observation) -> dict[str, Any]:
    if run.config.mode == "chunked" or run.config.has_replicas:
        chunked = run.config.mode == "chunked"
        sections = (train_chunked if chunked else train_replicated)(run, watch)
        return write_result(run.results / "result.json", status="ok", config=run.config, copy=result_json, **sections)
    shutil.rmtree(run.config.work_dir, ignore_errors=True)  # packs of this run with replicas would fill the disk
    in_memory = run.config.feed == "memory"
    packs = prepare(run, run.evaluated_splits if in_memory else (*run.evaluated_splits, "train"))
    evaluation, model = Evaluation(run, packs), make_model(run)
    feed = open_train_feed(run, packs.get("train"))
    identity = run.identity(**({} if in_memory else {"plan.mode": packs["train"].summary.mode}))
    prepare_s, steps = run.timings.total_s, dict(run.timings.spent)
    trained = _run_trainer(run, feed, evaluation, model, identity, watch)
    began_s = run.timings.total_s
    final = evaluation(model, run.labelled_splits) if run.evaluates else {}
    test_s = run.timings.total_s - began_s
    around_s = began_s - prepare_s - sum(trained.times.values())
    times = {**trained.times, "start": trained.times["start"] + around_s}
    meta, config = run.graph.meta, run.config
    save_model(
        run.results / "model",
        model,
        config.model,
        num_features=meta.num_features,
        num_classes=meta.num_classes,
        fanouts=config.sampler.layer_fanouts,
        outputs=Outputs.of(run.graph),
        extra=run.model_facts(),
    )
    draw_curves(run.results, run.config.train.metric)
    artefacts = ("model", "metrics.jsonl", "curves.png", "config.yaml", "checkpoints")
    return write_result(
        run.results / "result.json",
        status="ok",
        config=config,
        graph=run.graph.fingerprint,
        identity=identity,
        metrics=_metrics(run, trained, final),
        copy=result_json,
        artefacts={name: str((run.results / name).resolve()) for name in artefacts},
        timings=timings_section(
            total_s=run.timings.total_s, prepare_s=prepare_s, steps=steps, train=times, test_s=test_s
        ),
        throughput={"items_per_s": trained.items_per_s, "seeds_per_s": trained.seeds_per_s},
        resumed_from=trained.resumed_from,
        **_movement(feed, trained.times["stall"]),
    )


def _finished(run: Run, result_json: Path | str | None) -> dict[str, Any] | None:
    """The result of a run that has nothing left to do; one that is to go on for more epochs loses it."""
    trained = run.trained
    if trained is None or trained.result is None:
        return None
    if not has_all_epochs(run.config, trained):
        reopen(run.config)
        return None
    if result_json is not None:
        copy_result(run.results / "result.json", result_json)
    return {**trained.result, "already_done": True}


def _report_failure(run: Run, error: BaseException, result_json: Path | str | None) -> None:
    status = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
    path = run.results / "result.json"
    try:
        write_result(path, status=status, config=run.config, metrics={}, copy=result_json, error=error)
    except (DataError, DoesNotFit, OSError) as second:  # the disk that the error is about may be full
        logger.warning("%s could not be written: %s", path, second)


def train(
    config: RunConfig,
    *,
    force: bool = False,
    resume: bool = True,
    if_changed: bool = False,
    result_json: AnyPath | None = None,
    progress: Show = None,
    on_epoch: OnEpoch | None = None,
    stop_requested: threading.Event | None = None,
) -> Result:
    """Train what a configuration describes, in its run folder, and return what `result.json` there says.

        config = penstock.load_config(flags={"dataset": "papers.graph", "run_dir": "runs/papers", "train.epochs": 20})
        result = penstock.train(config)
        result["metrics"]["test_accuracy"]

    Samples, plans, packs, trains, evaluates and saves the model (`penstock.load_model`, `penstock.infer`), each step
    only where it is not done already. The same call on a run that is finished returns its result, with `already_done`;
    on one that was cut off, or is to have more epochs, it goes on, to the weights of an undisturbed run. An interrupt
    (Ctrl-C, a notebook's stop button) leaves a checkpoint and raises KeyboardInterrupt; a second one ends at once.

    Args:
        config: What to train, made by `penstock.load_config`.
        force: Delete what an earlier run left in the folder, packs too, and start anew.
        resume: False trains again from the start, on the packs that are there.
        if_changed: Train anew where the folder has weights of another graph or configuration, instead of refusing.
        result_json: Write a copy of `result.json` there, to a path or URI.
        progress: Show what is done: by default on a terminal and in a notebook, True always, False never; or a
            function `(stage, done, total, unit, /, **numbers)` to be told.
        on_epoch: Called with an `EpochRecord` after every epoch; what it raises ends the run.
        stop_requested: Setting it, from any thread, makes training write a checkpoint and raise Stopped.

    Returns a dict: `metrics`, `timings`, `artefacts` (paths), `config` and more; docs/command-line.md has all keys.
    Raises InUse for a run folder that another process has, ValueError for one with weights of something else and for
    what cannot work (before anything is written), DataError for bad data, DoesNotFit for budgets that are too small,
    naming ones that would do; a `result.json` of status `failed` or `stopped` says so too.
    """
    if not isinstance(config, RunConfig):
        raise TypeError(f"train takes what penstock.load_config(...) returns, not a {type(config).__name__}")
    copy = None if result_json is None else os.fspath(result_json)
    if copy is not None:
        require_writable(copy)
    stop = stop_requested or threading.Event()
    with shown(progress) as show, soft_interrupt(stop):
        return Result(_train(config, force, resume, if_changed, copy, show, on_epoch, stop))


def _train(
    config: RunConfig,
    force: bool,
    resume: bool,
    if_changed: bool,
    result_json: str | None,
    show: Progress,
    on_epoch: OnEpoch | None,
    stop: threading.Event,
) -> dict[str, Any]:
    opened = open_run(config, force=force, resume=resume, if_changed=if_changed, progress=show, stop_requested=stop)
    with opened as run:
        if (done := _finished(run, result_json)) is not None:
            return done
        assert run.status is not None, "open_run has made it"
        with observed(run.config, show, (on_epoch, run.status.epoch)) as watch:
            try:
                result = _job(run, result_json, watch)
                watch.finished(result)
                return result
            except (Exception, KeyboardInterrupt) as error:
                _report_failure(run, error, result_json)
                raise
