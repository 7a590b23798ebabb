"""Features of chunks in memory."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.engine.chunked import features
from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.write import write_chunks
from penstock.storage.graph import GraphStore


def test_rows_are_gathered_in_pieces(
    make_graph: Callable[..., GraphStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk is half of the graph, and with its halo more: what is beside its rows must not be as large again."""
    monkeypatch.setattr(features, "_PIECE_BYTES", 1 << 20)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((60_000, 128)).astype(np.float32)
    graph = make_graph(len(values), rng.integers(0, len(values), (200_000, 2)), features=values)
    config = PartitionConfig(chunks=2, method="random")
    part = write_chunks(graph, tmp_path / "chunks", config, host_memory=1 << 28, threads=1).part(0)
    tracemalloc.start()
    try:
        source = features.MemoryFeatures(graph, part, halo=True, dtype=torch.float32, device=torch.device("cpu"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    kept = sum(source.load(c).nbytes for c in range(2))
    assert kept > 1.5 * values.nbytes and peak < 1.3 * kept
    for c in range(2):
        ids = np.concatenate([part.chunk(c).node_ids, part.chunk(c).halo_ids])
        assert np.array_equal(source.load(c).numpy(), values[ids])
