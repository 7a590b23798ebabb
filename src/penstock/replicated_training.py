"""The main job on replicas: choose where they run, train, score, report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from penstock.engine.chunked.backend import OpenBackend
from penstock.engine.chunked.processes import open_processes
from penstock.engine.modelfile import save_model
from penstock.replica import OPEN_REPLICA, ReplicaReport
from penstock.replicated import Replicated, replica_specs, train_replicas
from penstock.report import draw_curves
from penstock.run import Run
from penstock.storage.budget import num_threads


@contextmanager
def open_where(run: Run) -> Iterator[tuple[OpenBackend, int]]:
    """What starts replicas, and how many threads each gets; Ray is imported only where it is asked for."""
    config = run.config
    cluster, threads = config.cluster, config.train.threads
    if cluster.address is None:
        share = max(1, num_threads() // cluster.replicas)
        yield partial(open_processes, open_rank=OPEN_REPLICA), threads or share
        return
    from penstock.cluster.pipeline import open_ray
    from penstock.cluster.session import open_session, threads_per_replica

    reserved = cluster.feeders * cluster.feeder_threads
    num_cpus = max(num_threads(), cluster.replicas * (threads or 1) + reserved)
    with open_session(cluster.address, run.path, num_cpus=num_cpus):
        share = threads_per_replica(cluster.replicas, reserved)
        yield partial(open_ray, open_rank=OPEN_REPLICA), threads or share


def _rank_section(report: ReplicaReport, host: str) -> dict[str, Any]:
    value = {key: found for key, found in asdict(report).items() if key not in ("feed", "plan")}
    feed = report.feed
    if feed is not None:
        value |= {"bytes_read": feed.bytes_read, "hit_rates": feed.hit_rates, "read_s": feed.read_s}
    return {**value, "host": host}


def _metrics(run: Run, found: Replicated) -> dict[str, Any]:
    trained = found.trained
    values = {key: value for split, m in found.final.items() for key, value in m.to_json(f"{split}_").items()}
    return {
        **values,
        "train_losses": list(trained.losses),
        "epochs": trained.epochs,
        "steps": trained.steps,
        "best_epoch": trained.best_epoch,
        "stopped_early": trained.stopped_early,
        "feature_bytes": run.graph.feature_bytes,
        "host_memory_bytes": run.budgets.host_bytes,
    }


def train_replicated(run: Run, resume: bool) -> dict[str, Any]:
    """Train `run` on replicas; returns the sections of `result.json`."""
    began, config, meta = time.perf_counter(), run.config, run.graph.meta
    with open_where(run) as (open_backend, threads):
        found = train_replicas(run, open_backend, replica_specs(run, threads), resume=resume)
    save_model(
        run.path / "model",
        found.model,
        config.model,
        num_features=meta.num_features,
        num_classes=meta.num_classes,
        fanouts=config.sampler.layer_fanouts,
    )
    draw_curves(run.path / "metrics.jsonl", run.path / "curves.png")
    trained = found.trained
    artefacts = ("model", "metrics.jsonl", "curves.png", "config.yaml", "checkpoints")
    reports = found.reports
    return {
        "metrics": _metrics(run, found),
        "artefacts": {name: str((run.path / name).resolve()) for name in artefacts},
        "timings": {
            "prepare_s": found.prepare_s,
            "total_s": time.perf_counter() - began,
            "compute_s": trained.compute_s,
            "stall_s": trained.stall_s,
            "evaluate_s": trained.evaluate_s,
            "checkpoint_s": trained.checkpoint_s,
        },
        "throughput": {"items_per_s": trained.items_per_s, "seeds_per_s": trained.seeds_per_s},
        "bytes_read": sum(report.feed.bytes_read for report in reports if report.feed is not None),
        "plan": reports[0].plan,
        "resumed_from": trained.resumed_from,
        "restarts": found.restarts,
        "ranks": [_rank_section(report, host) for report, host in zip(reports, found.hosts, strict=True)],
    }
