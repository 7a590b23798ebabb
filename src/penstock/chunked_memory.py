"""What the process of a full-graph run holds, phase by phase: see `process_memory`.

Tables of histories are mapped once and features gathered once; all else that ranks hold, the tapes above all, is
allocated and freed with every chunk, so some of it waits for its next use in `recycled` and in the allocator.
"""

import numpy as np
from torch import nn

from penstock.engine.chunked.estimate import Choice
from penstock.engine.exact import exact_peak_bytes
from penstock.process_memory import PROCESS, RANK, WAITING_PART, Forecast, Phase
from penstock.run import Run
from penstock.sampler.chunking.metis import metis_peak_bytes
from penstock.storage.budget import peak_rss_bytes
from penstock.storage.chunks import ChunkStore


def _cut(run: Run, chunks: ChunkStore) -> list[Phase]:
    """Cutting and profiling are done, and so measured; METIS is in a process beside this one."""
    process, so_far = run.untrained_bytes, peak_rss_bytes()
    measured = {PROCESS: min(process, so_far), "cutting and profiling": max(0, so_far - process)}
    phases = [Phase(name="cut", parts=measured)]
    if chunks.meta.method == "metis":
        phases.append(Phase(name="metis", parts={PROCESS: process, "METIS": metis_peak_bytes(run.graph)}))
    return phases


def forecast_chunked(run: Run, model: nn.Module, choice: Choice, chunks: ChunkStore, feature_bytes: int) -> Forecast:
    """Predict the processes of a split of the ranks, once the graph is cut; `feature_bytes` are of one replica."""
    replicas, ranks = run.config.cluster.replicas, choice.stages * choice.parts
    steps = (choice.all_ranks_bytes - choice.all_histories_bytes) * replicas
    held = {
        "features": feature_bytes * replicas,
        "histories": choice.all_histories_bytes * replicas,
        "activations and topology": steps,
        "memory that waits for its next use": steps // WAITING_PART,
    }
    train = {PROCESS: run.process_bytes, **held}
    if run.config.chunked.backend != "threads":
        train["interpreters of the ranks"] = RANK * ranks * replicas
    phases = [*_cut(run, chunks), Phase(name="train", parts=train, budgeted=sum(held.values()))]
    if run.evaluates:
        targets = np.concatenate([run.graph.split_ids(split) for split in run.labelled_splits])
        exact = exact_peak_bytes(model, run.graph, run.budgets.host_bytes, targets)
        parts = {PROCESS: run.process_bytes, "exact evaluation": exact}
        phases.append(Phase(name="evaluate", parts=parts, budgeted=exact))
    return Forecast(phases=tuple(phases))
