from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from penstock.storage import graph as graph_module
from penstock.storage.errors import DoesNotFit
from penstock.storage.export import NodeTableWriter
from penstock.storage.graph import ORIGINAL_IDS_GROUP, GraphStore
from penstock.storage.ingest import IngestOptions, ingest_npy, ingest_parquet

COLUMNS = {"embedding": ("float32", 3), "prediction": ("int64", 0)}


def _values(ids: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {"embedding": np.outer(ids, [1, 2, 3]).astype(np.float32), "prediction": ids % 5}


def test_tables_stream_under_dense_ids(tmp_path: Path, tiny_graph: GraphStore) -> None:
    with NodeTableWriter(tmp_path / "new" / "t.parquet", tiny_graph, COLUMNS) as writer:
        for lo in range(0, 400, 150):
            ids = np.arange(lo, min(400, lo + 150))
            writer.append(ids, _values(ids))
        assert not writer.path.exists()
    table = pq.read_table(writer.path)
    assert table["id"].to_pylist() == list(range(400)) and writer.num_rows == 400
    assert table["embedding"][7].as_py() == [7, 14, 21] and table["prediction"][7].as_py() == 2
    assert [path.name for path in writer.path.parent.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize("kind", ["integers", "strings"])
def test_tables_have_the_ids_of_the_user(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    numbers = np.random.default_rng(0).permutation(70_000)
    features, index = np.ones((70_000, 1), np.float32), np.zeros((2, 1), np.int64)
    if kind == "integers":
        for name, array in (("features", features), ("node_ids", numbers), ("edge_index", index + numbers[0])):
            np.save(folder / f"{name}.npy", array)
        store = ingest_npy(folder, tmp_path / "g", IngestOptions(), host_memory=32 << 20)
    else:
        names = [f"n{n}" for n in numbers]
        edge = {"src": names[:1], "dst": names[:1]}
        pq.write_table(pa.table({"id": names, "feature": [[1.0]] * 70_000}), folder / "n.parquet")
        pq.write_table(pa.table(edge), folder / "e.parquet")
        store = ingest_parquet(
            folder / "n.parquet", folder / "e.parquet", tmp_path / "g", IngestOptions(), host_memory=32 << 20
        )
    ids = np.array([69_999, 3, 65_536, 65_535, 3])
    with NodeTableWriter(tmp_path / "t.parquet", store, COLUMNS) as writer:
        writer.append(ids, _values(ids))
    wanted = numbers[ids].tolist() if kind == "integers" else [f"n{n}" for n in numbers[ids]]
    assert pq.read_table(tmp_path / "t.parquet")["id"].to_pylist() == wanted


def test_an_error_leaves_the_last_good_table(tmp_path: Path, tiny_graph: GraphStore) -> None:
    path, ids = tmp_path / "t.parquet", np.arange(3)
    with NodeTableWriter(path, tiny_graph, COLUMNS) as writer:
        writer.append(ids, _values(ids))
    before = path.read_bytes()
    with pytest.raises(RuntimeError), NodeTableWriter(path, tiny_graph, COLUMNS) as writer:
        writer.append(ids + 5, _values(ids))
        raise RuntimeError
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize(
    "values",
    [
        {"embedding": np.zeros((3, 3))},
        {"embedding": np.zeros((3, 2)), "prediction": np.zeros(3)},
        {"embedding": np.zeros((3, 3)), "prediction": np.zeros(2)},
        {"embedding": np.zeros((3, 3)), "prediction": np.zeros(3), "more": np.zeros(3)},
    ],
)
def test_wrong_columns_are_refused(tmp_path: Path, tiny_graph: GraphStore, values: dict[str, NDArray[Any]]) -> None:
    with NodeTableWriter(tmp_path / "t.parquet", tiny_graph, COLUMNS) as writer:
        with pytest.raises(ValueError, match="column"):
            writer.append(np.arange(3), values)
    assert writer.num_rows == 0
    with pytest.raises(ValueError, match="written from the graph"):
        NodeTableWriter(tmp_path / "t.parquet", tiny_graph, {"id": ("int64", 0)})


def test_a_full_disk_is_clear(small_disk: Path, tiny_graph: GraphStore) -> None:
    ids = np.arange(400).repeat(5000)
    with pytest.raises(DoesNotFit, match="the disk is full while writing"):
        with NodeTableWriter(small_disk / "t.parquet", tiny_graph, {"x": ("float32", 8)}) as writer:
            for seed in range(4):
                rows = np.random.default_rng(seed).random((len(ids), 8), np.float32)
                writer.append(ids, {"x": rows})
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20, 16 << 20])
def test_string_ids_in_any_order(tmp_path: Path, kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups that are decoded stay so within a bound, and what is read does not depend on it."""
    num_nodes = 3 * ORIGINAL_IDS_GROUP + 5
    names = np.array([f"node/{n}" for n in np.random.default_rng(0).permutation(num_nodes)])
    nodes = pa.table({"id": names, "feature": np.zeros(num_nodes, np.float32)})
    pq.write_table(nodes, tmp_path / "n.parquet")
    pq.write_table(pa.table({"src": names[:2], "dst": names[1:3]}), tmp_path / "e.parquet")
    tables = tmp_path / "n.parquet", tmp_path / "e.parquet"
    store = ingest_parquet(*tables, tmp_path / "g", IngestOptions(), host_memory=64 << 20)
    monkeypatch.setattr(graph_module, "_STRINGS_BYTES", kept_bytes)
    order = np.random.default_rng(1).permutation(num_nodes)
    for lo in range(0, 9000, 3000):
        assert store.original_ids_of(order[lo : lo + 3000]) == names[order[lo : lo + 3000]].tolist()
    held = sum(group.nbytes for group in store._string_groups.values())
    assert len(store._string_groups) == 1 or held <= kept_bytes
