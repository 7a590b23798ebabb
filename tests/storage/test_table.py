import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.inspection import run_inspect
from penstock.locations import local_dataset
from penstock.storage.blocks import BLOCK_BYTES
from penstock.storage.directio import page_up
from penstock.storage.errors import FormatError
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore, open_graph, seal_graph
from penstock.storage.manifest import write_manifest
from penstock.storage.rows import ROW_DTYPES, RowDtype, RowFormat, encode_rows
from penstock.storage.table import FeatureTable, gather_rows


@given(ids=st.lists(st.integers(0, 399), max_size=60).map(sorted))
def test_rows_are_those_of_the_table(tiny_graph: GraphStore, ids: list[int]) -> None:
    out = np.empty((len(ids), 80), np.uint8)
    gather_rows(tiny_graph, np.array(ids, np.int64), out)
    np.testing.assert_array_equal(out.view(np.float32), tiny_graph.features[ids])


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_rows_of_another_dtype_equal_the_packers(tiny_graph: GraphStore, dtype: RowDtype) -> None:
    row_format = RowFormat(dtype=dtype, width=20)
    ids = np.array([0, 5, 6, 399])
    out = np.empty((4, row_format.row_bytes), np.uint8)
    gather_rows(tiny_graph, ids, out, row_format)
    assert out.tobytes() == encode_rows(np.array(tiny_graph.features[ids]), row_format).tobytes()


@pytest.mark.parametrize("ids", [[-1, 3], [3, 400], [5, 4]])
def test_ids_out_of_range_or_order_are_refused(tiny_graph: GraphStore, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"ascend within \[0, 400\)"):
        gather_rows(tiny_graph, np.array(ids), np.empty((2, 80), np.uint8))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """Twelve blocks of rows of 1,200 bytes, so that some lie across two blocks."""
    config = GenerateConfig(num_nodes=10_000, avg_degree=1, num_features=300, num_classes=2, seed=1)
    return generate_graph(tmp_path_factory.mktemp("large") / "graph", config, host_memory=64 << 20)


def test_rows_come_in_whole_blocks_and_each_block_once(large: GraphStore) -> None:
    ids = np.array([0, 1, 873, 6000, 9999])  # row 873 lies across the first two blocks
    out = np.empty((len(ids), 1200), np.uint8)
    with FeatureTable(large) as rows:
        rows.gather(ids, out)
        assert rows.bytes_read == 3 * BLOCK_BYTES + page_up(12_000_000 % BLOCK_BYTES)
    np.testing.assert_array_equal(out.view(np.float32), large.features[ids])


def test_a_table_larger_than_the_buffer_is_read_in_pieces(large: GraphStore) -> None:
    out = np.empty((10_000, 1200), np.uint8)
    gather_rows(large, np.arange(10_000), out)
    assert out.tobytes() == np.array(large.features).tobytes()


def as_version_1(graph: GraphStore) -> GraphStore:
    """What an earlier release has written."""
    (graph.path / "features.sums.npy").unlink()
    files = tuple(entry for entry in graph.manifest.files if entry.name != "features.sums.npy")
    write_manifest(graph.path, replace(graph.manifest, version=1, files=files))
    return open_graph(graph.path)


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_a_flipped_bit_is_found_by_whoever_reads_its_block(large: GraphStore, tmp_path: Path) -> None:
    graph = open_graph(shutil.copytree(large.path, tmp_path / "copy"))
    flip(graph.feature_path, 4096 + 5 * BLOCK_BYTES + 17)
    out = np.empty((10_000, 1200), np.uint8)
    gather_rows(graph, np.arange(4000), out[:4000])  # up to row 4,369 all is well
    with pytest.raises(
        FormatError, match=r"features\.npy: bytes 5246976 to 6295552 have checksum .* inspect .*--valid"
    ):
        gather_rows(graph, np.array([0, 4400]), out[:2])
    flip(graph.feature_path, 4096 + 5 * BLOCK_BYTES + 17)
    gather_rows(graph, np.arange(10_000), out)
    assert out.tobytes() == np.array(large.features).tobytes()


def test_damaged_checksums_are_no_checksums(large: GraphStore, tmp_path: Path) -> None:
    graph = open_graph(shutil.copytree(large.path, tmp_path / "copy"))
    flip(graph.path / "features.sums.npy", 4096)
    with pytest.raises(FormatError, match=r"features\.sums\.npy has checksum"):
        gather_rows(graph, np.arange(3), np.empty((3, 1200), np.uint8))


def test_a_store_without_checksums_of_blocks_reads_with_one_warning_and_is_sealed(
    large: GraphStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graph = as_version_1(open_graph(shutil.copytree(large.path, tmp_path / "copy")))
    out = np.empty((3, 1200), np.uint8)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            gather_rows(open_graph(graph.path), np.arange(3), out)
    (said,) = caplog.messages
    assert f"`penstock inspect {graph.path} --seal`" in said
    caplog.clear()
    run_inspect(graph.path, validate=True, seal=True, as_json=True)
    sealed = open_graph(graph.path)
    gather_rows(sealed, np.arange(3), out)
    assert not caplog.messages and sealed.fingerprint == graph.fingerprint == large.fingerprint
    assert (sealed.path / "features.sums.npy").read_bytes() == (large.path / "features.sums.npy").read_bytes()


def test_a_store_at_a_uri_is_sealed_there(large: GraphStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    graph = as_version_1(open_graph(shutil.copytree(large.path, tmp_path / "bucket" / "g")))
    uri, sums = graph.path.as_uri(), graph.path / "features.sums.npy"
    run_inspect(uri, validate=True, as_json=True, stage_dir=tmp_path / "host")
    assert not sums.exists()
    run_inspect(uri, validate=True, seal=True, as_json=True, stage_dir=tmp_path / "host")
    sealed = open_graph(graph.path)
    assert sums.read_bytes() == (large.path / sums.name).read_bytes() and sealed.fingerprint == large.fingerprint
    written = sums.stat().st_mtime_ns
    with caplog.at_level("WARNING"):
        for host in ("host", "another"):
            run_inspect(uri, validate=True, seal=True, as_json=True, stage_dir=tmp_path / host)
            gather_rows(open_graph(local_dataset(uri, tmp_path / host)), np.arange(3), np.empty((3, 1200), np.uint8))
    assert not caplog.messages and sums.stat().st_mtime_ns == written


def test_a_damaged_store_is_not_sealed(large: GraphStore, tmp_path: Path) -> None:
    graph = as_version_1(open_graph(shutil.copytree(large.path, tmp_path / "copy")))
    flip(graph.feature_path, 4096 + 5 * BLOCK_BYTES + 17)
    with pytest.raises(FormatError, match="features.npy has checksum"):
        seal_graph(graph.path)
    assert open_graph(graph.path).manifest.version == 1


def test_a_truncated_table_is_an_error(tmp_path: Path) -> None:
    config = GenerateConfig(num_nodes=300, avg_degree=3, num_features=30, num_classes=2, seed=1)
    graph = generate_graph(tmp_path / "graph", config, host_memory=64 << 20)
    os.truncate(graph.feature_path, 8192)
    with pytest.raises(FormatError, match="features.npy: read .* truncated"):
        gather_rows(graph, np.arange(300), np.empty((300, 120), np.uint8))
