"""DGL's neighbour samplers as peers: sampling and block construction, one thread, each at its best.

DGL 1.1.3 has a fused sampler and takes int32 or int64 graphs; which is fastest depends on the graph, so all are tried.
The fused one keeps a table between calls that is wrong for int32 ids from the second call on (local ids run past the
block), so there it gets a new sampler per call.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from numpy.typing import NDArray

from penstock.engine.adapters import require
from penstock.storage.graph import GraphStore

dgl = require("dgl", "dgl")
LaborSampler, NeighborSampler = dgl.dataloading.LaborSampler, dgl.dataloading.NeighborSampler

_TRIALS = 3
Sample = Callable[[NDArray[Any]], int]


def dgl_graph(graph: GraphStore, dtype: torch.dtype) -> Any:
    """The topology as a DGL graph in CSC, in memory."""
    indptr, indices = torch.tensor(graph.indptr).to(dtype), torch.tensor(graph.indices).to(dtype)
    csc = ("csc", (indptr, indices, torch.empty(0, dtype=dtype)))
    return dgl.graph(csc, num_nodes=graph.num_nodes, idtype=dtype).formats("csc")


def _samplers(graphs: dict[torch.dtype, Any], fanouts: Sequence[int], method: str) -> dict[str, Sample]:
    def make(dtype: torch.dtype, new: Callable[[], Any], renew: bool) -> Sample:
        sampler = new()

        def sample(seeds: NDArray[Any]) -> int:
            used = new() if renew else sampler
            _, _, blocks = used.sample_blocks(graphs[dtype], torch.as_tensor(seeds).to(dtype))
            return sum(int(block.num_edges()) for block in blocks)

        return sample

    samplers: dict[str, Sample] = {}
    for dtype in graphs:
        name = str(dtype).removeprefix("torch.")
        if method == "labor":
            samplers[f"dgl LaborSampler {name}"] = make(dtype, partial(LaborSampler, list(fanouts)), False)
            continue
        for fused in (False, True):
            label = f"dgl NeighborSampler {name}{' fused' if fused else ''}"
            renew = fused and dtype == torch.int32
            samplers[label] = make(dtype, partial(NeighborSampler, list(fanouts), fused=fused), renew)
    return samplers


def best_dgl_sampler(
    graph: GraphStore, fanouts: Sequence[int], method: str, batches: list[NDArray[Any]]
) -> tuple[str, Sample]:
    """Find the fastest of DGL's ways on this graph, its name and a function seeds -> sampled edges."""
    torch.set_num_threads(1)
    graphs = {dtype: dgl_graph(graph, dtype) for dtype in (torch.int32, torch.int64)}
    best_s, best = float("inf"), ("", lambda seeds: 0)
    for name, sample in _samplers(graphs, fanouts, method).items():
        times = []
        for trial in range(_TRIALS + 1):
            start = perf_counter()
            sample(batches[trial % len(batches)])
            times.append(perf_counter() - start)
        if (median_s := statistics.median(times[1:])) < best_s:
            best_s, best = median_s, (name, sample)
    return best
