"""What `penstock ingest` and `penstock generate` do: make a graph store, print what it holds."""

import json
from collections.abc import Iterable
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pydantic import BaseModel, ValidationError

from penstock.display import print_table, progress
from penstock.inspection import describe_graph
from penstock.locations import upload_store
from penstock.overrides import explain, parse_override
from penstock.storage.budget import format_bytes, parse_memory
from penstock.storage.errors import DataError
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore
from penstock.storage.ingest import IngestOptions, ingest_npy, ingest_ogb, ingest_parquet
from penstock.storage.manifest import MANIFEST, near_miss
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


_FORMATS = "formats are Parquet (nodes.parquet and edges.parquet), NumPy (features.npy, ...) and OGB (raw/, split/)"


def _local_source(source: Path | str, what: str) -> Path:
    """The path of a source; DataError where it is remote, or nowhere."""
    if isinstance(source, str) and source.startswith("file://"):
        source = Path(url2pathname(urlsplit(source).path))
    if is_uri(source):
        raise DataError(
            f'{source} is remote, and {what} are read from local folders; copy them first: python -c "import fsspec; '
            f"files, path = fsspec.core.url_to_fs('{source}'); files.get(path, 'tables', recursive=True)\""
        )
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path} does not exist{near_miss(path)}")
    return path


def _detect(source: Path) -> SourceFormat:
    """Which format a folder has; Parquet where nothing else is found."""
    if (source / "nodes.parquet").exists():
        return "parquet"
    if (source / "raw").is_dir() or (source / "mapping").is_dir():
        return "ogb"
    return "npy" if any(source.glob("*.npy")) else "parquet"


def _matching(pattern: str) -> list[Path]:
    """Files that a pattern names, sorted; DataError where there is none."""
    found = [Path(path) for path in sorted(glob(pattern, recursive=True))]
    if not found:
        raise DataError(f"no file matches {pattern}; write a pattern like 'tables/nodes-*.parquet', or name a folder")
    return found


def _tables(
    source: Path, nodes: Path | str | None, edges: Path | str | None
) -> tuple[Path | list[Path], Path | list[Path]]:
    """The node and the edge table; DataError that says what the folder has where one is not there."""
    found: list[Path | list[Path]] = []
    for kind, given in (("nodes", nodes), ("edges", edges)):
        if given is not None and has_magic(str(given)) and not Path(given).exists():
            found.append(_matching(str(given)))
            continue
        path = source / f"{kind}.parquet" if given is None else _local_source(given, "tables")
        if given is None and not path.exists():
            there = (
                sorted(entry.name for entry in source.iterdir())[:20] if source.is_dir() else "no entries: it is a file"
            )
            raise DataError(
                f"{source} has no {kind}.parquet; it has {there}; {_FORMATS}; give --{kind} for a table of another name"
            )
        found.append(path)
    return found[0], found[1]


_CLASSES = {"string": " (strings, which infer writes)", "int64": " (numbered; infer writes them as given)"}


def _written_at(store: Path) -> int | None:
    """When a store was completed, None where it is not: its manifest is written last, and once."""
    path = store / MANIFEST
    return path.stat().st_mtime_ns if path.is_file() else None


def _show_graph(graph: GraphStore, before: int | None) -> None:
    """Print what a store holds; `before` is when it had been completed before this command."""
    found = describe_graph(graph.path, validate=False)
    print_table(
        f"{graph.path}: already done" if before == _written_at(graph.path) else str(graph.path),
        [
            ("nodes, edges", f"{found['num_nodes']:,}, {found['num_edges']:,}"),
            ("features", f"{found['num_features']} {found['feature_dtype']}, {format_bytes(found['feature_bytes'])}"),
            (
                "classes",
                f"{found['num_classes']}{_CLASSES.get(found['class_values'], '')}"
                f"{' (multi-label)' if found['multi_label'] else ''}",
            ),
            ("train, valid, test", ", ".join(f"{found[f'{split}_nodes']:,}" for split in ("train", "valid", "test"))),
        ],
    )


def _only_parquet(format: SourceFormat) -> SourceFormat:
    if format in ("npy", "ogb"):
        raise ValueError(f"--nodes and --edges name Parquet tables, and --format is {format}; drop one or the other")
    return "parquet"


def print_ingest_options(*, as_json: bool) -> None:
    """`penstock inspect --ingest-options`: what `ingest --set` takes."""
    found = {
        name: {
            "default": field.default,
            "choices": get_args(field.annotation) if get_origin(field.annotation) is Literal else None,
            "help": field.description,
        }
        for name, field in IngestOptions.model_fields.items()
    }
    if as_json:
        print(json.dumps(found))
        return
    for name, option in found.items():
        default = json.dumps(option["default"]).strip('"')
        others = " | ".join(choice for choice in option["choices"] or () if choice != default)
        print(f"{name}={default}{' | ' + others if others else ''}\n    {option['help']}")


def run_ingest(
    source: Path | str,
    out: Path | str,
    *,
    stage_dir: Path | None = None,
    format: SourceFormat,
    nodes: Path | str | None,
    edges: Path | str | None,
    options: Iterable[str],
    host_memory: str,
    quiet: bool,
) -> None:
    """`penstock ingest`; a store at a URI is built locally, then uploaded."""
    chosen = _options(IngestOptions, options)
    source = _local_source(source, "tables")
    if nodes is not None or edges is not None:
        format = _only_parquet(format)
    format = _detect(source) if format == "auto" else format
    budget = parse_memory(host_memory)
    uri = str(out) if is_uri(out) else None
    if uri is not None:
        open_remote(uri)  # a wrong URI is found before the work
    out = Path(out) if uri is None else local_copy(uri, "built", stage_dir)
    before = _written_at(out)
    with progress(quiet=quiet) as show:
        if format == "parquet":
            graph = ingest_parquet(*_tables(source, nodes, edges), out, chosen, host_memory=budget, progress=show)
        else:
            read = ingest_npy if format == "npy" else ingest_ogb
            graph = read(source, out, chosen, host_memory=budget, progress=show)
        if uri is not None:
            upload_store(out, uri, progress=show)
    if not quiet:
        _show_graph(graph, before)


def run_generate(out: Path, *, num_nodes: int, options: Iterable[str], host_memory: str, quiet: bool) -> None:
    """`penstock generate`."""
    config, before = _options(GenerateConfig, options, num_nodes=num_nodes), _written_at(out)
    with progress(quiet=quiet) as show:
        graph = generate_graph(out, config, host_memory=parse_memory(host_memory), progress=show)
    if not quiet:
        _show_graph(graph, before)
