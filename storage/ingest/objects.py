"""DGL graphs and PyG `Data` in memory, by duck typing: neither library is imported."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.storage.errors import DataError
from penstock.storage.graph import Split
from penstock.storage.ingest.arrays import ArraySource
from penstock.storage.ingest.columns import ArrayColumn
from penstock.storage.ingest.source import Column

_MASKS: dict[str, Split] = {"train_mask": "train", "val_mask": "valid", "valid_mask": "valid", "test_mask": "test"}


def _array(tensor: Any) -> NDArray[Any]:
    """View a tensor, or anything NumPy takes, as an array; types that NumPy lacks (bfloat16) as float32."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.dtype.is_floating_point and tensor.dtype.itemsize < 4 else tensor
        return np.asarray(tensor.numpy())
    return np.asarray(tensor)


def _source(kind: str, arrays: Mapping[str, Any]) -> ArraySource:
    """Make a source of named arrays, some of which are masks; its identity is a digest of their bytes."""
    columns: dict[str, Any] = {}
    masks: dict[Split, Column] = {}
    inputs = []
    for name, tensor in arrays.items():
        if tensor is None:
            continue
        array = _array(tensor)
        inputs.append({"name": name, "shape": list(array.shape), "xxh3": _digest(array)})
        column = ArrayColumn(f"{kind} {name}", array)
        if name in _MASKS:
            masks[_MASKS[name]] = column
        else:
            columns[name] = column
    return ArraySource(kind=kind, inputs=inputs, masks=masks, **columns)


def _digest(array: NDArray[Any]) -> str:
    return str(xxhash.xxh3_64_hexdigest(np.ascontiguousarray(array).data.cast("B") if array.size else b""))


def dgl_source(graph: Any) -> ArraySource:
    """Read a homogeneous DGL graph: `ndata` feat, label and masks, `edata` weight (or w)."""
    if not graph.is_homogeneous:
        raise DataError(f"the DGL graph has node types {graph.ntypes}; convert it with dgl.to_homogeneous first")
    nodes, edges = graph.ndata, graph.edata
    if "feat" not in nodes:
        raise DataError(f"the DGL graph has no ndata['feat']; it has {sorted(nodes)}")
    src, dst = graph.edges(order="eid")
    arrays = {"features": nodes["feat"], "src": src, "dst": dst, "labels": nodes.get("label")}
    arrays["weights"] = edges.get("weight", edges.get("w"))
    return _source("dgl", arrays | {name: nodes[name] for name in _MASKS if name in nodes})


def pyg_source(data: Any) -> ArraySource:
    """Read a PyG `Data`: `x`, `edge_index`, `y`, `edge_weight` and masks."""
    missing = [name for name in ("x", "edge_index") if getattr(data, name, None) is None]
    if missing:
        raise DataError(f"the PyG data has no {' and no '.join(missing)}; convert adj_t, or a HeteroData, first")
    arrays = {"features": data.x, "src": data.edge_index[0], "dst": data.edge_index[1], "labels": data.y}
    arrays["weights"] = getattr(data, "edge_weight", None)
    return _source("pyg", arrays | {name: getattr(data, name, None) for name in _MASKS})
