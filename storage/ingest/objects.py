"""DGL graphs and PyG `Data` in memory, by duck typing: neither library is imported."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.storage.errors import DataError
from penstock.storage.ingest.arrays import ArraySource
from penstock.storage.ingest.columns import ArrayColumn
from penstock.storage.ingest.inputs import InputDigest
from penstock.storage.ingest.values import SPLIT_ALIASES, find_split_names

logger = logging.getLogger(__name__)

_MASKS = {f"{alias}_mask": split for split, aliases in SPLIT_ALIASES.items() for alias in aliases}
_NO_EDGE_INDEX = (
    "; where there is an adj_t, give data.edge_index = torch_geometric.utils.to_edge_index(data.adj_t)[0].flip(0)"
)


def _array(name: str, tensor: Any) -> NDArray[Any]:
    """View a tensor, or anything NumPy takes, as an array; types that NumPy lacks (bfloat16) as float32."""
    if hasattr(tensor, "detach"):
        if str(tensor.layout) != "torch.strided":
            raise DataError(f"{name} is a sparse tensor ({tensor.layout}); give {name}.to_dense()")
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.dtype.is_floating_point and tensor.dtype.itemsize < 4 else tensor
        return np.asarray(tensor.resolve_conj().resolve_neg().numpy())
    if hasattr(tensor, "to_dense") or hasattr(tensor, "toarray"):
        raise DataError(f"{name} is sparse ({type(tensor).__name__}); give a dense tensor or array")
    try:
        array = np.asarray(tensor)
    except ValueError as error:
        raise DataError(f"{name} is no array ({error}); give a tensor") from error
    if array.dtype.kind == "O":
        raise DataError(f"{name} holds objects ({type(tensor).__name__}); give a tensor of numbers")
    return array


def _source(kind: str, arrays: Mapping[str, tuple[str, Any]]) -> ArraySource:
    """Make a source of arrays under their names here and there; its identity is a digest of their bytes."""
    columns: dict[str, Any] = {}
    inputs = []
    for role, (name, tensor) in arrays.items():
        if tensor is not None:
            array = _array(name, tensor)
            inputs.append(InputDigest(role=name, digest=_digest(array)))
            columns[role] = ArrayColumn(name, array)
    masks = {_MASKS[role]: columns.pop(role) for role in list(columns) if role in _MASKS}
    return ArraySource(kind=kind, inputs=inputs, masks=masks, **columns)


def _digest(array: NDArray[Any]) -> str:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
    return f"{array.dtype.str}{list(array.shape)} {xxhash.xxh3_128_hexdigest(data)}"


def _name_unused(what: str, names: Iterable[str]) -> None:
    if unused := sorted(str(name) for name in names):
        logger.warning("%s that are not used: %s", what, ", ".join(unused))


def dgl_source(graph: Any) -> ArraySource:
    """Read a homogeneous DGL graph: `ndata` feat, label and masks, `edata` weight (or w)."""
    if not graph.is_homogeneous:
        raise DataError(
            f"the DGL graph is heterogeneous: node types {graph.ntypes}, edge types {graph.etypes}; ingest takes one "
            "type of each: pick one, as g[etype], or merge them with dgl.to_homogeneous"
        )
    nodes, edges = graph.ndata, graph.edata
    if "feat" not in nodes:
        raise DataError(f"the DGL graph has no ndata['feat']; it has {sorted(nodes)}")
    if "weight" in edges and "w" in edges:
        raise DataError("the DGL graph has edata['weight'] and edata['w'], which both mean the weight; keep one")
    weight = "weight" if "weight" in edges else "w"
    masks = find_split_names(nodes, "mask").values()
    _name_unused("ndata of the DGL graph", set(nodes) - {"feat", "label", *masks})
    _name_unused("edata of the DGL graph", set(edges) - {weight})
    src, dst = graph.edges(order="eid")
    arrays = {
        "features": ("dgl ndata['feat']", nodes["feat"]),
        "src": ("dgl src", src),
        "dst": ("dgl dst", dst),
        "label_column": ("dgl ndata['label']", nodes.get("label")),
        "weights": (f"dgl edata[{weight!r}]", edges.get(weight)),
    }
    return _source("dgl", arrays | {name: (f"dgl ndata[{name!r}]", nodes[name]) for name in masks})


def _pyg_edges(data: Any) -> tuple[Any, Any]:
    shape = tuple(getattr(data.edge_index, "shape", ()))
    if len(shape) != 2 or shape[0] != 2:
        hint = ": transpose it, data.edge_index.t()" if len(shape) == 2 and shape[1] == 2 else ""
        raise DataError(f"pyg edge_index has shape {shape}, wanted (2, E){hint}")
    return data.edge_index[0], data.edge_index[1]


def pyg_source(data: Any) -> ArraySource:
    """Read a PyG `Data`: `x`, `edge_index`, `y`, `edge_weight` and masks."""
    if hasattr(data, "node_types") and hasattr(data, "edge_types"):
        raise DataError(
            f"the PyG data is heterogeneous: node types {data.node_types}; ingest takes one type of nodes and of "
            "edges: pick one, or merge them with data.to_homogeneous()"
        )
    given = {name: data[name] for name in data.keys()} if hasattr(data, "keys") else dict(vars(data))
    missing = [name for name in ("x", "edge_index") if given.get(name) is None]
    if missing:
        hint = _NO_EDGE_INDEX if "edge_index" in missing else ""
        raise DataError(f"the PyG data has no {' and no '.join(missing)}; it has {sorted(given)}{hint}")
    masks = find_split_names([name for name in given if given[name] is not None], "mask").values()
    used = {"x", "edge_index", "y", "edge_weight", "num_nodes", *masks}
    _name_unused("attributes of the PyG data", (name for name in given if name not in used and given[name] is not None))
    src, dst = _pyg_edges(data)
    arrays = {
        "features": ("pyg x", given["x"]),
        "src": ("pyg edge_index[0]", src),
        "dst": ("pyg edge_index[1]", dst),
        "label_column": ("pyg y", given.get("y")),
        "weights": ("pyg edge_weight", given.get("edge_weight")),
    }
    return _source("pyg", arrays | {name: (f"pyg {name}", given[name]) for name in masks})
