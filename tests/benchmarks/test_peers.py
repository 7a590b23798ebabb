"""The peers that read features must be right, or a ratio against them means nothing."""

from pathlib import Path

import numpy as np
import pytest

from penstock.benchmarks.peers.direct4k import Direct4k
from penstock.benchmarks.peers.mmap_features import MmapFeatures
from penstock.storage.graph import GraphStore
from penstock.storage.npyfile import write_npy


def test_both_peers_gather_the_right_rows(tiny_graph: GraphStore) -> None:
    """Rows of 80 bytes straddle pages."""
    ids = np.random.default_rng(2).integers(0, 400, 1000).astype(np.int32)
    raw = np.empty((1000, 80), np.uint8)
    with Direct4k(tiny_graph.feature_path, tiny_graph.feature_offset, 80) as direct:
        direct.gather(ids, raw)
    np.testing.assert_array_equal(raw.view(np.float32), tiny_graph.features[ids])
    mapped_rows = np.empty((1000, 20), np.float32)
    with MmapFeatures(tiny_graph.feature_path, tiny_graph.feature_offset, 20) as mapped:
        mapped.drop_cache()
        mapped.gather(ids, mapped_rows)
    np.testing.assert_array_equal(mapped_rows, tiny_graph.features[ids])


def test_reads_past_the_end_are_noticed(tmp_path: Path) -> None:
    write_npy(tmp_path / "rows.npy", np.zeros((10, 128), np.float32))
    with Direct4k(tmp_path / "rows.npy", 4096, 512) as direct, pytest.raises(RuntimeError, match="1 of 2 reads"):
        direct.gather(np.array([3, 99]), np.empty((2, 512), np.uint8))
