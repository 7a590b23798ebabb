"""The folder of a node-property dataset of the Open Graph Benchmark (Hu et al., NeurIPS 2020), as downloaded.

`raw/` with `edge.csv.gz`, `node-feat.csv.gz`, `node-label.csv.gz`, `num-node-list.csv.gz`, or with `data.npz`
(`edge_index`, `node_feat`) and `node-label.npz` (`node_label`); `split/<scheme>/{train,valid,test}.csv.gz`.

OGB's loader adds the reverse of every edge where its `master.csv` says `add_inverse_edge`, and so do we, without
merging: for the datasets that it lists, and where a `master.csv` lies beside the folder.
"""

import csv
import gzip
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from penstock.storage.errors import DataError
from penstock.storage.graph import SPLITS, Split
from penstock.storage.ingest.arrays import ArraySource
from penstock.storage.ingest.columns import CsvColumn, NpzColumn
from penstock.storage.ingest.inputs import InputFile
from penstock.storage.ingest.source import Column

logger = logging.getLogger(__name__)

_ADDS_INVERSE = {"arxiv": False, "products": True, "proteins": True, "papers100m": False}  # of OGB's master.csv
_HETEROGENEOUS = (
    *("num-node-dict.csv.gz", "triplet-type-list.csv.gz", "relations"),
    *("num_nodes_dict.npz", "edge_index_dict.npz"),
)
_READ_NPZ = {"edge_index", "node_feat", "num_nodes_list", "num_edges_list"}


def _number(path: Path) -> int:
    """The one number in an OGB `num-*-list.csv.gz`."""
    try:
        with gzip.open(path, "rt") as file:
            lines = file.read().split()
        return sum(int(line) for line in lines[:1]) if len(lines) == 1 else _refuse_many(path, len(lines))
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read ({error}); download the dataset again") from error


def _refuse_many(path: Path, count: int) -> int:
    raise DataError(f"{path} lists {count} graphs; only datasets of one graph (ogbn-*) can be ingested")


def _key(folder: Path) -> str:
    name = folder.resolve().name.lower().replace("_", "-")
    return name.removeprefix("ogbn-").removesuffix("-bin")


def _adds_inverse(folder: Path) -> bool:
    """Whether OGB's loader adds reverse edges, from a `master.csv` beside the folder or from the dataset's name."""
    for place in (folder, folder.resolve().parent):
        if (place / "master.csv").is_file():
            with open(place / "master.csv", newline="") as file:
                rows = {row[0]: row[1:] for row in csv.reader(file) if row}
            said = dict(zip(rows.get("", []), rows.get("add_inverse_edge", []), strict=False))
            found = {name.lower().replace("_", "-").removeprefix("ogbn-"): value for name, value in said.items()}
            if _key(folder) in found:
                return found[_key(folder)].strip().lower() == "true"
    if _key(folder) in _ADDS_INVERSE:
        return _ADDS_INVERSE[_key(folder)]
    logger.warning(
        "%s is not named after a dataset of OGB, and no master.csv lies beside it: edges are taken as they are; if "
        "OGB's loader adds their reverse (add_inverse_edge), give --set undirected=true",
        folder,
    )
    return False


def _split_folder(folder: Path) -> Path | None:
    schemes = sorted(path for path in (folder / "split").glob("*") if path.is_dir() and path.name[0] not in "._")
    if len(schemes) > 1:
        raise DataError(f"{folder / 'split'} has several schemes, {[path.name for path in schemes]}; keep one")
    return schemes[0] if schemes else None


def _splits(scheme: Path | None) -> dict[Split, Path]:
    """The files of the splits. A pickled `split_dict.pt` is never read: it may run any code."""
    if scheme is None:
        return {}
    found: dict[Split, Path] = {split: scheme / f"{split}.csv.gz" for split in SPLITS}
    found = {split: path for split, path in found.items() if path.is_file()}
    pickled = scheme / "split_dict.pt"
    if pickled.is_file() and not found:
        raise DataError(
            f"{pickled} is a pickle, which is not read because it may run any code; if you trust it, write "
            f'train.csv.gz, valid.csv.gz and test.csv.gz beside it, one id per line: python -c "import numpy, torch; '
            f"splits = torch.load('{pickled}', weights_only=False); "
            f"[numpy.savetxt(f'{scheme}/{{name}}.csv.gz', splits[name], fmt='%d') for name in splits]\""
        )
    if pickled.is_file():
        logger.warning("%s, which OGB's loader prefers, is a pickle and not read: splits are those of .csv.gz", pickled)
    return found


def _has_lines(path: Path) -> bool:
    try:
        with gzip.open(path, "rb") as file:
            return bool(file.read(1))
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); download the dataset again") from error


def _npz_columns(raw: Path) -> tuple[dict[str, Any], list[str]]:
    path, labels = raw / "data.npz", raw / "node-label.npz"
    columns: dict[str, Any] = {"features": NpzColumn(path, "node_feat")}
    for row, end in enumerate(("src", "dst")):
        columns[end] = NpzColumn(path, "edge_index", row)
        if columns[end].whole_shape[0] != 2:
            raise DataError(f"{path}: edge_index has shape {columns[end].whole_shape}, wanted (2, E)")
    if labels.is_file():
        columns["label_column"] = NpzColumn(labels, "node_label")
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy") for name in archive.namelist()}
    for name in sorted(members - _READ_NPZ):
        logger.warning("%s: %s is not used", path, name)
    return columns, ["data.npz", "node-label.npz"]


def _csv_columns(raw: Path) -> tuple[dict[str, Any], list[str]]:
    names = ["edge.csv.gz", "node-feat.csv.gz", "node-label.csv.gz", "num-node-list.csv.gz", "num-edge-list.csv.gz"]
    edges, features, labels, num_nodes, num_edges = (raw / name for name in names)
    for path in (features, num_nodes, num_edges):
        if not path.is_file():
            raise DataError(f"{path} is missing; {raw} has {sorted(entry.name for entry in raw.iterdir())}")
    columns: dict[str, Any] = {"features": CsvColumn(features, np.float64, _number(num_nodes))}
    for pick, end in enumerate(("src", "dst")):
        columns[end] = CsvColumn(edges, np.int64, _number(num_edges), pick=pick)
    if labels.is_file():
        columns["label_column"] = CsvColumn(labels, np.float64, _number(num_nodes))
    return columns, names


def open_ogb_folder(folder: Path) -> ArraySource:
    """Find the files of a node-property dataset in either raw layout; DataError where they are not there."""
    folder = Path(folder)
    raw = folder / "raw"
    if there := [name for name in _HETEROGENEOUS if (raw / name).exists()]:
        raise DataError(
            f"{folder} is heterogeneous (raw/{there[0]}): it has several types of nodes and edges; ingest takes one "
            "type of each: write the relation that you want as Parquet tables"
        )
    if (raw / "data.npz").is_file():
        columns, names = _npz_columns(raw)
    elif (raw / "edge.csv.gz").is_file():
        columns, names = _csv_columns(raw)
    else:
        raise DataError(f"{raw} has neither data.npz nor edge.csv.gz; point to the folder of one OGB dataset")
    unused = sorted(path.name for path in raw.iterdir() if path.name not in names and path.name[0] not in "._")
    if unused:
        logger.warning("files of %s that are not used: %s", raw, ", ".join(unused))
    splits = _splits(_split_folder(folder))
    files = [raw / name for name in names if (raw / name).is_file()] + list(splits.values())
    split_ids: dict[Split, Column] = {
        split: CsvColumn(path, np.int64, -1, pick=0) for split, path in splits.items() if _has_lines(path)
    }
    return ArraySource(
        kind="ogb",
        inputs=[InputFile(role=path.name, path=path) for path in files],
        split_ids=split_ids,
        adds_inverse=_adds_inverse(folder),
        **columns,
    )
