"""The main job on the whole graph: cut it, choose ranks, feed, train, score, report."""

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from penstock.chunked_prepare import PreparedRanks, prepare_ranks
from penstock.config import RunConfig
from penstock.curves import draw_curves
from penstock.engine import recycled
from penstock.engine.adapters import require
from penstock.engine.chunked.backend import OpenBackend, Poll
from penstock.engine.chunked.processes import open_processes
from penstock.engine.chunked.spec import RankReport
from penstock.engine.chunked.state import ChunkedResult
from penstock.engine.chunked.telemetry import epoch_record
from penstock.engine.chunked.threads import open_threads
from penstock.engine.chunked.trainer import ChunkedTrainer
from penstock.engine.evaluate import evaluate_exact
from penstock.engine.metrics import Metrics
from penstock.engine.modelfile import save_model
from penstock.engine.outputs import Outputs
from penstock.identity import Keys
from penstock.observation import Observation
from penstock.run import Run
from penstock.schedule_plot import draw_schedule
from penstock.storage.budget import num_threads, trim_heap
from penstock.storage.graph import Split
from penstock.timings import timings_section


def find_backend(config: RunConfig, poll: Poll) -> OpenBackend:
    """What opens ranks: Ray where there is an address, or else what `chunked.backend` says.

    Ray is imported only where it is asked for; `poll` is called now and then while it has no room.
    """
    name, cluster = config.chunked.backend, config.cluster
    if cluster.address is None and name != "ray":
        return open_threads if name == "threads" else open_processes
    require("ray", "ray")
    from penstock.cluster.pipeline import open_ray

    return partial(
        open_ray,
        address=cluster.address,
        resources=cluster.replica_resources,
        gpus_per_replica=cluster.gpus_per_replica,
        memory_bytes=config.budgets.host_memory or 0,
        wait_s=cluster.wait_s,
        poll=poll,
        shared=(config.dataset, config.run_dir),
    )


def _require_shared(config: RunConfig) -> None:
    """ValueError, before any work, where ranks would go to nodes that do not see the run's files."""
    cluster = config.cluster
    if cluster.address == "local" or (cluster.address is None and config.chunked.backend != "ray"):
        return
    require("ray", "ray")
    from penstock.cluster.shared import require_shared

    require_shared(
        config.dataset,
        config.run_dir,
        address=cluster.address,
        resources=cluster.replica_resources,
        num_cpus=num_threads(),
    )


def _train(run: Run, prepared: PreparedRanks, identity: Keys, watch: Observation) -> ChunkedResult:
    config = run.config
    evaluate: tuple[Split, ...] = ("valid",) if run.evaluates else ()
    budgets = config.budgets.model_copy(update={"host_memory": run.budgets.host_bytes})  # what ranks share
    trainer = ChunkedTrainer(
        prepared.specs,
        find_backend(config.model_copy(update={"budgets": budgets}), run.poll),
        checkpoints=run.results / "checkpoints",
        metrics=run.results / "metrics.jsonl",
        evaluate=evaluate,
        identity={"run": identity},
        stop_requested=run.stop_requested,
        progress=run.progress,
        record=watch.record,
        observe=lambda epoch, reports, began_s: watch.epoch(epoch, reports, prepared.layout, began_s),
    )
    watch.training_begins(evaluates=run.evaluates)
    return trainer.run()


def _own_device(run: Run) -> str:
    """Where the driver computes: ranks elsewhere may have GPUs that it has not, as on Kubernetes."""
    device = run.config.train.device
    return device if device == "cpu" or torch.cuda.is_available() else "cpu"


def _score(run: Run, model: nn.Module) -> dict[Split, Metrics]:
    if not run.evaluates:
        return {}
    recycled.release()  # ranks are gone, and the pass has other sizes
    trim_heap()
    return evaluate_exact(
        model,
        run.graph,
        run.labelled_splits,
        run.results / "exact" / "train",
        host_memory=run.budgets.host_bytes,
        threads=run.threads,
        device=_own_device(run),
        progress=run.progress,
    )


def _rank_section(report: RankReport, prepared: PreparedRanks) -> dict[str, Any]:
    layout = prepared.layout
    return {
        "rank": report.rank,
        "host": report.host,
        "replica": layout.replica_of(report.rank),
        "part": layout.part_of(report.rank),
        "stage": layout.stage_of(report.rank),
        "units": list(prepared.specs[report.rank].units[layout.stage_of(report.rank)]),
        "busy_s": report.busy_s,
        "wait_s": report.wait_s,
        "sent_bytes": report.bytes_sent,
        "history_read_bytes": report.history_read_bytes,
        "history_written_bytes": report.history_written_bytes,
        "history_stall_s": report.history_stall_s,
        "peak_rss_bytes": report.peak_rss_bytes,
    }


def train_chunked(run: Run, watch: Observation) -> dict[str, Any]:
    """Train `run` on the whole graph; returns the sections of `result.json`."""
    _require_shared(run.config)
    prepared = prepare_ranks(run)
    prepare_s, steps = run.timings.total_s, dict(run.timings.spent)
    cut = {"chunked.partition": prepared.chunks.meta.method, "chunked.parts": prepared.layout.parts}
    identity = run.identity(**cut)
    trained = _train(run, prepared, identity, watch)
    began_s = run.timings.total_s
    model, meta, config = prepared.model, run.graph.meta, run.config
    model.load_state_dict(trained.weights)
    found = _score(run, model)
    test_s = run.timings.total_s - began_s
    around_s = began_s - prepare_s - sum(trained.times.values())
    times = {**trained.times, "start": trained.times["start"] + around_s}
    save_model(
        run.results / "model",
        model,
        config.model,
        num_features=meta.num_features,
        num_classes=meta.num_classes,
        fanouts=(-1,) * len(model.layers),  # type: ignore[arg-type]  # a ModuleList
        outputs=Outputs.of(run.graph),
        extra=run.model_facts(),
    )
    draw_curves(run.results, run.config.train.metric)
    artefacts = ["model", "metrics.jsonl", "curves.png", "config.yaml", "checkpoints"]
    if trained.reports:
        draw_schedule(
            trained.reports,
            prepared.layout,
            run.results / "schedule.png",
            epoch=trained.state.epochs_done,
            bubble=_schedule(prepared, trained)["bubble"],
            title=run.results.absolute().name,
        )
        artefacts.append("schedule.png")
    return {
        "graph": run.graph.fingerprint,
        "identity": identity,
        "metrics": _metrics(run, trained, found),
        "artefacts": {
            **{name: str((run.results / name).resolve()) for name in artefacts},
            "chunks": str((run.path / "chunks").resolve()),
        },
        "timings": {
            **timings_section(
                total_s=run.timings.total_s, prepare_s=prepare_s, steps=steps, train=times, test_s=test_s
            ),
            "epoch_s": float(np.median(trained.epoch_s)) if trained.epoch_s else None,
        },
        "stalls": {"stall_s": trained.times["stall"], "reduce_s": trained.times["reduce"]},
        "throughput": {"items_per_s": _items_per_s(prepared, trained)},
        "resumed_from": trained.resumed_from,
        "memory": prepared.memory.to_json(),
        "chunks": asdict(prepared.chunks.meta),
        "schedule": _schedule(prepared, trained),
        "straggler": None if (slow := watch.stragglers.find()) is None else slow.to_json(),
        "ranks": [_rank_section(report, prepared) for report in trained.reports],
    }


def _items_per_s(prepared: PreparedRanks, trained: ChunkedResult) -> float | None:
    """Chunks of all replicas over the seconds of the epochs; None where none was left to do."""
    items = len(trained.epoch_s) * prepared.chunks.meta.num_chunks * prepared.layout.replicas
    return items / sum(trained.epoch_s) if trained.epoch_s else None


def _metrics(run: Run, trained: ChunkedResult, found: dict[Split, Metrics]) -> dict[str, Any]:
    values = {key: value for split, metrics in found.items() for key, value in metrics.to_json(f"{split}_").items()}
    state = trained.state
    return {
        **values,
        "train_losses": state.losses,
        "epochs": state.epochs_done,
        "steps": state.epochs_done * run.config.chunked.updates_per_epoch,
        "best_epoch": state.best_epoch,
        "stopped_early": state.stopped_early,
        "feature_bytes": run.graph.feature_bytes,
        "host_memory_bytes": run.budgets.host_bytes,
    }


def _schedule(prepared: PreparedRanks, trained: ChunkedResult) -> dict[str, Any]:
    """The last epoch in numbers, and what was chosen for it."""
    layout = prepared.layout
    value: dict[str, Any] = {
        "stages": layout.stages,
        "parts": layout.parts,
        "replicas": layout.replicas,
        "units": [list(unit) for unit in prepared.specs[0].units],
        "recompute": prepared.specs[0].recompute,
        "features": prepared.specs[0].features.kind,
        "history_errors": {str(layer): error for layer, error in trained.history_errors.items()},
    }
    if trained.reports:
        value |= epoch_record(trained.reports, prepared.chunks.meta, layout, trained.epoch_s[-1])
    return value
