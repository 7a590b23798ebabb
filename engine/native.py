"""Run the aggregation kernels under autograd, on CPU in float32; `aggregate` decides when.

Threads are torch's (`torch.set_num_threads`); the bits of outputs and gradients do not depend on their number. The
backward pass of a gather over in-edges is a gather over out-edges, for which the block is transposed on the spot, or
once for all layers and passes where it has a cache.

Letters: S sources, R destinations, E edges of the block, F features, K weights per edge (heads).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine import recycled
from penstock.engine.blockcache import derived
from penstock.engine.minibatch import Block
from penstock.kernels import aggregate as kernels
from penstock.kernels import attention, loops
from penstock.kernels.parallel import num_parts, run_ranges, split_by_edges
from penstock.kernels.transpose import count_sources, offsets_of_counts, place_edges

_WORK_PER_THREAD = 1 << 16  # edges x features; below, waking a thread costs more than it saves
_MOST_PARTS = 16  # of a transpose: each has a counter per source
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transposed:
    """A block by source: `indptr` int32 [S+1], `indices` int32 [E] destinations, `edges` int32 [E] or None."""

    indptr: Tensor
    indices: Tensor
    edges: Tensor | None


def _array(tensor: Tensor | None) -> Any:
    """View a tensor as a C-contiguous array; None stays None."""
    return None if tensor is None else tensor.detach().contiguous().numpy()


def _threads(work: int) -> int:
    return max(1, min(torch.get_num_threads(), work // _WORK_PER_THREAD))


def _run(kernel: Callable[..., None], indptr: NDArray[np.int32], width: int, *args: Any) -> None:
    """Call `kernel(indptr, *args, lo, hi)` on ranges of rows with equal work."""
    threads = _threads((len(indptr) + int(indptr[-1])) * width)
    run_ranges(
        lambda lo, hi: kernel(indptr, *args, lo, hi), split_by_edges(indptr, num_parts(threads)) or [(0, 0)], threads
    )


def transpose(block: Block, *, edges: bool = False, empty: Callable[..., Tensor] = recycled.empty) -> Transposed:
    """Sort the edges of a CPU block by source, stably; `edges` asks for their positions in the block too.

    `empty` allocates the result.
    """
    indptr, indices = _array(block.indptr), _array(block.indices)
    ranges = split_by_edges(indptr, min(_MOST_PARTS, _threads(16 * len(indices)))) or [(0, 0)]
    part = {lo: n for n, (lo, _) in enumerate(ranges)}
    counts = _array(recycled.empty(len(ranges), block.num_src, dtype=torch.int32))
    made = Transposed(
        indptr=empty(block.num_src + 1, dtype=torch.int32),
        indices=empty(len(indices), dtype=torch.int32),
        edges=empty(len(indices), dtype=torch.int32) if edges else None,
    )
    run_ranges(lambda lo, hi: count_sources(indptr, indices, counts[part[lo]], lo, hi), ranges, len(ranges))
    offsets_of_counts(counts, made.indptr.numpy())
    out_indices, out_edges = made.indices.numpy(), _array(made.edges)
    run_ranges(
        lambda lo, hi: place_edges(indptr, indices, counts[part[lo]], out_indices, out_edges, lo, hi),
        ranges,
        len(ranges),
    )
    return made


def _by_source(block: Block, *, edges: bool) -> Transposed:
    if block.cache is None:
        return transpose(block, edges=edges)
    # recycled memory may be twice as large as what is asked for: too much to hold for good
    name = "edges by source" if edges else "by source"
    return derived(block.cache, name, lambda: transpose(block, edges=edges, empty=torch.empty))


def scaled_sum_into(
    indptr: Tensor,
    indices: Tensor,
    x: Tensor,
    src_scale: Tensor | None,
    dst_scale: Tensor | None,
    own_scale: Tensor | None = None,
) -> Tensor:
    """Run the `scaled_sum` kernel over a block or a transposed block, on CPU in float32, without gradients."""
    out = recycled.empty(len(indptr) - 1, x.shape[1])
    args = (_array(indices), _array(x), _array(src_scale), _array(dst_scale), _array(own_scale), out.numpy())
    _run(kernels.scaled_sum, _array(indptr), x.shape[1], *args)
    return out


def count_loops(block: Block) -> Tensor:
    """Edges int32 [R] of a CPU block that lead from a destination to itself."""
    out = torch.empty(block.num_dst, dtype=torch.int32)
    _run(loops.count_in_block, _array(block.indptr), 1, _array(block.indices), out.numpy())
    return out


def mean_shares(block: Block, weights: Tensor) -> Tensor:
    """Weights float32 [E] of a CPU block over the sum of their destination's, without gradients."""
    out = torch.empty(block.num_edges)
    _run(kernels.mean_shares, _array(block.indptr), 1, _array(weights.float()), out.numpy())
    return out


class ScaledSum(torch.autograd.Function):
    """dst_scale[v] * sum of src_scale[u] * x[u] + own_scale[v] * x[v]; the scales have no gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: Block,
        src_scale: Tensor | None,
        dst_scale: Tensor | None,
        own_scale: Tensor | None,
    ) -> Tensor:
        ctx.block, ctx.scales = block, (src_scale, dst_scale, own_scale)
        return scaled_sum_into(block.indptr, block.indices, x, src_scale, dst_scale, own_scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        src_scale, dst_scale, own_scale = ctx.scales
        by_source = _by_source(ctx.block, edges=False)
        grad = scaled_sum_into(by_source.indptr, by_source.indices, grads[0], dst_scale, src_scale, own_scale)
        return grad, None, None, None, None


class WeightedSum(torch.autograd.Function):
    """Sum of weights[e, k] * x[u, k], `weights` float32 [E, K] and `x` float32 [S, F] in K parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, block: Block) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x, weights)
        out = recycled.empty(block.num_dst, x.shape[1])
        args = (_array(block.indices), None, _array(weights), _array(x), out.numpy())
        _run(kernels.weighted_sum, _array(block.indptr), x.shape[1], *args)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weights = ctx.saved_tensors
        block, grad = ctx.block, _array(grads[0])
        grad_x = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_x = recycled.empty(*x.shape)
            by_source = _by_source(block, edges=True)
            edges = (_array(by_source.indices), _array(by_source.edges))
            _run(
                kernels.weighted_sum,
                _array(by_source.indptr),
                x.shape[1],
                *edges,
                _array(weights),
                grad,
                grad_x.numpy(),
            )
        if ctx.needs_input_grad[1]:
            grad_weights = recycled.empty(*weights.shape)
            values = (_array(block.indices), _array(x), grad)
            _run(kernels.weighted_dot, _array(block.indptr), x.shape[1], *values, grad_weights.numpy())
        return grad_x, grad_weights, None


class MaxRows(torch.autograd.Function):
    """Largest value per feature; the gradient goes to the first edge that has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block) -> Tensor:
        shape = (block.num_dst, x.shape[1])
        out, argmax = recycled.empty(*shape), recycled.empty(*shape, dtype=torch.int32)
        args = (_array(block.indices), _array(x), out.numpy(), argmax.numpy())
        _run(kernels.max_rows, _array(block.indptr), x.shape[1], *args)
        ctx.block, ctx.argmax = block, argmax
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        by_source = _by_source(ctx.block, edges=True)
        grad_x = recycled.empty(ctx.block.num_src, grads[0].shape[1])
        args = (_array(by_source.indices), _array(by_source.edges), ctx.argmax.numpy(), _array(grads[0]))
        _run(kernels.max_rows_backward, _array(by_source.indptr), grad_x.shape[1], *args, grad_x.numpy())
        return grad_x, None


class EdgeSoftmax(torch.autograd.Function):
    """Attention weights [E, K] from scores of sources [S, K] and destinations [R, K]."""

    @staticmethod
    def forward(ctx: Any, src_scores: Tensor, dst_scores: Tensor, block: Block, slope: float) -> Tensor:
        alpha = recycled.empty(block.num_edges, src_scores.shape[1])
        args = (_array(block.indices), _array(src_scores), _array(dst_scores), np.float32(slope), alpha.numpy())
        _run(attention.edge_softmax, _array(block.indptr), 8 * alpha.shape[1], *args)
        ctx.block, ctx.slope = block, slope
        ctx.save_for_backward(src_scores, dst_scores, alpha)
        return alpha

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        src_scores, dst_scores, alpha = ctx.saved_tensors
        block, heads = ctx.block, alpha.shape[1]
        grad_edges, grad_dst = recycled.empty(*alpha.shape), recycled.empty(*dst_scores.shape)
        scores = (_array(block.indices), _array(src_scores), _array(dst_scores), np.float32(ctx.slope))
        outs = (grad_edges.numpy(), grad_dst.numpy())
        _run(
            attention.edge_softmax_backward,
            _array(block.indptr),
            4 * heads,
            *(*scores, _array(alpha), _array(grads[0]), *outs),
        )
        by_source, grad_src = _by_source(block, edges=True), recycled.empty(*src_scores.shape)
        args = (_array(by_source.edges), grad_edges.numpy(), grad_src.numpy())
        _run(attention.edge_sum, _array(by_source.indptr), heads, *args)
        return grad_src, grad_dst, None, None
