"""The bench of the pipeline at a size where nothing is fast: records are complete, bytes are right, sides are equal."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.benchmarks import pipeline
from penstock.benchmarks.pipeline_graph import NUM_CLASSES, NUM_FEATURES, write_pipeline_graph
from penstock.benchmarks.pipeline_sides import Setting, Side
from penstock.benchmarks.run import run_bench
from penstock.engine.chunked.threads import open_threads

KEYS = {"bench", "case", "unit", "ours", "peer", "peer_name", "ratio", "higher_is_better", "repeats", "target"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("pipeline")
    graph = write_pipeline_graph(folder, 1000)
    return Setting(graph=graph, folder=folder, layers=3, hidden=16, open_backend=open_threads)


def test_the_graph_has_communities_hubs_and_both_directions(tmp_path: Path) -> None:
    graph = write_pipeline_graph(tmp_path, 8000)
    assert graph.num_nodes == 8000 and graph.meta.num_features == NUM_FEATURES
    degrees = np.diff(graph.indptr)
    sources, destinations = graph.indices.astype(np.int64), np.repeat(np.arange(8000), degrees)
    assert not (sources == destinations).any()
    np.testing.assert_array_equal(np.sort(sources * 8000 + destinations), np.sort(destinations * 8000 + sources))
    assert degrees.max() > 20 * degrees.mean()
    assert len(np.unique(graph.labels)) > NUM_CLASSES / 2
    assert (graph.labels[sources] == graph.labels[destinations]).mean() > 0.4
    assert write_pipeline_graph(tmp_path, 8000).fingerprint == graph.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_sides_that_differ_in_stages_end_with_the_same_weights(setting: Setting, recompute: bool) -> None:
    one, two = (Side(setting=setting, chunks=4, stages=stages, recompute=recompute).turn().weights for stages in (1, 2))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_two_stages(setting: Setting) -> None:
    (found,) = pipeline.two_stages(setting, 4, 1)
    assert found.keys() >= KEYS and found["case"] == "two_stages" and found["target"] == 1.6
    assert found["ratio"] == found["ours"] / found["peer"] > 0 and len(found["wait_s"]) == 2


@pytest.mark.slow
def test_bytes_of_both_kinds_of_parallelism_are_what_the_formulas_say(setting: Setting) -> None:
    time, sent = pipeline.vs_graph_parallel(setting, 4, 1)
    assert time.keys() >= KEYS and time["case"] == "vs_graph_parallel" and time["target"] == 1.2
    assert sent.keys() >= KEYS and sent["case"] == "bytes_vs_graph_parallel"
    row_bytes = 1000 * setting.hidden * 4
    assert sent["sent_bytes"] == 2 * row_bytes
    assert sent["peer_sent_bytes"] == pytest.approx(2 * setting.layers * sent["part_alpha"] * row_bytes, rel=1e-12)
    assert sent["ratio"] == pytest.approx(1)


@pytest.mark.slow
def test_out_of_core_reads_and_writes_the_disk_and_changes_no_bit(tmp_path: Path) -> None:
    """Larger, as runs are padded to pages on disk."""
    graph = write_pipeline_graph(tmp_path, 8000)
    setting = Setting(graph=graph, folder=tmp_path, layers=6, hidden=32, open_backend=open_threads)
    time, memory = pipeline.out_of_core(setting, 16, 1)
    assert time.keys() >= KEYS and (time["case"], memory["case"]) == ("out_of_core", "out_of_core_rss")
    assert time["target"] >= 1.5 and memory["peer"] == time["budget_bytes"] + (300 << 20)
    assert time["history_bytes"] // 8 == time["budget_bytes"]
    assert time["read_bytes"] > 0 < time["written_bytes"]


@pytest.mark.slow
def test_unequal_sides_are_an_error(setting: Setting) -> None:
    turns = [Side(setting=setting, chunks=chunks).turn() for chunks in (2, 4)]
    with pytest.raises(RuntimeError, match="different weights"):
        pipeline._require_equal(*turns)


@pytest.mark.slow
@pytest.mark.skipif("PENSTOCK_SLOW" not in os.environ, reason="set PENSTOCK_SLOW: half a minute of starting processes")
def test_in_processes_from_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_bench("pipeline", scale=0.002, repeats=1, directory=tmp_path, quiet=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "two_stages",
        "vs_graph_parallel",
        "bytes_vs_graph_parallel",
        "machine:",
    ]
    assert "target 1.6" in lines[0]


def test_out_of_core_is_an_option_of_this_bench_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--out-of-core is for bench pipeline"):
        run_bench("sample", scale=1, repeats=1, directory=tmp_path, out_of_core=True)
