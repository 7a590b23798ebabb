"""Folders of arrays: our own NumPy convention, and the layout of the Open Graph Benchmark (Hu et al., NeurIPS 2020).

NumPy: `features.npy` [N, F], `edge_index.npy` [2, E] or `src.npy` and `dst.npy`, and optionally `labels.npy`,
`edge_weights.npy`, `node_ids.npy`, and per split `train_ids.npy` or `train_mask.npy` (valid may be called val).

OGB: `raw/` with `edge.csv.gz`, `node-feat.csv.gz`, `node-label.csv.gz`, `num-node-list.csv.gz`, or with `data.npz`
(`edge_index`, `node_feat`) and `node-label.npz` (`node_label`); `split/<scheme>/{train,valid,test}.csv.gz`.
"""

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from penstock.storage.errors import DataError
from penstock.storage.graph import SPLITS, Split
from penstock.storage.ingest.arrays import ArraySource
from penstock.storage.ingest.columns import ArrayColumn, CsvColumn, NpzColumn, open_array
from penstock.storage.ingest.source import Column, file_identity

_ALIASES: dict[Split, tuple[str, ...]] = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}


def _mapped(path: Path) -> ArrayColumn:
    return ArrayColumn(str(path), open_array(path))


def _optional(folder: Path, stem: str) -> ArrayColumn | None:
    path = folder / f"{stem}.npy"
    return _mapped(path) if path.is_file() else None


def _per_split(folder: Path, suffix: str) -> dict[Split, Column]:
    found: dict[Split, Column] = {}
    for split in SPLITS:
        for alias in _ALIASES[split]:
            if column := _optional(folder, f"{alias}_{suffix}"):
                found[split] = column
    return found


def open_numpy_folder(folder: Path) -> ArraySource:
    """Find the arrays; DataError where one that must be there is not, or has another shape."""
    folder = Path(folder)
    inputs = [file_identity(path) for path in sorted(folder.glob("*.npy"))]
    if not (folder / "features.npy").is_file():
        raise DataError(f"{folder / 'features.npy'} is missing; the folder has {[i['name'] for i in inputs]}")
    path = folder / "edge_index.npy"
    src: Column
    dst: Column
    if path.is_file():
        index = open_array(path)
        if index.ndim != 2 or index.shape[0] != 2:
            raise DataError(f"{path} has shape {index.shape}, wanted (2, E)")
        src, dst = ArrayColumn(f"{path}[0]", index[0]), ArrayColumn(f"{path}[1]", index[1])
    else:
        src, dst = _mapped(folder / "src.npy"), _mapped(folder / "dst.npy")
    return ArraySource(
        kind="npy",
        inputs=inputs,
        features=_mapped(folder / "features.npy"),
        src=src,
        dst=dst,
        labels=_optional(folder, "labels"),
        weights=_optional(folder, "edge_weights"),
        node_ids=_optional(folder, "node_ids"),
        masks=_per_split(folder, "mask"),
        split_ids=_per_split(folder, "ids"),
    )


def _number(path: Path) -> int:
    """The one number in an OGB `num-*-list.csv.gz`."""
    try:
        with gzip.open(path, "rt") as file:
            lines = file.read().split()
        return sum(int(line) for line in lines[:1]) if len(lines) == 1 else _refuse_many(path, len(lines))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); download the dataset again") from error


def _refuse_many(path: Path, count: int) -> int:
    raise DataError(f"{path} lists {count} graphs; only datasets of one graph (ogbn-*) can be ingested")


def _split_folder(folder: Path) -> Path | None:
    schemes = sorted(path for path in (folder / "split").glob("*") if path.is_dir())
    if len(schemes) > 1:
        raise DataError(f"{folder / 'split'} has several schemes, {[path.name for path in schemes]}; keep one")
    return schemes[0] if schemes else None


def open_ogb_folder(folder: Path) -> ArraySource:
    """Find the files of a node-property dataset in either raw layout; DataError where they are not there."""
    folder = Path(folder)
    raw = folder / "raw"
    used = sorted(raw.glob("*")) + sorted((folder / "split").glob("*/*"))
    inputs = [file_identity(path) for path in used if path.is_file()]
    columns: dict[str, Any] = {}
    if (raw / "data.npz").is_file():
        columns["features"] = NpzColumn(raw / "data.npz", "node_feat")
        columns["src"] = NpzColumn(raw / "data.npz", "edge_index", 0)
        columns["dst"] = NpzColumn(raw / "data.npz", "edge_index", 1)
        columns["labels"] = NpzColumn(raw / "node-label.npz", "node_label")
    elif (raw / "edge.csv.gz").is_file():
        num_nodes, num_edges = _number(raw / "num-node-list.csv.gz"), _number(raw / "num-edge-list.csv.gz")
        columns["features"] = CsvColumn(raw / "node-feat.csv.gz", np.float64, num_nodes)
        columns["src"] = CsvColumn(raw / "edge.csv.gz", np.int64, num_edges, pick=0)
        columns["dst"] = CsvColumn(raw / "edge.csv.gz", np.int64, num_edges, pick=1)
        columns["labels"] = CsvColumn(raw / "node-label.csv.gz", np.float64, num_nodes)
    else:
        raise DataError(f"{raw} has neither data.npz nor edge.csv.gz; point to the folder of one OGB dataset")
    return ArraySource(kind="ogb", inputs=inputs, split_ids=_ogb_splits(folder), **columns)


def _ogb_splits(folder: Path) -> Mapping[Split, Column]:
    scheme = _split_folder(folder)
    found: dict[Split, Column] = {}
    for split in SPLITS:
        path = None if scheme is None else scheme / f"{split}.csv.gz"
        if path is not None and path.is_file():
            found[split] = CsvColumn(path, np.int64, -1, pick=0)
    return found
