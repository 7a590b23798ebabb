"""`penstock bench kernels`: aggregation over the largest block of a batch, with gradients, against DGL's kernels.

Both sides get the same sampled block, float32 rows of 128 and all cores, and go through their public functions under
autograd. DGL transposes a block in its first backward pass and keeps the result with the block, which lives for one
training step; so the backward cases run on a fresh block each time, and `mean_backward_cached` on one that was
transposed before on both sides. The forward passes before the backward ones are not timed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.benchmarks.harness import interleave, open_bench_graph, record, scratch_folder
from penstock.benchmarks.sample import BATCH_SIZE, FANOUTS
from penstock.engine.adapters import require
from penstock.engine.aggregate import aggregate_max, aggregate_mean, aggregate_weighted, sampled_degrees
from penstock.engine.minibatch import Block
from penstock.engine.native import scaled_sum_into, transpose
from penstock.sampler.itemwise import ItemSampler, make_numbering
from penstock.sampler.neighbors import SampleConfig, make_trace_meta
from penstock.sampler.seeds import item_seeds
from penstock.storage.budget import GIB
from penstock.storage.generate import GenerateConfig
from penstock.storage.graph import GraphStore

WIDTH, HEADS = 128, 4
_PEER = "dgl 1.1.3"
Forward = Callable[[], Tensor]


def largest_block(graph: GraphStore) -> Block:
    """Sample one batch and return its input-side block."""
    meta = make_trace_meta(graph, SampleConfig(fanouts=FANOUTS, batch_size=BATCH_SIZE))
    sampler = ItemSampler(graph, meta, make_numbering(graph, host_memory=4 * GIB, threads=1))
    arrays = sampler.sample(0, item_seeds(graph, meta, 0)).blocks[0]
    indptr, indices = (torch.from_numpy(np.array(array)) for array in (arrays.indptr, arrays.indices))
    return Block(num_src=arrays.num_src, num_dst=arrays.num_dst, indptr=indptr, indices=indices)


def _dgl_block(dgl: Any, block: Block) -> Any:
    csc = ("csc", (block.indptr, block.indices, torch.empty(0, dtype=torch.int32)))
    return dgl.create_block(csc, num_src_nodes=block.num_src, num_dst_nodes=block.num_dst)


class _Cases:
    """The two sides of every case; each function returns edges per second of one call."""

    def __init__(self, block: Block) -> None:
        self.dgl = require("dgl", "dgl")
        generator = torch.Generator().manual_seed(0)
        self.block = block
        self.x = torch.rand(block.num_src, WIDTH, generator=generator).requires_grad_()
        self.alpha = torch.rand(block.num_edges, HEADS, generator=generator).requires_grad_()
        self.grad = torch.rand(block.num_dst, WIDTH, generator=generator)
        self.kept = self.fresh()

    def fresh(self) -> Any:
        """DGL's block, nothing of it transposed yet."""
        return _dgl_block(self.dgl, self.block)

    def rate(self, call: Callable[[], Any]) -> float:
        start = perf_counter()
        call()
        return self.block.num_edges / (perf_counter() - start)

    def forward(self, call: Forward) -> float:
        with torch.no_grad():
            return self.rate(call)

    def backward(self, call: Forward, *inputs: Tensor) -> float:
        """Time the gradients of `inputs`, not the forward pass."""
        out = call()
        grad = self.grad.view(out.shape)
        return self.rate(lambda: torch.autograd.grad(out, inputs, grad))

    def weighted(self, graph: Any) -> Tensor:
        by_head = self.x.view(-1, HEADS, WIDTH // HEADS)
        return self.dgl.ops.u_mul_e_sum(graph, by_head, self.alpha[:, :, None])  # type: ignore[no-any-return]

    def cached_backward(self) -> Callable[[], float]:
        """Our backward pass over a block that is transposed already."""
        by_source = transpose(self.block)
        scale = sampled_degrees(self.block).reciprocal()
        return lambda: self.rate(lambda: scaled_sum_into(by_source.indptr, by_source.indices, self.grad, scale, None))

    def sides(self) -> Iterator[tuple[str, Callable[[], float], Callable[[], float]]]:
        ops, block, x, alpha = self.dgl.ops, self.block, self.x, self.alpha
        mean = lambda: aggregate_mean(block, x)  # noqa: E731
        ours_weighted = lambda: aggregate_weighted(block, x, alpha)  # noqa: E731
        yield (
            "mean_forward",
            lambda: self.forward(mean),
            lambda: self.forward(lambda: ops.copy_u_mean(self.kept, x)),
        )
        yield (
            "mean_backward",
            lambda: self.backward(mean, x),
            lambda: self.backward(lambda: ops.copy_u_mean(self.fresh(), x), x),
        )
        yield (
            "mean_backward_cached",
            self.cached_backward(),
            lambda: self.backward(lambda: ops.copy_u_mean(self.kept, x), x),
        )
        yield (
            "max_forward",
            lambda: self.forward(lambda: aggregate_max(block, x)),
            lambda: self.forward(lambda: ops.copy_u_max(self.kept, x)),
        )
        yield (
            "weighted_forward",
            lambda: self.forward(ours_weighted),
            lambda: self.forward(lambda: self.weighted(self.kept)),
        )
        yield (
            "weighted_backward",
            lambda: self.backward(ours_weighted, x, alpha),
            lambda: self.backward(lambda: self.weighted(self.fresh()), x, alpha),
        )


def run(scale: float = 1.0, repeats: int = 7, folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """Yield a record per case; `folder` keeps the graph for the next run."""
    config = GenerateConfig(
        num_nodes=max(10_000, int(4_000_000 * scale)), avg_degree=16, num_features=1, num_classes=4, train=0.1
    )
    with ExitStack() as stack:
        graph = open_bench_graph(folder or stack.enter_context(scratch_folder()), config)
        for case, ours, peer in _Cases(largest_block(graph)).sides():
            values = interleave(ours, peer, repeats)
            yield record("kernels", case, "edges/s", *values, _PEER, True, repeats)
