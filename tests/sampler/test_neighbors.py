"""Traces: what is sampled is of the graph, as it was asked for, and survives kills and full disks."""

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from penstock.sampler.itemwise import ItemSampler
from penstock.sampler.neighbors import (
    SampleConfig,
    SampleMode,
    choose_mode,
    count_items,
    make_trace_meta,
    sample_trace,
    sample_window,
)
from penstock.sampler.numbering import HashNumbering, TableNumbering
from penstock.sampler.seeds import item_seeds
from penstock.storage.deal import Deal
from penstock.storage.errors import DataError, DoesNotFit
from penstock.storage.graph import GraphStore
from penstock.storage.items import Item
from penstock.storage.trace import Trace, open_trace, window_name

MEMORY = 64 << 20


def _sample(graph: GraphStore, out: Path, threads: int = 1, epochs: int = 1, **options: Any) -> Trace:
    config = SampleConfig(**{"fanouts": (3, 4), "batch_size": 32, "mode": "item", **options})
    return sample_trace(graph, out, config, num_epochs=epochs, host_memory=MEMORY, threads=threads)


def _bytes(trace: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(trace.iterdir())}


def _edges(item: Item, layer: int) -> list[tuple[int, int]]:
    """(destination, source) node ids of a block, in its order."""
    block = item.blocks[layer]
    dst = np.repeat(np.arange(block.num_dst), np.diff(block.indptr))
    return list(zip(item.input_ids[dst].tolist(), item.input_ids[block.indices].tolist(), strict=True))


def _check_item(graph: GraphStore, item: Item, config: SampleConfig) -> None:
    """What holds for every item: prefixes, counts, real edges, none twice without replacement."""
    assert len(np.unique(item.input_ids)) == len(item.input_ids)
    assert item.blocks[0].num_src == len(item.input_ids)
    assert item.blocks[-1].num_dst == item.num_seeds
    for layer in range(len(item.blocks) - 1):
        assert item.blocks[layer].num_dst == item.blocks[layer + 1].num_src
    for block, fanout in zip(item.blocks, config.layer_fanouts, strict=True):
        # The sources after the destinations appear in the order of their numbers: a prefix, then first appearances.
        fresh = block.indices[block.indices >= block.num_dst]
        assert list(dict.fromkeys(fresh.tolist())) == list(range(block.num_dst, block.num_src))
        assert block.indptr[0] == 0 and block.indptr[-1] == len(block.indices)
        for i, node in enumerate(item.input_ids[: block.num_dst]):
            lo, hi = graph.indptr[node], graph.indptr[node + 1]
            allowed = graph.indices[lo:hi]
            if config.weighted:
                assert graph.edge_weights is not None
                allowed = allowed[graph.edge_weights[lo:hi] > 0]
            mine = item.input_ids[block.indices[block.indptr[i] : block.indptr[i + 1]]]
            assert np.isin(mine, allowed).all()
            assert (np.diff(mine) >= 0).all()
            if config.replace and fanout > 0:
                assert len(mine) == (fanout if len(allowed) else 0)
            else:
                assert len(mine) == (len(allowed) if fanout < 0 else min(fanout, len(allowed)))
                if len(np.unique(allowed)) == len(allowed):
                    assert len(np.unique(mine)) == len(mine)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_nodes=st.integers(1, 30),
    density=st.floats(0, 8),
    seed=st.integers(0, 1000),
    fanouts=st.lists(st.sampled_from([-1, 1, 2, 5, 40]), min_size=1, max_size=3),
    how=st.sampled_from(["uniform", "labor", "replace", "weighted", "weighted replace", "labor weighted"]),
)
def test_items_of_random_graphs(
    make_graph: Callable[..., GraphStore], num_nodes: int, density: float, seed: int, fanouts: list[int], how: str
) -> None:
    rng = np.random.default_rng(seed)
    edges = rng.integers(0, num_nodes, (int(num_nodes * density), 2))  # duplicates and self-loops included
    weights = (rng.random(len(edges)) * (rng.random(len(edges)) > 0.3)).astype(np.float32)
    graph = make_graph(num_nodes, edges, weights=weights, wide_ids=bool(seed % 2))
    config = SampleConfig(
        fanouts=tuple(fanouts),
        method="labor" if "labor" in how else "uniform",
        replace="replace" in how,
        weighted="weighted" in how,
        batch_size=7,
        seed=seed,
        degrees=True,
    )
    meta = make_trace_meta(graph, config, host_memory=MEMORY)
    numbering = HashNumbering(graph.indices.dtype) if seed % 3 else TableNumbering(num_nodes)
    sampler = ItemSampler(graph, meta, numbering)
    for index in range(meta.num_items):
        item = sampler.sample(index, item_seeds(graph, meta, index))
        _check_item(graph, item, config)
        np.testing.assert_array_equal(item.seeds, item_seeds(graph, meta, index))
        np.testing.assert_array_equal(item.labels, graph.labels[item.seeds])
        np.testing.assert_array_equal(item.degrees, np.diff(graph.indptr)[item.input_ids])


def test_all_neighbours_are_those_of_dgl(tiny_graph: GraphStore, tmp_path: Path) -> None:
    dgl = pytest.importorskip("dgl")
    trace = _sample(tiny_graph, tmp_path / "t", fanouts=(-1, -1))
    csc = ("csc", (torch.tensor(tiny_graph.indptr), torch.tensor(tiny_graph.indices).long(), torch.empty(0).long()))
    graph = dgl.graph(csc, num_nodes=tiny_graph.num_nodes)
    sampler = dgl.dataloading.MultiLayerFullNeighborSampler(2)
    for item in trace.items():
        inputs, _, blocks = sampler.sample_blocks(graph, torch.tensor(item.seeds).long())
        assert set(inputs.tolist()) == set(item.input_ids.tolist())
        for layer, block in enumerate(blocks):
            src, dst = block.edges()
            ids, dst_ids = block.srcdata[dgl.NID], block.dstdata[dgl.NID]
            theirs = zip(dst_ids[dst].tolist(), ids[src].tolist(), strict=True)
            assert sorted(theirs) == sorted(_edges(item, layer))


@pytest.mark.parametrize("weighted", [False, True])
def test_frequencies_are_those_of_dgl(make_graph: Callable[..., GraphStore], tmp_path: Path, weighted: bool) -> None:
    dgl = pytest.importorskip("dgl")
    degree, fanout, trials = 8, 3, 4000
    weights = np.arange(1, degree + 1, dtype=np.float32)
    edges = [(1 + n, 0) for n in range(degree)]
    graph = make_graph(degree + 1, edges, weights=weights, train=np.array([0]))
    trace = _sample(
        graph, tmp_path / "t", epochs=trials, fanouts=(fanout,), batch_size=1, weighted=weighted, window_items=trials
    )
    ours = np.bincount([n for item in trace.items() for _, n in _edges(item, 0)], minlength=degree + 1)[1:]
    dgl.seed(3)
    peer = dgl.graph((torch.arange(1, degree + 1), torch.zeros(degree, dtype=torch.int64)))
    peer.edata["w"] = torch.from_numpy(weights)
    theirs = np.zeros(degree)
    for _ in range(trials):
        drawn = dgl.sampling.sample_neighbors(peer, torch.tensor([0]), fanout, prob="w" if weighted else None)
        theirs += np.bincount(drawn.edges()[0].numpy() - 1, minlength=degree)
    share = theirs / trials
    spread = np.sqrt(2 * trials * share * (1 - share))
    assert (np.abs(ours - theirs) < 5 * spread).all(), (ours, theirs)


def test_labor_reaches_fewer_nodes(hub_graph: GraphStore, tmp_path: Path) -> None:
    uniform = _sample(hub_graph, tmp_path / "u", fanouts=(2, 2), epochs=4)
    labor = _sample(hub_graph, tmp_path / "l", fanouts=(2, 2), epochs=4, method="labor")
    reached = [sum(len(item.input_ids) for item in trace.items()) for trace in (uniform, labor)]
    assert reached[1] < 0.95 * reached[0]
    edges = [sum(len(item.blocks[-1].indices) for item in trace.items()) for trace in (uniform, labor)]
    assert edges[0] == edges[1]


def test_threads_and_order_change_nothing(hub_graph: GraphStore, tmp_path: Path) -> None:
    one = _sample(hub_graph, tmp_path / "one", threads=1, epochs=3, window_items=4, degrees=True)
    _sample(hub_graph, tmp_path / "many", threads=3, epochs=3, window_items=4, degrees=True)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "many")
    config = SampleConfig(fanouts=(3, 4), batch_size=32, window_items=4, degrees=True)
    for window in reversed(range(one.meta.num_windows)):
        sample_window(hub_graph, tmp_path / "back", config, one.meta, window, host_memory=MEMORY, threads=2)
    wanted = {name: data for name, data in _bytes(tmp_path / "one").items() if name.startswith("window")}
    assert _bytes(tmp_path / "back") == wanted


def test_epochs_are_fresh_and_blocks_carry_weights(hub_graph: GraphStore, tmp_path: Path) -> None:
    trace = _sample(hub_graph, tmp_path / "t", epochs=2, batch_size=300, weighted=True, fanouts=(3,))
    first, second = trace.items()
    assert (first.epoch, second.epoch) == (0, 1)
    assert set(_edges(first, 0)) != set(_edges(second, 0))
    weights = {}
    for node in range(300):
        for place in range(hub_graph.indptr[node], hub_graph.indptr[node + 1]):
            assert hub_graph.edge_weights is not None
            weights[node, int(hub_graph.indices[place])] = float(hub_graph.edge_weights[place])
    assert first.blocks[0].edge_weights is not None
    assert first.blocks[0].edge_weights.tolist() == [weights[edge] for edge in _edges(first, 0)]


def test_labels_of_many_classes(make_graph: Callable[..., GraphStore], tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (50, 5)).astype(np.uint8)
    trace = _sample(make_graph(50, [(1, 0)], labels=labels), tmp_path / "t", fanouts=(1,))
    for item in trace.items():
        assert item.labels.dtype == np.uint8
        np.testing.assert_array_equal(item.labels, labels[item.seeds])


def test_pyg_order_is_the_reverse(tiny_graph: GraphStore, tmp_path: Path) -> None:
    _sample(tiny_graph, tmp_path / "dgl", fanouts=(2, 5))
    _sample(tiny_graph, tmp_path / "pyg", fanouts=None, num_neighbors=(5, 2))
    assert _bytes(tmp_path / "dgl") == _bytes(tmp_path / "pyg")


def test_a_finished_trace_is_kept_and_a_damaged_one_continued(tiny_graph: GraphStore, tmp_path: Path) -> None:
    trace = _sample(tiny_graph, tmp_path / "t", epochs=2, window_items=3)
    whole = _bytes(tmp_path / "t")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()}
    _sample(tiny_graph, tmp_path / "t", epochs=2, window_items=3)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()}
    for name in ("manifest.json", window_name(2, "json"), window_name(1, "json"), window_name(1, "trace")):
        (tmp_path / "t" / name).unlink()
    (tmp_path / "t" / f".{window_name(1, 'trace')}.tmp").write_bytes(b"half")
    _sample(tiny_graph, tmp_path / "t", epochs=2, window_items=3)
    assert _bytes(tmp_path / "t") == whole
    assert open_trace(tmp_path / "t").meta == trace.meta


def test_windows_chosen_from_memory_are_kept_on_resume(tiny_graph: GraphStore, tmp_path: Path) -> None:
    config = SampleConfig(fanouts=(3, 3), batch_size=16)
    small = sample_trace(tiny_graph, tmp_path / "t", config, host_memory=50_000, threads=1)
    (tmp_path / "t" / "manifest.json").unlink()
    again = sample_trace(tiny_graph, tmp_path / "t", config, host_memory=1 << 30, threads=2)
    large = make_trace_meta(tiny_graph, config, host_memory=1 << 30)
    assert again.meta == small.meta
    assert small.meta.window_items < large.window_items == min(64, large.num_items)


def test_other_settings_are_refused_and_named(tiny_graph: GraphStore, tmp_path: Path) -> None:
    _sample(tiny_graph, tmp_path / "t")
    before = _bytes(tmp_path / "t")
    with pytest.raises(DataError, match=r"seed \(there 0, now 1\)") as error:
        _sample(tiny_graph, tmp_path / "t", seed=1, method="labor")
    assert "method" in str(error.value) and "fanouts" not in str(error.value)
    assert _bytes(tmp_path / "t") == before


_KILLED = """
import sys
from pathlib import Path
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.graph import open_graph
config = SampleConfig(fanouts=(10, 10), batch_size=8, mode=sys.argv[3], window_items=5)
graph, out = open_graph(sys.argv[1]), Path(sys.argv[2])
say = lambda stage, done, *rest, **numbers: print(done, flush=True)
sample_trace(graph, out, config, num_epochs=40, host_memory=1 << 26, threads=2, progress=say)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["item", "hop"])
def test_killed_runs_end_with_the_same_bytes(tiny_graph: GraphStore, tmp_path: Path, mode: str) -> None:
    command = [sys.executable, "-c", _KILLED, str(tiny_graph.path)]
    subprocess.run([*command, str(tmp_path / "whole"), "item"], check=True, stdout=subprocess.DEVNULL)
    rng, finished = np.random.default_rng(len(mode)), []
    for kill in range(5):
        with subprocess.Popen([*command, str(tmp_path / "killed"), mode], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(20 * kill + int(rng.integers(1, 20))):  # a line per window, finished ones too
                assert process.stdout.readline()
            time.sleep(float(rng.uniform(0, 0.01)))
            process.kill()
        finished.append(len(list((tmp_path / "killed").glob("*.trace"))))
    assert 0 < finished[0] < finished[-1] < len(list((tmp_path / "whole").glob("*.trace")))
    subprocess.run([*command, str(tmp_path / "killed"), mode], check=True, stdout=subprocess.DEVNULL)
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")


@contextmanager
def _files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let the kernel refuse larger files, as it refuses writes to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("mode", ["item", "hop"])
def test_a_full_disk_is_clear_and_leaves_whole_windows(tiny_graph: GraphStore, tmp_path: Path, mode: str) -> None:
    options: dict[str, Any] = {"window_items": 2, "batch_size": 40, "mode": mode}
    _sample(tiny_graph, tmp_path / "t", **options)
    whole = _bytes(tmp_path / "t")
    for name in ("manifest.json", window_name(1, "json"), window_name(1, "trace")):
        (tmp_path / "t" / name).unlink()
    first = _bytes(tmp_path / "t")
    with _files_of_at_most(6000), pytest.raises(DoesNotFit, match="disk is full while writing"):
        _sample(tiny_graph, tmp_path / "t", threads=2, **options)
    assert _bytes(tmp_path / "t") == first
    _sample(tiny_graph, tmp_path / "t", threads=2, **options)
    assert _bytes(tmp_path / "t") == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither of fanouts"),
        ({"fanouts": (2,), "num_neighbors": (2,)}, "both of fanouts"),
        ({"fanouts": ()}, "empty"),
        ({"fanouts": (3, 0)}, "fanout of 0"),
        ({"num_neighbors": (3, -2)}, "fanout of -2"),
        ({"fanouts": (1 << 31,)}, "a fanout of 2147483648 .* use 1 to 2147483647, or -1 for all"),
        ({"fanouts": (2,), "method": "labor", "replace": True}, "without replacement"),
        ({"fanouts": (2,), "method": "other"}, "labor"),
        ({"fanouts": (2,), "batch_size": 0}, "greater than or equal to 1"),
        ({"fanouts": (2,), "seed": -1}, "greater than or equal to 0"),
        ({"fanouts": (2,), "fanout": 3}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SampleConfig(**options)


def test_impossible_requests_write_nothing(make_graph: Callable[..., GraphStore], tmp_path: Path) -> None:
    graph, config = make_graph(9, [(0, 1)]), SampleConfig(fanouts=(2,))
    with pytest.raises(ValueError, match="no nodes in its test split"):
        sample_trace(graph, tmp_path / "t", config, split="test", host_memory=MEMORY, threads=1)
    with pytest.raises(ValueError, match="num_epochs=0"):
        sample_trace(graph, tmp_path / "t", config, num_epochs=0, host_memory=MEMORY, threads=1)
    with pytest.raises(ValueError, match="no edge weights"):
        weighted = config.model_copy(update={"weighted": True})
        sample_trace(graph, tmp_path / "t", weighted, host_memory=MEMORY, threads=1)
    assert not (tmp_path / "t").exists()


def test_auto_goes_by_the_size_of_the_topology(tiny_graph: GraphStore) -> None:
    config = SampleConfig(fanouts=(2,))
    assert choose_mode(tiny_graph, config, host_memory=1 << 30) == "item"
    assert choose_mode(tiny_graph, config, host_memory=4000) == "hop"
    assert choose_mode(tiny_graph, config.model_copy(update={"mode": "item"}), host_memory=4000) == "item"


@pytest.mark.parametrize("mode", ["item", "hop"])
def test_replicas_draw_the_items_that_one_would(tiny_graph: GraphStore, tmp_path: Path, mode: SampleMode) -> None:
    config = SampleConfig(fanouts=(3, 4), batch_size=20, seed=3, mode=mode, window_items=3)
    whole = list(
        sample_trace(tiny_graph, tmp_path / "whole", config, num_epochs=2, host_memory=64 << 20, threads=2).items()
    )
    epoch_items = count_items(tiny_graph, "train", 20)
    seen = 0
    for rank in range(2):
        deal = Deal(replicas=2, rank=rank, group_items=4, epoch_items=epoch_items)
        out = tmp_path / f"rank-{rank}"
        trace = sample_trace(tiny_graph, out, config, num_epochs=2, deal=deal, host_memory=64 << 20, threads=1)
        assert open_trace(out).meta == trace.meta and trace.meta.deal == deal
        for own, item in enumerate(trace.items()):
            twin = whole[deal.whole(own)]
            assert item.index == own and item.epoch == twin.epoch
            assert np.array_equal(item.input_ids, twin.input_ids) and np.array_equal(item.labels, twin.labels)
            assert all(np.array_equal(a.indices, b.indices) for a, b in zip(item.blocks, twin.blocks, strict=True))
            seen += 1
    assert seen == len(whole)
