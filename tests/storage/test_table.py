import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.storage import table
from penstock.storage.errors import FormatError
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore
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


def test_near_rows_come_with_one_read_and_far_ones_do_not(
    tiny_graph: GraphStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, out = np.array([0, 1, 399]), np.empty((3, 80), np.uint8)
    with FeatureTable(tiny_graph) as rows:
        rows.gather(ids, out)
        assert rows.bytes_read == 8 * 4096  # 400 rows of 80 bytes
    monkeypatch.setattr(table, "_GAP_BYTES", 4096)
    with FeatureTable(tiny_graph) as rows:
        rows.gather(ids, out)
        assert rows.bytes_read == 2 * 4096
    np.testing.assert_array_equal(out.view(np.float32), tiny_graph.features[ids])


def test_a_table_larger_than_the_buffer_is_read_in_pieces(
    tiny_graph: GraphStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_READ_BYTES", 8192)
    out = np.empty((400, 80), np.uint8)
    gather_rows(tiny_graph, np.arange(400), out)
    assert out.tobytes() == np.array(tiny_graph.features).tobytes()


def test_a_truncated_table_is_an_error(tmp_path: Path) -> None:
    config = GenerateConfig(num_nodes=300, avg_degree=3, num_features=30, num_classes=2, seed=1)
    graph = generate_graph(tmp_path / "graph", config, host_memory=64 << 20)
    os.truncate(graph.feature_path, 8192)
    with pytest.raises(FormatError, match="features.npy: read .* truncated"):
        gather_rows(graph, np.arange(300), np.empty((300, 120), np.uint8))
