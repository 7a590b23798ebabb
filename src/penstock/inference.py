"""`penstock infer`: predictions and embeddings of a trained run, to Parquet, under the original ids."""

from pathlib import Path
from typing import Any, Literal

from penstock.engine.infer import infer_to_parquet
from penstock.engine.modelfile import load_model
from penstock.engine.outputs import Outputs
from penstock.locations import local_dataset, local_output, local_run
from penstock.process_memory import process_bytes
from penstock.report import read_config
from penstock.storage.budget import MIB, default_host_bytes, num_threads
from penstock.storage.errors import DataError
from penstock.storage.export import require_parquet_name
from penstock.storage.graph import Split, open_graph
from penstock.storage.manifest import no_folder
from penstock.storage.progress import Progress, silent


def _default_memory() -> int:
    """A power of two, at most what fits beside the process: mostly the same at the next call, which then continues
    this one."""
    fitting = max(MIB, default_host_bytes(process_bytes()))
    return 1 << (fitting.bit_length() - 1)


def infer(
    run_dir: Path | str,
    out: Path | str,
    *,
    dataset: Path | str | None = None,
    stage_dir: Path | None = None,
    split: Split | Literal["all"] = "all",
    host_memory: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write `id, embedding, logits, prediction` of a split's nodes, exact over all neighbours; returns a summary.

    Run, file and dataset may be URIs: what is read is copied to `stage_dir` first, the file is uploaded at the end.
    Layer tables are kept in a folder of this call in `run_dir/exact` until the file is there; the same command
    continues a killed one, with the same host memory. Predictions are labels as the graph of the training had them.
    DataError where the run has no model, or its graph was replaced and no `dataset` is given, or the graph has other
    features than the model was trained on, or features normalised otherwise, or an earlier release trained the model as
    a function that this one does not compute.
    """
    require_parquet_name(out)
    run_dir, _ = local_run(run_dir, stage_dir)
    if not run_dir.is_dir():
        raise DataError(no_folder(run_dir, "config.yaml"))
    if not (run_dir / "config.yaml").is_file():
        raise DataError(f"{run_dir} has no config.yaml: it is no run; give the folder of a run of penstock train")
    if not (run_dir / "model" / "model.json").is_file():
        raise DataError(f"{run_dir} has no trained model; run penstock train with this run folder first")
    trained = load_model(run_dir / "model")
    config = read_config(run_dir / "config.yaml")
    given, dataset = dataset, dataset or (config.get("remote") or {}).get("dataset") or Path(config["dataset"])
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
    outputs = Outputs.from_json(trained.outputs, graph)
    outputs.check_features(graph)
    if trained.config.edge_weights and not graph.meta.has_edge_weights:
        raise DataError(
            f"{graph.path} has no edge weights, by which the model's means are weighted; ingest the graph with weights"
        )
    with local_output(out) as path:
        num_rows = infer_to_parquet(
            trained.model,
            graph,
            path,
            run_dir / "exact" / "infer",
            host_memory=_default_memory() if host_memory is None else host_memory,
            threads=threads or num_threads(),
            nodes=None if split == "all" else graph.split_ids(split),
            outputs=outputs,
            progress=progress,
        )
    return {"rows": num_rows, "file": str(out), "graph": str(graph.path), "fanouts": "all neighbours"}
