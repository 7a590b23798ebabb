"""The main job on replicas: choose where they run, train, score, report."""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from penstock.cluster.directory import Directory, open_directory
from penstock.cluster.feeder_pool import open_feeder_processes
from penstock.curves import draw_curves
from penstock.engine.adapters import require
from penstock.engine.chunked.processes import open_processes
from penstock.engine.modelfile import save_model
from penstock.engine.outputs import Outputs
from penstock.observation import Observation
from penstock.replica import OPEN_REPLICA, ReplicaReport
from penstock.replicated import Place, Replicated, train_replicas
from penstock.run import Run
from penstock.sampled_memory import forecast_replicas
from penstock.storage.budget import num_threads
from penstock.timings import timings_section


class _Here:
    """Processes of this machine; a `Place`."""

    def __init__(self, run: Run) -> None:
        cluster = run.config.cluster
        self._run = run
        self.threads = run.config.train.threads or max(1, num_threads() // cluster.replicas)
        self.replicas_per_gpu = math.ceil(cluster.replicas / max(1, torch.cuda.device_count()))
        self.open_backend = partial(open_processes, open_rank=OPEN_REPLICA)

    def hosts(self, backend: Any, count: int) -> list[str]:
        return ["this machine"] * count

    @contextmanager
    def open_feeders(self) -> Iterator[Directory | None]:
        config, cluster = self._run.config, self._run.config.cluster
        if not cluster.feeders:
            yield None
            return
        with (
            open_feeder_processes(
                config.dataset,
                config.work_dir / "feeders",
                count=cluster.feeders,
                threads=cluster.feeder_threads,
                disk_bytes=cluster.feeder_disk,
                retries=cluster.retries,
            ) as pool,
            open_directory(pool, "127.0.0.1") as directory,
        ):
            yield directory


@contextmanager
def _open_place(run: Run) -> Iterator[Place]:
    """Where the configuration wants replicas; Ray is imported only where it is asked for."""
    address = run.config.cluster.address
    if address is None:
        yield _Here(run)
        return
    require("ray", "ray")
    from penstock.cluster.replicas import open_ray_place

    with open_ray_place(run.config, folder=run.path, open_rank=OPEN_REPLICA, poll=run.poll) as place:
        yield place


def _slowest_steps(reports: Sequence[ReplicaReport]) -> dict[str, float]:
    """Seconds of the steps of preparing, of the replica that took longest."""
    found = [report.facts.get("prepared", {}) for report in reports]
    return dict(max(found, key=lambda steps: sum(steps.values()), default={}))


def _rank_section(report: ReplicaReport, host: str) -> dict[str, Any]:
    value = {key: found for key, found in asdict(report).items() if key not in ("feed", "facts")}
    feed = report.feed
    if feed is not None:
        value |= {"bytes_read": feed.bytes_read, "hit_rates": feed.hit_rates, "read_s": feed.read_s}
    return {**value, **report.facts, "host": host}


def _memory(run: Run, reports: Sequence[ReplicaReport]) -> dict[str, Any] | None:
    """What all processes of this machine were predicted to take; elsewhere each replica has a machine of its own, and
    with feeders nobody knows it."""
    known = [report.facts["memory"] for report in reports if report.facts.get("memory")]
    if run.config.cluster.address is not None or not known or len(known) < len(reports):
        return None
    return forecast_replicas(run, known).to_json()


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


def train_replicated(run: Run, watch: Observation) -> dict[str, Any]:
    """Train `run` on replicas; returns the sections of `result.json`."""
    config, meta = run.config, run.graph.meta
    for name in ("train", "valid", "test", "local/plan"):  # packs of this run without replicas would fill the disk
        shutil.rmtree(run.path / name, ignore_errors=True)
    opened: AbstractContextManager[Place] = _open_place(run)
    with opened as place:
        found = train_replicas(run, place, watch)
    save_model(
        run.results / "model",
        found.model,
        config.model,
        num_features=meta.num_features,
        num_classes=meta.num_classes,
        fanouts=config.sampler.layer_fanouts,
        outputs=Outputs.of(run.graph),
        extra=run.model_facts(),
    )
    draw_curves(run.results, run.config.train.metric)
    trained, reports = found.trained, found.reports
    artefacts = ("model", "metrics.jsonl", "curves.png", "config.yaml", "checkpoints")
    return {
        "graph": run.graph.fingerprint,
        "identity": found.identity,
        "metrics": _metrics(run, found),
        "artefacts": {name: str((run.results / name).resolve()) for name in artefacts},
        "timings": timings_section(
            total_s=run.timings.total_s,
            prepare_s=found.prepare_s,
            steps=_slowest_steps(reports),
            train=trained.times,
            test_s=found.test_s,
        ),
        "stalls": {"stall_s": trained.times["stall"], "reduce_s": trained.times["reduce"]},
        "throughput": {"items_per_s": trained.items_per_s, "seeds_per_s": trained.seeds_per_s},
        "bytes_read": sum(report.feed.bytes_read for report in reports if report.feed is not None),
        "resumed_from": trained.resumed_from,
        "memory": _memory(run, reports),
        "restarts": found.restarts,
        "straggler": None if (slow := watch.stragglers.find()) is None else slow.to_json(),
        "feeders": [{key: value for key, value in feeder.items() if key != "graph"} for feeder in found.feeders],
        "ranks": [_rank_section(report, host) for report, host in zip(reports, found.hosts, strict=True)],
    }
