"""Partitions: balanced, never empty, the same every time, and better than chance where there is something to find."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.metis import can_import_dgl, metis_bytes
from penstock.sampler.chunking.partition import choose_method, partition
from penstock.sampler.chunking.streaming import random_bins, settle_bins, stream_bins
from penstock.storage.budget import GIB, MIB
from penstock.storage.errors import DoesNotFit, MissingDependency
from penstock.storage.graph import GraphStore
from penstock.storage.ingest import IngestOptions, ingest_parquet

MakeGraph = Callable[..., GraphStore]
STREAMED = ["ldg", "fennel", "random"]
pytest_dgl = pytest.mark.skipif(not can_import_dgl(), reason="METIS needs DGL")


def cut_share(graph: GraphStore, labels: NDArray[np.int32]) -> float:
    destinations = np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))
    return float((labels[graph.indices] != labels[destinations]).mean())


@pytest.fixture(scope="module")
def community_graph(make_graph: MakeGraph) -> GraphStore:
    """1200 nodes in 6 communities, ids in random order, both directions; one edge in ten leaves its community."""
    rng = np.random.default_rng(0)
    members = rng.permutation(1200).reshape(6, 200)
    homes = rng.integers(0, 6, 6000)
    ends = np.where(rng.random(6000) < 0.1, rng.integers(0, 6, 6000), homes)
    pairs = np.stack([members[homes, rng.integers(0, 200, 6000)], members[ends, rng.integers(0, 200, 6000)]], axis=1)
    return make_graph(1200, np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0))


@pytest.fixture(scope="module")
def cora(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    source, out = data_folder / "cora", tmp_path_factory.mktemp("cora") / "graph"
    return ingest_parquet(
        source / "nodes.parquet", source / "edges.parquet", out, IngestOptions(), host_memory=256 * MIB
    )


@pytest.mark.parametrize(
    ("method", "parts", "chunks"),
    [(method, *shape) for method in STREAMED for shape in ((1, 6), (2, 5))]
    + [pytest.param("metis", 1, 6, marks=pytest_dgl)],
)
def test_pieces_are_balanced_and_reproducible(
    community_graph: GraphStore, method: Any, parts: int, chunks: int
) -> None:
    config = PartitionConfig(parts=parts, chunks=chunks, method=method, slack=0.1)
    first = partition(community_graph, config, host_memory=GIB, threads=1)
    second = partition(community_graph, config, host_memory=2 * GIB, threads=2)
    np.testing.assert_array_equal(first[:2], second[:2])
    assert first[2] == second[2] == method
    sizes = np.bincount(first[0] * chunks + first[1], minlength=parts * chunks)
    assert len(sizes) == parts * chunks and sizes.min() > 0
    assert sizes.max() <= 1.1 * sizes.mean() + 2  # either level rounds up


@pytest.mark.parametrize("method", STREAMED)
def test_communities_are_found(community_graph: GraphStore, method: Any) -> None:
    config = PartitionConfig(chunks=6, method=method)
    _, chunks, _ = partition(community_graph, config, host_memory=GIB, threads=1)
    share = cut_share(community_graph, chunks)
    assert share > 0.8 if method == "random" else share < 0.2


@pytest.mark.parametrize("fennel", [False, True])
def test_restreaming_helps(community_graph: GraphStore, fennel: bool) -> None:
    groups = np.zeros(1200, np.int32)
    shares = [
        cut_share(
            community_graph,
            stream_bins(community_graph, groups, 6, fennel=fennel, passes=n, slack=0.1, num_bytes=4096),
        )
        for n in (1, 3, 10)
    ]
    assert shares[0] > shares[1] > shares[2]


@pytest_dgl
def test_metis_cuts_far_less_of_cora_than_chance(cora: GraphStore) -> None:
    shares = {}
    for method in ("metis", "random", "ldg"):
        config = PartitionConfig(chunks=8, method=method)
        _, chunks, _ = partition(cora, config, host_memory=GIB, threads=1)
        shares[method] = cut_share(cora, chunks)
    assert shares["metis"] < 0.15 and shares["ldg"] < 0.4 and shares["random"] > 0.8


@pytest.mark.slow
@pytest_dgl
def test_metis_leaves_no_piece_empty(make_graph: MakeGraph) -> None:
    star = [[0, n] for n in range(1, 24)]  # nothing to cut evenly
    graph = make_graph(24, star + [[5, 5]])
    for parts, chunks in ((1, 24), (3, 4)):
        config = PartitionConfig(parts=parts, chunks=chunks, method="metis")
        labels = partition(graph, config, host_memory=GIB, threads=1)
        assert np.bincount(labels[0] * chunks + labels[1], minlength=parts * chunks).min() > 0
    config = PartitionConfig(chunks=4, method="metis")
    _, chunks_of, _ = partition(make_graph(9, []), config, host_memory=GIB, threads=1)
    assert sorted(np.bincount(chunks_of)) == [2, 2, 2, 3]


@pytest_dgl
def test_metis_prints_nothing(tiny_graph: GraphStore) -> None:
    code = (
        "import sys; from penstock.sampler.chunking.metis import run_metis; import numpy as np\n"
        "from penstock.storage.graph import open_graph\n"
        "run_metis(open_graph(sys.argv[1]), np.zeros(400, np.int32), 2); assert 'dgl' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_graph.path)], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


@pytest_dgl
def test_metis_leaves_nothing_when_we_are_killed(tiny_graph: GraphStore, tmp_path: Path) -> None:
    code = (
        "import sys; from penstock.sampler.chunking.metis import run_metis; import numpy as np\n"
        "from penstock.storage.graph import open_graph\n"
        "run_metis(open_graph(sys.argv[1]), np.zeros(400, np.int32), 2)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code, str(tiny_graph.path)], env=environment) as process:
        children: list[psutil.Process] = []
        while not children:
            assert process.poll() is None, "it ended before METIS was started"
            children = psutil.Process(process.pid).children()
            time.sleep(0.01)
        process.kill()
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), num_groups=st.integers(1, 3), num_bins=st.integers(1, 5), slack=st.floats(0, 0.5))
def test_settling_fills_and_empties(
    make_graph: MakeGraph, seed: int, num_groups: int, num_bins: int, slack: float
) -> None:
    rng = np.random.default_rng(seed)
    least = int(rng.integers(1, 4))
    least_nodes = num_groups * num_bins * least
    groups = np.concatenate(
        [np.repeat(np.arange(num_groups), num_bins * least), rng.integers(0, num_groups, int(rng.integers(20)))]
    )
    groups = rng.permutation(groups).astype(np.int32)
    graph = make_graph(len(groups), rng.integers(0, len(groups), (3 * least_nodes, 2)))
    labels = (rng.integers(0, num_bins, len(groups)) // 3).astype(np.int32)  # few bins have all
    settle_bins(graph, groups, labels, num_bins, slack=slack, least=least, num_bytes=MIB)
    for group in range(num_groups):
        sizes = np.bincount(labels[groups == group], minlength=num_bins)
        assert len(sizes) == num_bins and sizes.min() >= least
        assert sizes.max() <= max(-(-sizes.sum() // num_bins), (1 + slack) * sizes.sum() / num_bins)


@given(seed=st.integers(0, 100), num_bins=st.integers(1, 7), num_groups=st.integers(1, 3))
def test_random_bins_are_even_and_seeded(seed: int, num_bins: int, num_groups: int) -> None:
    groups = (np.arange(50) % num_groups).astype(np.int32)
    labels = random_bins(groups, num_bins, seed)
    for group in range(num_groups):
        sizes = np.bincount(labels[groups == group], minlength=num_bins)
        assert len(sizes) == num_bins and sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(labels, random_bins(groups, num_bins, seed))
    assert num_bins == 1 or (labels != random_bins(groups, num_bins, seed + 1)).any()


@pytest_dgl
def test_auto_takes_metis_where_it_can(
    tiny_graph: GraphStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needed, auto, metis = metis_bytes(tiny_graph), PartitionConfig(), PartitionConfig(method="metis")
    assert choose_method(tiny_graph, auto, needed) == choose_method(tiny_graph, metis, needed) == "metis"
    with caplog.at_level("INFO"):
        assert choose_method(tiny_graph, auto, needed - 1) == "ldg"
    assert f"METIS needs about {needed} bytes" in caplog.text and "by ldg instead" in caplog.text
    with pytest.raises(DoesNotFit, match="raise it, or use method ldg") as caught:
        choose_method(tiny_graph, metis, needed - 1)
    assert caught.value.host_bytes == needed
    monkeypatch.setitem(sys.modules, "dgl", None)  # what Python takes for a module that cannot be imported
    with caplog.at_level("INFO"):
        assert choose_method(tiny_graph, auto, GIB) == "ldg"
    assert "DGL, which is not installed" in caplog.text
    with pytest.raises(MissingDependency, match=r"pip install 'dgl>=1.1.3,<2' 'packaging', or use method ldg"):
        choose_method(tiny_graph, metis, GIB)


def test_more_pieces_than_nodes_are_refused(tiny_graph: GraphStore) -> None:
    config = PartitionConfig(parts=4, chunks=101, method="random")
    with pytest.raises(ValueError, match="400 nodes cannot fill 4 parts x 101 chunks; use fewer of either"):
        partition(tiny_graph, config, host_memory=GIB, threads=1)
    parts, chunks, _ = partition(tiny_graph, config.model_copy(update={"chunks": 100}), host_memory=GIB, threads=1)
    assert (np.bincount(parts * 100 + chunks) == 1).all()
