"""The graph store: golden folders of every version that must read forever, and damage of every kind."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.storage.errors import FormatError
from penstock.storage.graph import GraphStore, open_graph
from penstock.storage.ingest import IngestOptions, ingest_parquet
from penstock.storage.manifest import read_json, write_json

OLD = Path(__file__).parent / "golden" / "graph_v1"
GOLDEN = OLD.with_name("graph_v2")


def build_golden(folder: Path) -> GraphStore:
    """Make the store that lies in `golden/`."""
    folder.mkdir(parents=True)
    nodes = {
        "id": [10, 7, 25, 3, 8],
        "feature": [[0.5 * n, -1.0, n * n] for n in range(5)],
        "label": [0, 2, 1, None, 0],
        "split": ["train", "val", "test", None, "train"],
    }
    edges = {"src": [10, 3, 25, 8, 10], "dst": [7, 7, 3, 10, 7], "weight": [1.0, 0.5, 2.0, 4.0, 8.0]}
    pq.write_table(pa.table(nodes), folder / "nodes.parquet")
    pq.write_table(pa.table(edges), folder / "edges.parquet")
    tables = folder / "nodes.parquet", folder / "edges.parquet"
    return ingest_parquet(*tables, folder / "graph", IngestOptions(), host_memory=32 << 20)


@pytest.mark.parametrize("folder", [OLD, GOLDEN], ids=lambda folder: folder.name)
def test_every_version_reads_forever(folder: Path) -> None:
    store = open_graph(folder)
    store.validate()
    assert store.fingerprint == "198fb35a67ff0421"
    assert (store.num_nodes, store.num_edges, store.meta.num_classes) == (5, 5, 3)
    assert store.indptr.tolist() == [0, 1, 4, 4, 5, 5] and store.indices.tolist() == [4, 0, 0, 3, 2]
    assert store.edge_weights is not None and store.edge_weights.tolist() == [4, 1, 8, 0.5, 2]
    assert store.features.tolist() == [[0.5 * n, -1, n * n] for n in range(5)]
    assert store.labels.tolist() == [0, 2, 1, -1, 0]
    assert [store.split_ids(s).tolist() for s in ("train", "valid", "test")] == [[0, 4], [1], [2]]
    assert store.original_ids(1, 4).tolist() == [7, 25, 3]
    assert store.feature_bytes == 60 and store.feature_path.read_bytes()[store.feature_offset :][:4] == bytes(4)


def test_the_writer_writes_the_golden_bytes(tmp_path: Path, folder_bytes: Callable[[Path], dict[str, bytes]]) -> None:
    ours, golden = folder_bytes(build_golden(tmp_path / "in").path), folder_bytes(GOLDEN)
    assert ours == golden


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "copy"))


def _change(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = read_json(folder / "manifest.json")
    change(value)
    write_json(folder / "manifest.json", value)


def test_unknown_meta_is_refused(copy: Path) -> None:
    _change(copy, lambda value: value["meta"].update(more=1))
    with pytest.raises(FormatError, match=r"graph meta has keys .*'more'"):
        open_graph(copy)


def test_unknown_row_dtypes_are_refused(copy: Path) -> None:
    _change(copy, lambda value: value["meta"].update(feature_dtype="float8"))
    with pytest.raises(FormatError, match="feature dtype 'float8' is none of"):
        open_graph(copy)


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*.npy")))
def test_cut_and_missing_files_are_found_on_opening(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(FormatError, match=rf"{name} has {len(data) - 1} bytes, its manifest says {len(data)}"):
        open_graph(copy)
    (copy / name).unlink()
    with pytest.raises(FormatError, match=rf"{name} is missing"):
        open_graph(copy)


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*.npy")))
def test_flipped_bits_are_found_by_validation(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    store = open_graph(copy)
    store.validate(checksums=False) if name != "indptr.npy" else None
    with pytest.raises(FormatError, match=rf"{name} has checksum"):
        store.validate()


def test_a_topology_that_contradicts_the_manifest_is_found(copy: Path) -> None:
    _change(copy, lambda value: value["meta"].update(num_edges=6))
    with pytest.raises(FormatError, match="5 nodes and 6 edges; rebuild the store"):
        open_graph(copy).validate()


def test_original_ids_of_any_nodes(tiny_graph: GraphStore) -> None:
    assert open_graph(GOLDEN).original_ids_of(np.array([4, 0])).tolist() == [8, 10]
    assert tiny_graph.original_ids_of(np.array([4, 0], np.int32)).tolist() == [4, 0]


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist: the folder is not complete"):
        open_graph(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "penstock/pack", "version": 1}')
    with pytest.raises(FormatError, match="has format 'penstock/pack', wanted 'penstock/graph'"):
        open_graph(str(tmp_path))
