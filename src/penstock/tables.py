"""Write values of nodes that a program of yours computes to Parquet, under the ids that the user knows."""

import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.storage.export import ColumnType, NodeTableWriter, require_parquet_name
from penstock.storage.graph import GraphStore, open_graph
from penstock.storage.paths import AnyPath

Values = Tensor | NDArray[Any]


def _array(value: Values) -> NDArray[Any]:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach()
    found: NDArray[Any] = (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).cpu().numpy()
    return found


def _column(name: str, value: NDArray[Any]) -> ColumnType:
    if value.ndim not in (1, 2):
        raise ValueError(f"column {name!r} has shape {value.shape}; wanted a value or a row of values per node")
    return ("string" if value.dtype.kind in "OU" else value.dtype.name), (value.shape[1] if value.ndim == 2 else 0)


def write_nodes(graph: GraphStore | AnyPath, out: AnyPath, parts: Iterable[tuple[Values, Mapping[str, Values]]]) -> int:
    """Write a table `id, ...` to a Parquet file, which appears whole at the end; returns the number of rows.

        parts = ((batch.seeds, {"embedding": model(...)}) for batch in loader)
        penstock.write_nodes(graph, "embeddings.parquet", parts)

    Args:
        graph: The graph store, or its folder: ids are written as those that it was made from.
        out: The file.
        parts: Pairs of node ids [n] (of the store, as `batch.seeds` has them) and columns by name, each a tensor or an
            array [n] or [n, width]; the same columns in every pair. Each becomes a row group.

    Raises ValueError for no parts at all, for ids that the graph has not, and for columns that are missing, unknown or
    misshapen; nothing is written then.
    """
    require_parquet_name(os.fspath(out))
    store = graph if isinstance(graph, GraphStore) else open_graph(graph)
    pairs = ((_array(ids), {name: _array(value) for name, value in columns.items()}) for ids, columns in parts)
    first = next(pairs, None)
    if first is None:
        raise ValueError("there is nothing to write: give at least one pair of ids and columns")
    types = {name: _column(name, value) for name, value in first[1].items()}
    with NodeTableWriter(Path(out), store, types) as writer:
        for ids, columns in chain([first], pairs):
            _check_ids(ids, store.num_nodes)
            writer.append(ids, columns)
    return writer.num_rows


def _check_ids(ids: NDArray[Any], num_nodes: int) -> None:
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"node ids are {ids.dtype} {list(ids.shape)}; wanted integers [n], as batch.seeds has them")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < num_nodes:
        raise ValueError(f"node ids {int(ids.min())}..{int(ids.max())} are not all of the graph's 0..{num_nodes - 1}")
