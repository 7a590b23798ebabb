"""`penstock inspect`: say what a folder is and what it holds."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penstock.display import print_columns, print_table, progress
from penstock.locations import EXPERIMENTS, experiment_place, experiments, local_dataset, local_run, seal_dataset
from penstock.run_state import describe_state, epoch_table, state_rows
from penstock.storage.budget import format_bytes
from penstock.storage.chunks import open_chunks, validate_chunks
from penstock.storage.errors import DataError
from penstock.storage.graph import SPLITS, open_graph
from penstock.storage.manifest import MANIFEST, no_folder, read_json
from penstock.storage.pack import open_packset
from penstock.storage.remote.config import is_uri
from penstock.storage.remote.files import open_remote
from penstock.storage.trace import open_trace
from penstock.validation import validate_pack_window, validate_run, validate_trace_window

Description = dict[str, Any]
_LISTED = ("status", "mode", "metrics", "checkpoints")  # of every experiment


def _validated(validate: bool) -> Description:
    return {"validated": True} if validate else {}


def _hops(fanouts: tuple[int, ...]) -> str:
    """Spell the fanouts out, hop by hop from the seeds, so that nobody has to know whose order it is."""
    names = ["all" if fanout < 0 else str(fanout) for fanout in reversed(fanouts)]
    return ", then ".join(f"{name} neighbours of {'each seed' if n == 0 else 'those'}" for n, name in enumerate(names))


def describe_graph(path: Path, *, validate: bool) -> Description:
    """A graph store: sizes, splits; `validate` reads all bytes."""
    graph = open_graph(path)
    if validate:
        graph.validate()
    splits = {f"{split}_nodes": graph.num_rows(f"{split}_ids.npy") for split in SPLITS}
    return {
        "kind": "graph store",
        **asdict(graph.meta),
        **splits,
        "feature_bytes": graph.feature_bytes,
        "topology_bytes": graph.id_dtype.itemsize * graph.num_edges + 8 * (graph.num_nodes + 1),
        "fingerprint": graph.fingerprint,
        **_validated(validate),
    }


def describe_trace(path: Path, *, validate: bool) -> Description:
    """A trace: how it was sampled, and how many rows its items read."""
    trace = open_trace(path)
    indexes = [window.index for window in trace.windows()]
    for index in indexes if validate else ():
        validate_trace_window(path, index)
    return {
        "kind": "trace",
        **asdict(trace.meta),
        "hops": _hops(trace.meta.fanouts),
        "num_items": trace.meta.num_items,
        "input_rows": sum(sum(index.num_inputs) for index in indexes),
        "edges": sum(sum(index.num_edges) for index in indexes),
        "trace_bytes": sum(sum(index.bytes) for index in indexes),
        **_validated(validate),
    }


def describe_packs(path: Path, *, validate: bool) -> Description:
    """A pack set: slots, rows, bytes of the windows that are there; `validate` reads all bytes."""
    meta = open_packset(path)
    windows = sorted(int(file.stem.split("-")[1]) for file in path.glob("window-*.json"))
    for window in windows if validate else ():
        validate_pack_window(path, window)
    return {
        "kind": "pack set",
        **asdict(meta),
        "windows": f"{len(windows)} of {meta.num_windows}",
        "pack_bytes": sum(file.stat().st_size for file in path.glob("window-*.pack")),
        "complete": (path / MANIFEST).is_file() and len(windows) == meta.num_windows,
        **_validated(validate),
    }


def describe_chunks(path: Path, *, validate: bool) -> Description:
    """A graph in chunks: how it was cut, and how many rows chunks read of each other."""
    if validate:
        validate_chunks(path)
    store = open_chunks(path)
    parts = [store.part(part) for part in range(store.meta.num_parts)]
    return {
        "kind": "chunks",
        **asdict(store.meta),
        "halo_rows": sum(int(part.halo_sizes.sum()) for part in parts),
        "largest_chunk_nodes": max(int(part.own_sizes.max()) for part in parts),
        "largest_chunk_edges": max(int(part.edge_sizes.max()) for part in parts),
        **_validated(validate),
    }


def describe_run(path: Path, *, validate: bool) -> Description:
    """A run folder: its state, epochs, result, experiments, and packs where they are; `validate` reads every file."""
    own = describe_state(path) if (path / "config.yaml").is_file() else {"kind": "run"}
    named = {name: describe_state(path / EXPERIMENTS / name) for name in experiments(path)}
    listed = {name: {key: found[key] for key in _LISTED} for name, found in named.items()}
    checked = validate_run(path) | {"validated": True} if validate else {}
    return {**own, **({"experiments": listed} if named else {}), **checked}


def describe(path: Path, *, validate: bool = False) -> Description:
    """Find out what `path` is; DataError where it is nothing of ours."""
    kinds: list[tuple[str, Callable[..., Description]]] = [
        ("config.yaml", describe_run),
        (EXPERIMENTS, describe_run),
        ("packset.json", describe_packs),
    ]
    for marker, describer in kinds:
        if (path / marker).exists():
            return describer(path, validate=validate)
    if (path / MANIFEST).is_file():
        format = read_json(path / MANIFEST).get("format")
        if format == "penstock/graph":
            return describe_graph(path, validate=validate)
        if format == "penstock/trace":
            return describe_trace(path, validate=validate)
        if format == "penstock/chunks":
            return describe_chunks(path, validate=validate)
    if not path.is_dir():
        raise DataError(no_folder(path, MANIFEST, "packset.json", "config.yaml"))
    raise DataError(
        f"{path} is no graph store, trace, pack set, cut graph or run: it has none of {MANIFEST}, packset.json, "
        "config.yaml; if a step was cut off there, run the same command again"
    )


def describe_location(location: Path | str, *, validate: bool = False, stage_dir: Path | None = None) -> Description:
    """`describe` for a folder or a URI of a graph store or a run."""
    if not is_uri(location):
        return describe(Path(location), validate=validate)
    remote = open_remote(str(location))
    if remote.size(MANIFEST) is not None:
        return describe(local_dataset(location, stage_dir), validate=validate)
    names = experiments(location)
    if remote.size("config.yaml") is None and not names:
        raise DataError(f"{location} is no graph store or run: it has neither {MANIFEST} nor config.yaml")
    named = {name: _describe_remote(experiment_place(location, name), stage_dir, validate=validate) for name in names}
    own = _describe_remote(location, stage_dir, validate=validate) if remote.size("config.yaml") is not None else {}
    return {"kind": "run", **own, **({"experiments": named} if named else {})}


def _describe_remote(location: Path | str, stage_dir: Path | None, *, validate: bool) -> Description:
    folder, checkpoints = local_run(location, stage_dir)
    return {**describe(folder, validate=validate), "checkpoints": checkpoints}


def run_inspect(
    path: Path | str, *, validate: bool, as_json: bool, seal: bool = False, stage_dir: Path | None = None
) -> None:
    """Print the description; `seal` first adds checksums of blocks to a graph store that has none."""
    if seal:
        with progress() as show:
            seal_dataset(path, stage_dir, progress=show)
    found = describe_location(path, validate=validate, stage_dir=stage_dir)
    if as_json:
        print(json.dumps(found))
    elif found["kind"] == "run":
        _print_run(str(path), found)
    else:
        print_table(str(path), _rows(found))


def _rows(found: Description) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _cell(key, value)) for key, value in found.items()]


def _cell(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and key.startswith("num_") else str(value)


def _print_run(title: str, found: Description) -> None:
    if "status" in found:
        print_table(title, state_rows(found))
        headings, rows = epoch_table(found)
        if rows:
            print_columns("epochs (* is the best)", headings, rows, ranks=(0, 0, *range(1, len(headings) - 2), 5))
    if named := found.get("experiments", {}):
        print_table(f"experiments of {title}", [(name, _in_brief(its)) for name, its in named.items()])


def _in_brief(experiment: Description) -> str:
    metrics = experiment["metrics"]
    figures = {"epochs": metrics.get("epochs"), **{key: metrics[key] for key in metrics if key.endswith("_accuracy")}}
    shown = [f"{key.replace('_', ' ')} {value:.4g}" for key, value in figures.items() if value is not None]
    return ", ".join([experiment["status"], *shown])
