"""Chunks against what they say, brute force; budgets, kills; and the trace of their loads."""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.engine.feed import open_pack_feed
from penstock.engine.memory_feed import open_memory_feed
from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.gather import MAX_LOCAL, check_local
from penstock.sampler.chunking.pieces import number_pieces
from penstock.sampler.chunking.trace import write_chunk_trace
from penstock.sampler.chunking.windows import edge_windows
from penstock.sampler.chunking.write import write_chunks
from penstock.sampler.estimate import DiskRates
from penstock.sampler.packer import write_packs
from penstock.sampler.plan import PlanConfig, plan_packs
from penstock.storage.budget import GIB, MIB, Budgets
from penstock.storage.chunks import Chunk, ChunkStore, open_chunks, validate_chunks
from penstock.storage.errors import DataError, DoesNotFit
from penstock.storage.graph import GraphStore
from penstock.storage.trace import Trace

MakeGraph = Callable[..., GraphStore]
FolderBytes = Callable[[Path], dict[str, bytes]]
RATES = DiskRates(read_bytes_per_s=1e9, write_bytes_per_s=1e9, random_reads_per_s=5e4)
RANDOM = PartitionConfig(chunks=3, parts=2, method="random", seed=4)


def write(graph: GraphStore, out: Path, config: PartitionConfig = RANDOM, **options: Any) -> ChunkStore:
    return write_chunks(graph, out, config, **{"host_memory": GIB, "threads": 1, **options})


def slab_ids(store: ChunkStore, assignment: tuple[Any, Any], part: int) -> list[NDArray[np.int64]]:
    """Per chunk the node ids of a part's slab, from the halos and the assignment alone."""
    parts, chunks = assignment
    read = np.unique(np.concatenate([store.part(part).chunk(d).halo_ids for d in range(store.meta.num_chunks)]))
    slabs = []
    for c in range(store.meta.num_chunks):
        mirrors = [node for node in read.tolist() if parts[node] != part and chunks[node] == c]
        mirrors.sort(key=lambda node: (parts[node], node))
        slabs.append(np.concatenate([store.part(part).chunk(c).node_ids, mirrors]).astype(np.int64))
    return slabs


def check_edges(graph: GraphStore, chunk: Chunk) -> None:
    """Own rows have the graph's in-edges, in its order, and all halo rows are read."""
    ids = np.concatenate([chunk.node_ids, chunk.halo_ids])
    assert len(np.unique(ids)) == len(ids)
    assert chunk.indptr[0] == 0 and chunk.indptr[-1] == len(chunk.indices)
    for row, node in enumerate(chunk.node_ids.tolist()):
        there = slice(graph.indptr[node], graph.indptr[node + 1])
        here = slice(chunk.indptr[row], chunk.indptr[row + 1])
        np.testing.assert_array_equal(ids[chunk.indices[here]], graph.indices[there])
        if graph.edge_weights is not None:
            assert chunk.edge_weights is not None
            np.testing.assert_array_equal(chunk.edge_weights[here], graph.edge_weights[there])
    assert set(range(chunk.num_own, len(ids))) <= set(chunk.indices.tolist())
    np.testing.assert_array_equal(chunk.degrees, np.diff(graph.indptr)[ids])


def check_store(graph: GraphStore, store: ChunkStore, assignment: tuple[Any, Any]) -> None:
    """Every invariant that readers of chunks rely on."""
    parts, chunks = assignment
    meta, num_halo, num_mirrors, num_edges = store.meta, 0, 0, 0
    for w in range(meta.num_parts):
        part, slabs = store.part(w), slab_ids(store, assignment, w)
        for d in range(meta.num_chunks):
            reader = part.chunk(d)
            np.testing.assert_array_equal(reader.node_ids, np.flatnonzero((parts == w) & (chunks == d)))
            check_edges(graph, reader)
            assert reader.num_slab == len(slabs[d]) == part.slab_sizes[d]
            assert (reader.num_own, reader.num_halo) == (part.own_sizes[d], part.halo_sizes[d])
            for c in range(meta.num_chunks):
                writer = part.chunk(c)
                rows = writer.send_rows[writer.send_offsets[d] : writer.send_offsets[d + 1]]
                wanted = reader.halo_ids[reader.halo_offsets[c] : reader.halo_offsets[c + 1]]
                np.testing.assert_array_equal(slabs[c][rows], wanted)
                assert (np.diff(rows) > 0).all() and part.run_sizes[c, d] == len(rows)
            mirrors = slabs[d][reader.num_own :]
            for p in range(meta.num_parts):
                sender = store.part(p).chunk(d)
                assert (np.diff(sender.wire_rows[w]) > 0).all()
                np.testing.assert_array_equal(sender.node_ids[sender.wire_rows[w]], mirrors[parts[mirrors] == p])
                assert reader.mirror_counts[p] == len(sender.wire_rows[w])
            num_halo, num_mirrors = num_halo + reader.num_halo, num_mirrors + len(mirrors)
            num_edges += len(reader.indices)
    destinations = np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))
    assert num_edges == graph.num_edges
    assert meta.cut_edges == (chunks[graph.indices] != chunks[destinations]).sum()
    assert meta.part_cut_edges == (parts[graph.indices] != parts[destinations]).sum()
    assert (meta.alpha, meta.part_alpha) == (num_halo / graph.num_nodes, num_mirrors / graph.num_nodes)
    sizes = np.bincount(parts * meta.num_chunks + chunks)
    assert meta.balance == pytest.approx(sizes.max() / sizes.mean())
    assert meta.part_balance == pytest.approx(np.bincount(parts).max() * meta.num_parts / graph.num_nodes)


def random_case(seed: int, make_graph: MakeGraph, num_parts: int, num_chunks: int) -> tuple[GraphStore, Any]:
    """A small random graph with self loops, parallel edges, weights at times, and labels without an empty piece."""
    rng = np.random.default_rng(seed)
    num_nodes = num_parts * num_chunks + int(rng.integers(0, 30))
    edges = rng.integers(0, num_nodes, (int(rng.integers(0, 120)), 2))
    weights = rng.random(len(edges), np.float32) if seed % 2 else None
    pieces = np.concatenate(
        [np.arange(num_parts * num_chunks), rng.integers(0, num_parts * num_chunks, num_nodes - num_parts * num_chunks)]
    )
    parts, chunks = np.divmod(rng.permutation(pieces).astype(np.int32), np.int32(num_chunks))
    return make_graph(num_nodes, edges, weights=weights, wide_ids=bool(seed % 3)), (parts, chunks)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), num_parts=st.integers(1, 3), num_chunks=st.integers(1, 4))
def test_pieces_hold_the_graph(make_graph: MakeGraph, seed: int, num_parts: int, num_chunks: int) -> None:
    graph, assignment = random_case(seed, make_graph, num_parts, num_chunks)
    config = PartitionConfig(chunks=num_chunks, parts=num_parts)
    with tempfile.TemporaryDirectory() as folder:
        store = write(graph, Path(folder) / "chunks", config, assignment=assignment)
        check_store(graph, store, assignment)
        validate_chunks(store.path)


def test_many_parts(make_graph: MakeGraph, tmp_path: Path) -> None:
    graph, assignment = random_case(1, make_graph, 11, 2)  # more parts than bits in a byte
    store = write(graph, tmp_path / "chunks", PartitionConfig(chunks=2, parts=11), assignment=assignment)
    check_store(graph, store, assignment)


def test_rows_in_chunk_order_go_back_to_node_ids(tiny_graph: GraphStore, tmp_path: Path) -> None:
    store = write(tiny_graph, tmp_path / "chunks")
    features = np.array(tiny_graph.features)
    rows = [features[store.part(w).node_ids] for w in range(2)]
    np.testing.assert_array_equal(store.scatter_back(rows), features)
    with pytest.raises(ValueError, match="rows of 1 parts for 2"):
        store.scatter_back(rows[:1])
    with pytest.raises(ValueError, match="rows for the"):
        store.scatter_back(rows[:1] + [rows[1][:-1]])


def test_windows_cover_every_edge_once(hub_graph: GraphStore) -> None:
    for num_bytes in (64, 1000, MIB):
        windows = list(edge_windows(hub_graph, num_bytes, weights=True))
        assert [window.first for window in windows] == [0, *np.cumsum([len(w.indptr) - 1 for w in windows])[:-1]]
        np.testing.assert_array_equal(np.concatenate([w.indices for w in windows]), hub_graph.indices)
        weights: list[Any] = [window.edge_weights for window in windows]
        np.testing.assert_array_equal(np.concatenate(weights), hub_graph.edge_weights)
        # only a single row may exceed a window
        assert all(len(w.indptr) == 2 or 8 * len(w.indices) <= num_bytes for w in windows)
    assert len(windows) == 1


def test_the_smallest_budget_writes_the_same_bytes(
    hub_graph: GraphStore, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    expected = folder_bytes(write(hub_graph, tmp_path / "roomy").path)
    with pytest.raises(DoesNotFit, match="partitioning 300 nodes needs .* raise it"):
        write(hub_graph, tmp_path / "refused", host_memory=MIB)
    parts, chunks = np.arange(300) % 2, np.arange(300) // 2 % 3
    with pytest.raises(DoesNotFit, match=r"chunking needs \d+ bytes .* largest chunk of \d+ edges") as caught:
        write(hub_graph, tmp_path / "refused2", host_memory=MIB, assignment=(parts, chunks))
    smallest = caught.value.host_bytes
    assert smallest is not None
    tight = write(hub_graph, tmp_path / "tight", host_memory=smallest + MIB // 8)
    assert folder_bytes(tight.path) == expected
    with pytest.raises(DoesNotFit):
        write(hub_graph, tmp_path / "refused2", host_memory=smallest - 1, assignment=(parts, chunks))
    write(hub_graph, tmp_path / "refused2", host_memory=smallest, assignment=(parts, chunks))


def test_a_chunk_that_int32_cannot_number_is_refused(tiny_graph: GraphStore) -> None:
    labels = (np.arange(400) % 4).astype(np.int32)
    pieces = number_pieces(tiny_graph, np.zeros(400, np.int32), labels, 1, 4)
    check_local(MAX_LOCAL, "rows", pieces, 2)
    with pytest.raises(DoesNotFit, match="chunk 2 of part 0 has 2147483648 in-edges, .* use more chunks than 4"):
        check_local(MAX_LOCAL + 1, "in-edges", pieces, 2)


def test_empty_pieces_and_wrong_labels_are_refused(tiny_graph: GraphStore, tmp_path: Path) -> None:
    zeros = np.zeros(400, np.int32)
    with pytest.raises(ValueError, match="chunk 1 has no node in part 0; use fewer"):
        write(tiny_graph, tmp_path / "a", assignment=(zeros, zeros))
    with pytest.raises(ValueError, match="labels 0..3; give 400 in 0..2"):
        write(tiny_graph, tmp_path / "b", assignment=(zeros, np.arange(400) % 4))
    assert not (tmp_path / "b").exists()


def test_a_finished_folder_is_kept(tiny_graph: GraphStore, tmp_path: Path) -> None:
    store = write(tiny_graph, tmp_path / "chunks")
    before = (store.path / "manifest.json").stat().st_mtime_ns
    again = write(tiny_graph, tmp_path / "chunks")
    assert again.meta == store.meta and (store.path / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"config.seed \(4 there, 5 asked\)"):
        write(tiny_graph, tmp_path / "chunks", RANDOM.model_copy(update={"seed": 5}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(DataError, match="holds no chunks of ours"):
        write(tiny_graph, tmp_path / "other")


KILLED = """
import os, signal, sys
from pathlib import Path
from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.write import write_chunks
from penstock.storage.graph import open_graph

def progress(stage, done, total, unit, /, **numbers):
    if stage == "chunk" and done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

config = PartitionConfig(chunks=3, parts=2, method="random", seed=4)
write_chunks(open_graph(sys.argv[1]), Path(sys.argv[2]), config, host_memory=1 << 30, threads=1, progress=progress)
"""


def test_what_a_kill_left_is_built_again(tiny_graph: GraphStore, tmp_path: Path, folder_bytes: FolderBytes) -> None:
    out = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tiny_graph.path), str(out)])
    assert done.returncode == -signal.SIGKILL
    assert (out / "part-001" / "indices.npy").is_file() and not (out / "manifest.json").exists()
    write(tiny_graph, out)
    assert folder_bytes(out) == folder_bytes(write(tiny_graph, tmp_path / "whole").path)


def test_an_error_leaves_no_bytes(tiny_graph: GraphStore, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "chunk" and done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tiny_graph, tmp_path / "chunks", progress=stop)
    assert [path.name for path in (tmp_path / "chunks").iterdir()] == ["chunks.json"]
    validate_chunks(write(tiny_graph, tmp_path / "chunks").path)


def check_feeds(graph: GraphStore, trace: Trace, store: ChunkStore, loads: list[int], halo: bool, folder: Path) -> None:
    """Both feeds bring the graph's rows of each load, over a lap and a half."""
    budgets = Budgets(device_bytes=0, host_bytes=150_000, disk_bytes=GIB)
    plan = plan_packs(graph, trace, PlanConfig(mode="reuse"), budgets, disk_rates=RATES, scratch=folder / "scratch")
    assert plan.mode == "reuse"
    write_packs(plan, graph, trace, folder / "packs", host_memory=64 * MIB)
    stop = len(loads) * 3 // 2
    features, labels = np.array(graph.features), np.array(graph.labels)
    with (
        open_pack_feed(folder / "packs", graph, start_step=0, stop_step=stop, host_memory=150_000, threads=1) as packs,
        open_memory_feed(graph, trace, start_step=0, stop_step=stop, threads=1) as memory,
    ):
        for feed in (packs, memory):
            seen = 0
            for step, batch in enumerate(feed):
                chunk = store.part(1).chunk(loads[step % len(loads)])
                ids = np.concatenate([chunk.node_ids, chunk.halo_ids]) if halo else chunk.node_ids
                np.testing.assert_array_equal(batch.input_ids.numpy(), ids)
                np.testing.assert_array_equal(batch.features.numpy(), features[ids])
                np.testing.assert_array_equal(batch.labels.numpy(), labels[chunk.node_ids])
                seen += 1
            assert seen == stop


@pytest.mark.parametrize("halo", [True, False])
def test_loads_of_chunks_are_fed_like_any_trace(tiny_graph: GraphStore, tmp_path: Path, halo: bool) -> None:
    store = write(tiny_graph, tmp_path / "chunks")
    sequence = [[0, 1, 2, 2, 1, 0], [2, 0, 1, 1, 0, 2], [2, 0, 1, 1, 0, 2]]
    loads = [chunk for epoch in sequence for chunk in epoch]
    options: dict[str, Any] = {"sequence": sequence, "halo": halo, "host_memory": MIB}
    trace = write_chunk_trace(tiny_graph, store, 1, tmp_path / "trace", **options)
    assert (trace.meta.num_epochs, trace.meta.items_per_epoch) == (3, 6)
    check_feeds(tiny_graph, trace, store, loads, halo, tmp_path)
    again = write_chunk_trace(tiny_graph, store, 1, tmp_path / "trace", **options)
    assert again.meta == trace.meta


def test_other_loads_are_another_trace(tiny_graph: GraphStore, hub_graph: GraphStore, tmp_path: Path) -> None:
    store = write(tiny_graph, tmp_path / "chunks")
    options: dict[str, Any] = {"sequence": [[0, 1]], "halo": True, "host_memory": MIB}
    write_chunk_trace(tiny_graph, store, 0, tmp_path / "trace", **options)
    for part, change in ((1, {}), (0, {"sequence": [[1, 0]]}), (0, {"halo": False})):
        with pytest.raises(DataError, match="sampled otherwise"):
            write_chunk_trace(tiny_graph, store, part, tmp_path / "trace", **{**options, **change})
    for sequence, message in (([[0], [1, 2]], "all of one length"), ([], "at least one"), ([[0, 3]], "are 0..2")):
        with pytest.raises(ValueError, match=message):
            write_chunk_trace(tiny_graph, store, 0, tmp_path / "new", **{**options, "sequence": sequence})
    with pytest.raises(DataError, match="was cut from graph"):
        write_chunk_trace(hub_graph, store, 0, tmp_path / "new", **options)
    with pytest.raises(DoesNotFit, match="loading the largest chunk takes"):
        write_chunk_trace(tiny_graph, store, 0, tmp_path / "new", **{**options, "host_memory": 1000})
    assert not (tmp_path / "new").exists()


def test_reuse_refuses_rather_than_rolls(tiny_graph: GraphStore, tmp_path: Path) -> None:
    store = write(tiny_graph, tmp_path / "chunks")
    trace = write_chunk_trace(
        tiny_graph, store, 0, tmp_path / "trace", sequence=[[0, 1, 2]] * 9, halo=True, host_memory=MIB
    )
    budgets = Budgets(device_bytes=0, host_bytes=150_000, disk_bytes=100_000)
    with pytest.raises(DoesNotFit, match="use --disk"):
        plan_packs(tiny_graph, trace, PlanConfig(mode="reuse"), budgets, disk_rates=RATES, scratch=tmp_path / "scratch")


def test_reopening_gives_equal_arrays(tiny_graph: GraphStore, tmp_path: Path) -> None:
    store = write(tiny_graph, tmp_path / "chunks")
    again = open_chunks(store.path)
    assert again.fingerprint == store.fingerprint and again.meta == store.meta
    assert (again.part(1).own_sizes.sum(), again.part(1).num_own) == (
        again.part(1).num_own,
        len(again.part(1).node_ids),
    )
    with pytest.raises(IndexError):
        again.part(2)
    with pytest.raises(IndexError):
        again.part(0).chunk(3)
