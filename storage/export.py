"""Write values of nodes, such as embeddings and predictions, to Parquet under the user's own ids."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from penstock.storage.errors import full_disk_is_clear
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import fsync_folder

# NumPy's name of the dtype, or "string", and the width: 0 for one value per node, n for a list of n
ColumnType = tuple[str, int]


def _arrow_type(column: ColumnType) -> pa.DataType:
    dtype, width = column
    value = pa.string() if dtype == "string" else pa.from_numpy_dtype(np.dtype(dtype))
    return pa.list_(value, width) if width else value


def require_parquet_name(path: Path | str) -> None:
    """ValueError where a file of this name would be taken for something else than Parquet by its suffix."""
    suffix = Path(path).suffix
    if suffix.lower() not in (".parquet", ".pq", ""):
        raise ValueError(f"{path} would be a Parquet file named {suffix}; give a name that ends in .parquet")


class NodeTableWriter:
    """Stream a node table `id, *columns` to `path`; it appears there whole when the context ends without an error.

    `columns` maps each name to its type, for example `{"embedding": ("float32", 64), "prediction": ("int64", 0)}`.
    Every `append` becomes one row group, so call it with chunks that you can afford. Not safe for several threads.
    ValueError where the name says another format.
    """

    def __init__(self, path: Path, graph: GraphStore, columns: Mapping[str, ColumnType]) -> None:
        require_parquet_name(path)
        if "id" in columns:
            raise ValueError("column 'id' is written from the graph; give the others only")
        self.path, self._graph, self._columns = Path(path), graph, dict(columns)
        id_type = pa.string() if graph.meta.original_ids == "string" else pa.int64()
        fields = [(name, _arrow_type(column)) for name, column in self._columns.items()]
        self._schema = pa.schema([("id", id_type), *fields])
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")
        self.num_rows = 0

    def __enter__(self) -> "NodeTableWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with full_disk_is_clear(self.path):
            self._file = open(self._temporary, "wb")
            self._writer = pq.ParquetWriter(self._file, self._schema)
        return self

    def append(self, node_ids: NDArray[np.integer], values: Mapping[str, NDArray[np.generic]]) -> None:
        """Add rows for `node_ids` [n]; `values` holds every column as [n] or [n, width].

        ValueError for missing, unknown or misshapen columns, before anything of this call is written.
        """
        if set(values) != set(self._columns):
            raise ValueError(f"got columns {sorted(values)}, this table has {sorted(self._columns)}")
        arrays = [pa.array(self._graph.original_ids_of(node_ids), self._schema.field("id").type)]
        arrays += [self._array(name, values[name], len(node_ids)) for name in self._columns]
        with full_disk_is_clear(self.path):
            self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self.num_rows += len(node_ids)

    def _array(self, name: str, value: NDArray[np.generic], num_rows: int) -> pa.Array:
        dtype, width = self._columns[name]
        shape = (num_rows, width) if width else (num_rows,)
        if value.shape != shape:
            raise ValueError(f"column {name!r} has shape {value.shape}, wanted {shape}")
        given = value if dtype == "string" else np.ascontiguousarray(value, dtype=dtype)
        flat = pa.array(given.reshape(-1), _arrow_type((dtype, 0)))
        return pa.FixedSizeListArray.from_arrays(flat, width) if width else flat

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            with full_disk_is_clear(self.path):
                self._writer.close()
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    os.replace(self._temporary, self.path)
                    fsync_folder(self.path.parent)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
