"""`penstock infer`: predictions and embeddings of a trained run, to Parquet, under the original ids."""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from penstock.config import RunConfig, load_config
from penstock.engine.contract import goes_by_layer
from penstock.engine.infer import infer_feed_to_parquet, infer_to_parquet
from penstock.engine.minibatch import MiniBatch
from penstock.engine.modelfile import TrainedModel, load_model
from penstock.engine.outputs import Outputs
from penstock.engine.products import torch_threads
from penstock.engine.usersource import differing, sources_of
from penstock.identity import SOURCE
from penstock.infer_memory import default_infer_memory, forecast_infer, infer_process_bytes
from penstock.loader import FeedOrder, open_loader
from penstock.locations import experiment_place, experiments, local_dataset, local_output, local_run
from penstock.prepare import sample_config
from penstock.report import read_config
from penstock.sampler.neighbors import SampleConfig
from penstock.sampler.plan import PlanConfig
from penstock.storage.budget import (
    Budgets,
    Size,
    default_disk,
    num_threads,
    parse_bytes,
    parse_memory,
    peak_rss_bytes,
    total_memory,
)
from penstock.storage.errors import DataError
from penstock.storage.export import require_parquet_name
from penstock.storage.graph import GraphStore, SeedSet, open_graph
from penstock.storage.manifest import no_folder
from penstock.storage.paths import AnyPath
from penstock.storage.progress import Progress
from penstock.watching import Show, shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What is to be written, and of what."""

    run_dir: Path
    trained: TrainedModel
    graph: GraphStore
    outputs: Outputs
    split: SeedSet
    host_memory: int
    threads: int
    progress: Progress


def _open_results(run: str, experiment: str | None, stage_dir: Path | None) -> Path:
    """The folder of a trained model; DataError names experiments that have one, where this has none."""
    place = experiment_place(run, experiment)
    try:
        folder, _ = local_run(place, stage_dir)
    except DataError as error:
        raise DataError(f"{error}{_others(run)}") from error
    others = _others(run)
    if not folder.is_dir():
        raise DataError(f"{no_folder(folder, 'config.yaml')}{others}")
    if not (folder / "config.yaml").is_file() and not others:
        raise DataError(f"{folder} has no config.yaml: it is no run; give the folder of a run of penstock train")
    if not (folder / "model" / "model.json").is_file():
        raise DataError(f"{place} has no trained model; run penstock train with this run folder first{others}")
    return folder


def _others(run: str) -> str:
    names = experiments(run)
    return f"; there are experiments {', '.join(names)}: name one with --experiment" if names else ""


def infer(
    run_dir: AnyPath,
    out: AnyPath,
    *,
    experiment: str | None = None,
    dataset: AnyPath | None = None,
    stage_dir: AnyPath | None = None,
    split: SeedSet = "all",
    sampled: bool = False,
    fanouts: Sequence[int] | None = None,
    host_memory: Size | None = None,
    disk: Size | None = None,
    threads: int | None = None,
    progress: Show = None,
) -> dict[str, Any]:
    """Write embeddings and predictions of a trained run's nodes to Parquet: `id, embedding, logits, prediction`.

        penstock.infer("runs/papers", "papers.parquet", host_memory="4GiB")

    The ids, and the labels in `prediction`, are those that the graph was made from. By default outputs are exact, over
    all neighbours, computed layer by layer. With `sampled` they come from sampled neighbourhoods, as those of
    `evaluate.mode=sampled` do, out of core, for any model; `embedding` is then what the model's `embed(blocks, x)`
    gives where it cannot go layer by layer, and is left out where it has no such method.

    Args:
        run_dir: The folder or URI of a run that `penstock.train` has finished.
        out: The file to write, a path or a URI; it appears whole at the end.
        experiment: Name of the experiment in the run folder whose model is to be used.
        dataset: The graph store, a folder or a URI; default: the one that the run was trained on.
        stage_dir: Local folder for copies of remote data.
        split: Whose outputs to write: `train`, `valid`, `test`, or `all`.
        sampled: Sample neighbourhoods instead of taking all neighbours.
        fanouts: Of `sampled`: neighbours per layer, input side first; default: those of the run's evaluation.
        host_memory: Bytes, or text like `4GiB`, to work in beside the process; default: what is free, in part.
        disk: Of `sampled`: bytes, or text, for packs; default: a power of two that is free.
        threads: Default: the cores that this process may use.
        progress: As of `penstock.train`.

    Returns a summary: `rows`, `file`, `graph`, `fanouts`, `columns`. The same call continues a killed one, with the
    same host memory, and what it keeps for that in `run_dir/exact` (`run_dir/sampled`) is deleted at the end. Raises
    DataError where the run has no model, or its graph was replaced and no `dataset` is given, or the graph has other
    features than the model was trained on, or features normalised otherwise, or an earlier release trained the model as
    a function that this one does not compute; ValueError for options without effect, and for a model that does not go
    layer by layer without `sampled`; DoesNotFit for budgets that are too small or, of exact outputs before anything is
    computed, where this container or machine does not hold the process. Of exact outputs the summary has
    `predicted_peak_bytes`, how large the process becomes, and `peak_rss_bytes`, how large it was.
    """
    require_parquet_name(os.fspath(out))
    if not sampled and (fanouts is not None or disk is not None):
        raise ValueError("fanouts and disk are for sampled=True (--sampled): exact outputs take all neighbours")
    with shown(progress) as show:
        stage = None if stage_dir is None else Path(stage_dir)
        folder = _open_results(os.fspath(run_dir), experiment, stage)
        process = infer_process_bytes(read_config(folder / "config.yaml").get("mode", "sampled"))
        trained, graph = _open(folder, None if dataset is None else os.fspath(dataset), stage, show)
        job = _Job(
            run_dir=folder,
            trained=trained,
            graph=graph,
            outputs=Outputs.from_json(trained.outputs, graph),
            split=split,
            host_memory=default_infer_memory(process) if host_memory is None else parse_memory(host_memory),
            threads=threads or num_threads(),
            progress=show,
        )
        taken: list[int] | str = "all neighbours"
        predicted = {} if sampled else {"predicted_peak_bytes": _check_exact(job, process)}
        with local_output(os.fspath(out)) as path:
            if sampled:
                taken, num_rows = _write_sampled(job, path, fanouts, None if disk is None else parse_bytes(disk))
            else:
                num_rows = _write_exact(job, path)
            columns = pq.read_schema(path).names
        found = {"rows": num_rows, "file": str(out), "graph": str(graph.path), "fanouts": taken, "columns": columns}
        return found | ({} if sampled else {**predicted, "peak_rss_bytes": peak_rss_bytes()})


def _open(
    run_dir: Path, given: str | None, stage_dir: Path | None, progress: Progress
) -> tuple[TrainedModel, GraphStore]:
    """The model of a run and the graph to score; DataError where they do not go together."""
    trained = load_model(run_dir / "model")
    config = read_config(run_dir / "config.yaml")
    dataset = given or (config.get("remote") or {}).get("dataset") or Path(config["dataset"])
    graph = open_graph(local_dataset(dataset, stage_dir, progress=progress))
    made_of = trained.extra.get("graph", graph.fingerprint)
    if given is None and made_of != graph.fingerprint:
        raise DataError(
            f"the model in {run_dir} was trained on graph {made_of}, and {dataset} is graph {graph.fingerprint} now; "
            f"train again, or score this one: --dataset {dataset}"
        )
    if graph.meta.num_features != trained.num_features:
        raise DataError(
            f"{graph.path} has {graph.meta.num_features} features per node, the model wants {trained.num_features}; "
            "give the dataset that it was trained on"
        )
    trained.check_graph(graph)
    _tell_changed_code(trained, run_dir)
    Outputs.from_json(trained.outputs, graph).check_features(graph)
    if trained.config.edge_weights and not graph.meta.has_edge_weights:
        raise DataError(
            f"{graph.path} has no edge weights, by which the model's means are weighted; ingest the graph with weights"
        )
    return trained, graph


def _tell_changed_code(trained: TrainedModel, run_dir: Path) -> None:
    there = trained.extra.get(SOURCE)
    if there is not None and (names := differing(there, sources_of(type(trained.model)))):
        logger.warning(
            "the code of %s changed since the model in %s was trained; predictions are of the code as it is now",
            ", ".join(names),
            run_dir,
        )


def _nodes(job: _Job) -> NDArray[np.int64] | None:
    return None if job.split == "all" else job.graph.split_ids(job.split)


def _check_exact(job: _Job, process: int) -> int:
    """How large the process becomes; DoesNotFit where that is too large."""
    memory = forecast_infer(process, job.trained.model, job.graph, job.host_memory, _nodes(job))
    memory.check(job.host_memory, total_memory())
    return memory.num_bytes


def _write_exact(job: _Job, path: Path) -> int:
    return infer_to_parquet(
        job.trained.model,
        job.graph,
        path,
        job.run_dir / "exact" / "infer",
        host_memory=job.host_memory,
        threads=job.threads,
        nodes=_nodes(job),
        outputs=job.outputs,
        progress=job.progress,
    )


def _write_sampled(
    job: _Job, path: Path, fanouts: Sequence[int] | None, disk_bytes: int | None
) -> tuple[list[int], int]:
    """Score sampled neighbourhoods of the items that evaluation of the run has; returns the fanouts and the rows."""
    config, model = load_config(job.run_dir / "config.yaml"), job.trained.model
    sample = _sample_config(config, job.split, fanouts)
    hops, wanted = sample.layer_fanouts, len(job.trained.fanouts)
    if len(hops) != wanted:
        raise ValueError(f"fanouts={list(hops)} are for {len(hops)} layers, the model has {wanted}; give {wanted}")
    folder = job.run_dir / "sampled" / job.split
    order = FeedOrder(
        graph=job.graph,
        folder=folder,
        split=job.split,
        sample=sample,
        plan=PlanConfig(row_dtype=config.plan.row_dtype),
        shuffle=False,
        sampled_epochs=1,
        epochs=1,
        budgets=Budgets(
            device_bytes=0,
            host_bytes=job.host_memory,
            disk_bytes=default_disk(job.run_dir) if disk_bytes is None else disk_bytes,
        ),
        device="cpu",
        threads=job.threads,
        in_memory=config.feed == "memory",
        progress=job.progress,
    )
    by_layer = goes_by_layer(
        model,
        num_layers=wanted,
        num_features=job.trained.num_features,
        degrees=sample.degrees,
        weighted=job.graph.meta.has_edge_weights,
    )
    with open_loader(order) as loader, torch_threads(job.threads):
        batches = _tell(loader, len(loader), job.progress)
        rows = infer_feed_to_parquet(model, job.graph, path, batches, by_layer=by_layer, outputs=job.outputs)
    shutil.rmtree(folder)
    return list(hops), rows


def _sample_config(config: RunConfig, split: SeedSet, fanouts: Sequence[int] | None) -> SampleConfig:
    """As the run evaluates, in mini-batches as large as those of training where it does not evaluate; or with other
    fanouts."""
    if fanouts is None and config.mode == "chunked":
        raise ValueError(
            f"{config.run_dir} was trained on the whole graph, so it has no fanouts: give some, or leave sampled "
            "(--sampled) out for exact outputs"
        )
    sample = sample_config(config, "valid")
    given = None if fanouts is None else tuple(fanouts)
    update: dict[str, Any] = {} if given is None else {"fanouts": given, "num_neighbors": None}
    if split in ("all", "train"):
        update["batch_size"] = config.sampler.batch_size
    return SampleConfig.model_validate(sample.model_dump() | update)


def _tell(batches: Iterable[MiniBatch], total: int, progress: Progress) -> Iterator[MiniBatch]:
    for done, batch in enumerate(batches):
        progress("infer", done, total, "items")
        yield batch
    progress("infer", total, total, "items")
