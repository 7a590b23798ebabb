"""What `penstock ingest` and `penstock generate` do: make a graph store, print what it holds."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from penstock.display import print_table, progress
from penstock.inspection import describe_graph
from penstock.locations import upload_store
from penstock.overrides import explain, parse_override
from penstock.storage.budget import format_bytes, parse_bytes
from penstock.storage.errors import DataError
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore
from penstock.storage.ingest import IngestOptions, ingest_npy, ingest_ogb, ingest_parquet
from penstock.storage.remote.config import is_uri, local_copy
from penstock.storage.remote.files import open_remote

Options = TypeVar("Options", bound=BaseModel)
SourceFormat = Literal["auto", "parquet", "npy", "ogb"]


def _options(model: type[Options], overrides: Iterable[str], **given: Any) -> Options:
    values = {**given, **dict(parse_override(text) for text in overrides)}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error, model)) from error


def _detect(source: Path) -> SourceFormat:
    if (source / "raw").is_dir() or (source / "mapping").is_dir():
        return "ogb"
    if any(source.glob("*.npy")):
        return "npy"
    return "parquet"


def _show_graph(graph: GraphStore) -> None:
    found = describe_graph(graph.path, validate=False)
    print_table(
        str(graph.path),
        [
            ("nodes, edges", f"{found['num_nodes']:,}, {found['num_edges']:,}"),
            ("features", f"{found['num_features']} {found['feature_dtype']}, {format_bytes(found['feature_bytes'])}"),
            ("classes", f"{found['num_classes']}{' (multi-label)' if found['multi_label'] else ''}"),
            ("train, valid, test", ", ".join(f"{found[f'{split}_nodes']:,}" for split in ("train", "valid", "test"))),
        ],
    )


def run_ingest(
    source: Path,
    out: Path | str,
    *,
    stage_dir: Path | None = None,
    format: SourceFormat,
    nodes: Path | None,
    edges: Path | None,
    options: Iterable[str],
    host_memory: str,
    quiet: bool,
) -> None:
    """`penstock ingest`; a store at a URI is built locally, then uploaded."""
    chosen = _options(IngestOptions, options)
    if not source.exists():
        raise DataError(f"{source} does not exist; give the folder with the tables")
    format = _detect(source) if format == "auto" else format
    budget = parse_bytes(host_memory)
    uri = str(out) if is_uri(out) else None
    if uri is not None:
        open_remote(uri)  # a wrong URI is found before the work
    out = Path(out) if uri is None else local_copy(uri, "built", stage_dir)
    with progress(quiet=quiet) as show:
        if format == "parquet":
            tables = (nodes or source / "nodes.parquet", edges or source / "edges.parquet")
            graph = ingest_parquet(*tables, out, chosen, host_memory=budget, progress=show)
        else:
            read = ingest_npy if format == "npy" else ingest_ogb
            graph = read(source, out, chosen, host_memory=budget, progress=show)
        if uri is not None:
            upload_store(out, uri, progress=show)
    _show_graph(graph)


def run_generate(out: Path, *, num_nodes: int, options: Iterable[str], host_memory: str, quiet: bool) -> None:
    """`penstock generate`."""
    config = _options(GenerateConfig, options, num_nodes=num_nodes)
    with progress(quiet=quiet) as show:
        graph = generate_graph(out, config, host_memory=parse_bytes(host_memory), progress=show)
    _show_graph(graph)
