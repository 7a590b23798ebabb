"""Items with a hub among their destinations: sampled within the budget, or refused with a budget that works."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from penstock.sampler.neighbors import SampleConfig, SampleMode, sample_trace
from penstock.storage.errors import DoesNotFit
from penstock.storage.graph import GraphStore

NUM_NODES = 1_000_000
_PROGRAM = """
import sys
from pathlib import Path
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.budget import peak_rss_bytes, reset_peak_rss
from penstock.storage.graph import open_graph

graph, out, mode, memory = open_graph(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
settings = {"fanouts": (-1,), "batch_size": 1, "window_items": 16, "mode": mode}
for name, given in (("warm", 1 << 30), ("cold", memory)):
    if name == "cold":
        assert reset_peak_rss()
        before = peak_rss_bytes()
    config = SampleConfig(**settings | {"seed": name == "cold"})
    if name == "warm":
        config = config.model_copy(update={"fanouts": (2,)})
    sample_trace(graph, out / name, config, host_memory=given, threads=2)
print(peak_rss_bytes() - before)
"""


@pytest.fixture(scope="module")
def star(make_graph: Callable[..., GraphStore]) -> GraphStore:
    """Everybody is an in-neighbour of node 0; nodes 0 to 31 are to be trained on."""
    edges = np.stack([np.arange(1, NUM_NODES), np.zeros(NUM_NODES - 1, np.int64)], axis=1)
    return make_graph(NUM_NODES, edges, train=np.arange(32))


def smallest(graph: GraphStore, out: Path, mode: SampleMode) -> int:
    config = SampleConfig(fanouts=(-1,), batch_size=1, window_items=16, mode=mode)
    with pytest.raises(DoesNotFit, match="neighbours") as caught:
        sample_trace(graph, out, config, host_memory=8 << 20, threads=2)
    assert caught.value.host_bytes is not None
    return caught.value.host_bytes


@pytest.mark.parametrize("mode", ["item", "hop"])
def test_what_a_hub_needs_is_said_before_it_is_drawn_and_works(
    star: GraphStore, tmp_path: Path, mode: SampleMode
) -> None:
    enough = smallest(star, tmp_path / "refused", mode)
    words = [sys.executable, "-c", _PROGRAM, star.path, tmp_path, mode, enough]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= enough + (8 << 20), "more than was given, and more than threads and pages explain"


def test_a_deeper_hub_is_refused_with_a_budget_that_works(
    make_graph: Callable[..., GraphStore], tmp_path: Path
) -> None:
    """The hub is a neighbour of a seed: what the second hop takes is not known when the first is counted."""
    edges = np.stack([np.arange(2, 20_000), np.ones(19_998, np.int64)], axis=1)
    graph = make_graph(20_000, np.concatenate([edges, [[1, 0]]]), train=np.array([0]))
    for threads in (1, 4):
        config = SampleConfig(fanouts=(-1, -1), batch_size=1, window_items=1)
        with pytest.raises(DoesNotFit) as caught:
            sample_trace(graph, tmp_path / f"a{threads}", config, host_memory=20_000, threads=threads)
        enough = caught.value.host_bytes
        assert enough is not None
        trace = sample_trace(graph, tmp_path / f"b{threads}", config, host_memory=enough, threads=threads)
        assert len(next(trace.items()).input_ids) == 20_000


def test_large_items_are_drawn_alone_and_the_same(make_graph: Callable[..., GraphStore], tmp_path: Path) -> None:
    """Every fifth seed is a hub that a worker has no room for."""
    rng = np.random.default_rng(0)
    hubs = [np.stack([rng.permutation(5000)[:4000], np.full(4000, 5 * n)], axis=1) for n in range(8)]
    rest = np.stack([rng.integers(0, 5000, 10_000), rng.integers(40, 5000, 10_000)], axis=1)
    graph = make_graph(5000, np.concatenate([*hubs, rest]), train=np.arange(40))
    found = []
    for memory, threads, mode in ((1 << 30, 1, "item"), (1_200_000, 4, "item"), (1_200_000, 2, "hop")):
        config = SampleConfig(fanouts=(-1,), batch_size=1, window_items=40, mode=mode)  # type: ignore[arg-type]  # above
        trace = sample_trace(graph, tmp_path / f"{memory}-{mode}", config, host_memory=memory, threads=threads)
        found.append([bytes(window.payload(n)) for window in trace.windows() for n in range(len(window))])
    assert found[0] == found[1] == found[2]
