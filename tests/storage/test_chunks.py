"""The chunk store: golden folders of every version that must read forever, and damage of every kind."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.write import write_chunks
from penstock.storage.chunks import ChunkStore, open_chunks, validate_chunks
from penstock.storage.errors import FormatError
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import read_json, write_json, write_manifest

OLD = Path(__file__).parent / "golden" / "chunks_v1"
GOLDEN = OLD.with_name("chunks_v2")


def build_golden(folder: Path, make_graph: Callable[..., GraphStore]) -> ChunkStore:
    """Make the store that lies in `golden/`: 8 nodes, 2 parts x 2 chunks, a self loop, weights."""
    edges = [[1, 0], [4, 0], [7, 0], [2, 1], [0, 2], [6, 3], [7, 3], [3, 3], [0, 5], [1, 6], [5, 7]]
    graph = make_graph(8, edges, weights=np.arange(11, dtype=np.float32) / 2)
    parts, chunks = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 1, 0, 1, 0, 0, 1, 1])
    config = PartitionConfig(chunks=2, parts=2)
    return write_chunks(graph, folder, config, host_memory=64 << 20, threads=1, assignment=(parts, chunks))


@pytest.mark.parametrize("folder", [OLD, GOLDEN], ids=lambda folder: folder.name)
def test_the_golden_stores_read(folder: Path) -> None:
    store = open_chunks(folder)
    validate_chunks(folder)
    meta = store.meta
    assert (meta.num_nodes, meta.num_edges, meta.num_chunks, meta.num_parts, meta.method) == (8, 11, 2, 2, "given")
    assert (meta.cut_edges, meta.part_cut_edges, meta.part_alpha, meta.balance) == (4, 6, 5 / 8, 1.0)
    chunk = store.part(0).chunk(0)
    assert chunk.node_ids.tolist() == [0, 2] and chunk.halo_ids.tolist() == [4, 1, 7]
    assert chunk.indptr.tolist() == [0, 3, 4] and chunk.indices.tolist() == [3, 2, 4, 0]
    assert chunk.edge_weights is not None and chunk.edge_weights.tolist() == [0.0, 0.5, 1.0, 2.0]
    assert chunk.degrees.tolist() == [3, 1, 0, 1, 1]
    assert chunk.halo_offsets.tolist() == [0, 1, 3] and chunk.mirror_counts.tolist() == [0, 1]
    assert chunk.send_rows.tolist() == [2, 1] and chunk.send_offsets.tolist() == [0, 1, 2]
    assert [rows.tolist() for rows in chunk.wire_rows] == [[], [0]]
    assert store.part(0).run_sizes.tolist() == [[1, 1], [2, 2]]


def test_the_writer_writes_the_golden_bytes(
    tmp_path: Path, make_graph: Callable[..., GraphStore], folder_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    ours, golden = folder_bytes(build_golden(tmp_path / "chunks", make_graph).path), folder_bytes(GOLDEN)
    assert ours.keys() == golden.keys()
    assert ours == golden


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "chunks"))


FILES = sorted(str(path.relative_to(GOLDEN)) for path in GOLDEN.rglob("*.npy"))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(FormatError, match=f"{Path(name).name} has checksum"):
        validate_chunks(copy)


def test_missing_and_cut_files_are_found(copy: Path) -> None:
    path = copy / "part-001" / "indices.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FormatError, match=r"indices.npy has 41\d\d bytes"):
        open_chunks(copy)
    path.unlink()
    with pytest.raises(FormatError, match="indices.npy is missing"):
        open_chunks(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(FormatError, match="the folder is not complete"):
        open_chunks(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "has version 3 of penstock/chunks"),
        ({"format": "penstock/graph"}, "wanted 'penstock/chunks'"),
        ({"meta": {"graph": "00"}}, "chunk meta has keys"),
    ],
)
def test_other_manifests_are_refused(copy: Path, change: dict[str, Any], message: str) -> None:
    write_json(copy / "manifest.json", {**read_json(copy / "manifest.json"), **change})
    with pytest.raises(FormatError, match=message):
        open_chunks(copy)


def test_sizes_that_disagree_are_found(copy: Path) -> None:
    store = open_chunks(copy)
    store.manifest.meta["num_edges"] = 12
    write_manifest(copy, store.manifest)
    with pytest.raises(FormatError, match="8 nodes and 11 edges, its manifest says 8 and 12"):
        validate_chunks(copy)
