"""What the process of a full-graph run holds, phase by phase: see `process_memory`."""

import numpy as np
from torch import nn

from penstock.engine.chunked.estimate import Choice
from penstock.engine.exact import exact_peak_bytes
from penstock.process_memory import PROCESS, RANK, WAITING_PART, Forecast, Phase
from penstock.run import Run
from penstock.storage.budget import children_peak_rss_bytes, peak_rss_bytes


def forecast_chunked(run: Run, model: nn.Module, choice: Choice, feature_bytes: int) -> Forecast:
    """Predict the processes of a split of the ranks, once the graph is cut; `feature_bytes` are of one replica."""
    so_far, process = peak_rss_bytes(), run.process_bytes
    cut = {PROCESS: min(process, so_far), "cutting and profiling": max(0, so_far - process)}
    cut["METIS and other helpers"] = children_peak_rss_bytes()
    replicas, ranks = run.config.cluster.replicas, choice.stages * choice.parts
    used = (feature_bytes + choice.all_ranks_bytes) * replicas
    train = {PROCESS: process, "features": feature_bytes * replicas, "ranks": choice.all_ranks_bytes * replicas}
    train["memory that waits for its next use"] = used // WAITING_PART
    if run.config.chunked.backend != "threads":
        train["interpreters of the ranks"] = RANK * ranks * replicas
    phases = [Phase(name="cut", parts=cut), Phase(name="train", parts=train, budgeted=used + used // WAITING_PART)]
    if run.evaluates:
        targets = np.concatenate([run.graph.split_ids(split) for split in run.labelled_splits])
        exact = exact_peak_bytes(model, run.graph, run.budgets.host_bytes, targets)
        phases.append(Phase(name="evaluate", parts={PROCESS: process, "exact evaluation": exact}, budgeted=exact))
    return Forecast(phases=tuple(phases))
