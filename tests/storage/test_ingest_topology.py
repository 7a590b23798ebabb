"""`indptr` beyond 32 bits, by simulation: a graph whose offsets start above 2^31 takes no disk and little time."""

from pathlib import Path

import numpy as np
import pytest

from penstock.storage.errors import FormatError
from penstock.storage.graph import id_dtype
from penstock.storage.ingest.topology import GrowingNpy, RowEnds
from penstock.storage.npyfile import NpyWriter


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    base = 2**33 + 5
    keys = np.array([(2 << 40) | 7, (2 << 40) | 9, (4 << 40) | (2**39)], np.uint64)
    with NpyWriter(tmp_path / "indptr.npy", np.int64, (8,)) as writer:
        rows = RowEnds(writer, 7, 40)
        rows._total = base  # as if so many edges had passed
        rows.append(keys, 1)
        rows.finish()
    assert np.load(tmp_path / "indptr.npy").tolist() == [0, *[base] * 3, *[base + 2] * 2, *[base + 3] * 2]


def test_runs_may_end_within_a_node(tmp_path: Path) -> None:
    with NpyWriter(tmp_path / "indptr.npy", np.int64, (5,)) as writer:
        rows = RowEnds(writer, 4, 4)
        rows.append(np.array([1, 2, 16], np.uint64), 1)
        rows.append(np.array([17, 18], np.uint64), 1)
        rows.finish()
    assert np.load(tmp_path / "indptr.npy").tolist() == [0, 0, 2, 5, 5]


@pytest.mark.parametrize(("num_nodes", "name"), [(1, "int32"), (2**31 - 1, "int32"), (2**31, "int64")])
def test_ids_are_as_small_as_they_can_be(num_nodes: int, name: str) -> None:
    assert id_dtype(num_nodes).name == name


def test_a_growing_array_gets_its_length_at_the_end(tmp_path: Path) -> None:
    with GrowingNpy(tmp_path / "a.npy", np.int32) as writer:
        writer.append(np.arange(3))
        writer.append(np.arange(5, 7))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2, 5, 6]
    assert writer.entry is not None and writer.entry.shape == (5,)
    with pytest.raises(FormatError), GrowingNpy(tmp_path / "b.npy", np.int32) as writer:
        raise FormatError("from within")
    with pytest.raises(ValueError):
        np.load(tmp_path / "b.npy", allow_pickle=False)
