"""Aggregate over blocks with gradients: our kernels for float32 on CPU, PyTorch's operations (`pieces`) elsewhere.

Half precision is summed in float32 everywhere; float64 and other devices take the PyTorch path. `x` is [S, F], row n of
source n of the block; results have one row per destination, or per edge for `edge_softmax`.

Letters: S sources, R destinations, E edges of the block, F features, K weights per edge (heads).
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from penstock.engine.blockcache import BlockCache, derived
from penstock.engine.minibatch import Block
from penstock.engine.native import EdgeSoftmax, MaxRows, ScaledSum, WeightedSum, count_loops, mean_shares
from penstock.engine.pieces import LargestPieces, ScaledPieces, WeightedPieces, edge_destinations, wide_dtype

_HALF = (torch.float16, torch.bfloat16)


def _check(block: Block, x: Tensor) -> None:
    if x.ndim != 2 or len(x) != block.num_src:
        raise ValueError(f"x has shape {tuple(x.shape)}, the block has {block.num_src} sources: pass one row for each")


def _is_native(x: Tensor) -> bool:
    return x.device.type == "cpu" and (x.dtype == torch.float32 or x.dtype in _HALF)


def uses_kernels(device: torch.device) -> bool:
    """Whether float32 rows on a device go through our kernels; PyTorch's operations need more memory per edge."""
    return _is_native(torch.empty(0, device=device))


def scale_dtype(x: Tensor) -> torch.dtype:
    """float64 for rows in float64, else float32: what degrees and weights that scale them are computed in."""
    return wide_dtype(x.dtype)


def sampled_degrees(block: Block, dtype: torch.dtype = torch.float32) -> Tensor:
    """Edges [R] that each destination has in the block."""
    return block.indptr.diff().to(dtype)


def loops_in_block(block: Block) -> Tensor:
    """Edges int32 [R] of the block that lead from a destination to itself."""
    if block.indices.device.type == "cpu":
        return count_loops(block)
    return _count_chosen(block, block.indices == edge_destinations(block)).int()


def _segments(block: Block, values: Tensor, reduce: str) -> Tensor:
    """Reduce one row per edge to one row per destination; empty destinations give 0."""
    offsets = block.indptr.long()
    initial = 0 if reduce == "sum" else None
    out = torch.segment_reduce(values, reduce, offsets=offsets, axis=0, unsafe=True, initial=initial)
    return out if reduce == "sum" else out.masked_fill((offsets.diff() == 0)[:, None], 0)


def aggregate_sum(
    block: Block,
    x: Tensor,
    *,
    src_scale: Tensor | None = None,
    dst_scale: Tensor | None = None,
    own_scale: Tensor | None = None,
) -> Tensor:
    """dst_scale[v] * sum over in-edges (u, v) of src_scale[u] * x[u], and own_scale[v] * x[v] if that is given.

    Scales are [S], [R] and [R], without gradients.

    Scales are float32; for x in float64 they may be float64.
    """
    _check(block, x)
    if _is_native(x):
        out: Tensor = ScaledSum.apply(x.float(), block, src_scale, dst_scale, own_scale)  # type: ignore[no-untyped-call]
        return out.to(x.dtype)
    return ScaledPieces.apply(x, block, src_scale, dst_scale, own_scale)  # type: ignore[no-any-return,no-untyped-call]


def aggregate_mean(block: Block, x: Tensor) -> Tensor:
    """Mean over in-edges; 0 where a destination has none."""
    return aggregate_sum(block, x, dst_scale=sampled_degrees(block, scale_dtype(x)).clamp(min=1).reciprocal())


def aggregate_weighted_mean(block: Block, x: Tensor, weights: Tensor) -> Tensor:
    """Sum of w * x over the sum of w, for weights float32 [E] of the edges; 0 where they sum to 0.

    Weights may be as large or small as float32 holds: each is divided by its sum in float64 first.
    """
    if _is_native(x) and not weights.requires_grad:
        return aggregate_weighted(block, x, mean_shares(block, weights)[:, None])
    wide = weights.double()
    total = _segments(block, wide[:, None], "sum")[:, 0]
    total = total.masked_fill(total == 0, math.inf)
    shares = wide / total.index_select(0, edge_destinations(block))
    return aggregate_weighted(block, x, shares.to(scale_dtype(x))[:, None])


def aggregate_max(block: Block, x: Tensor) -> Tensor:
    """Largest value per feature over in-edges; 0 where a destination has none."""
    _check(block, x)
    if _is_native(x):
        out: Tensor = MaxRows.apply(x.float(), block)  # type: ignore[no-untyped-call]
        return out.to(x.dtype)
    return LargestPieces.apply(x, block)  # type: ignore[no-any-return,no-untyped-call]


def aggregate_weighted(block: Block, x: Tensor, weights: Tensor) -> Tensor:
    """Sum over in-edges of weights[e, k] * x[u, k], for `weights` [E, K] and the K equal parts of a row of x."""
    _check(block, x)
    heads = weights.shape[1]
    if x.shape[1] % heads:
        raise ValueError(f"rows of {x.shape[1]} values do not part into {heads} heads; make the width a multiple")
    if _is_native(x):
        out: Tensor = WeightedSum.apply(x.float(), weights.float(), block)  # type: ignore[no-untyped-call]
        return out.to(x.dtype)
    return WeightedPieces.apply(x, weights, block)  # type: ignore[no-any-return,no-untyped-call]


def edge_softmax(block: Block, src_scores: Tensor, dst_scores: Tensor, *, slope: float = 0.2) -> Tensor:
    """Attention weights [E, K]: softmax over in-edges of leaky_relu(src_scores[u] + dst_scores[v])."""
    _check(block, src_scores)
    if _is_native(src_scores):
        args = (src_scores.float(), dst_scores.float(), block, slope)
        out: Tensor = EdgeSoftmax.apply(*args)  # type: ignore[no-untyped-call]
        return out.to(src_scores.dtype)
    rows = edge_destinations(block)
    wide = wide_dtype(src_scores.dtype)
    raw = src_scores.to(wide).index_select(0, block.indices) + dst_scores.to(wide).index_select(0, rows)
    score = torch.nn.functional.leaky_relu(raw, slope)
    top = _segments(block, score.detach(), "max").index_select(0, rows)
    value = (score - top).exp()
    return (value / _segments(block, value, "sum").index_select(0, rows)).to(src_scores.dtype)


def with_self_loops(block: Block) -> Block:
    """Give every destination exactly one edge from itself, its last; loops that were there are dropped.

    Edge weights are dropped too: a loop has none.
    """
    if block.cache is None:
        return _add_self_loops(block)
    made = derived(
        block.cache, "with self-loops", lambda: replace(_add_self_loops(block), draws=None, cache=BlockCache())
    )
    return replace(made, draws=block.draws)


def _add_self_loops(block: Block) -> Block:
    rows = edge_destinations(block)
    others = block.indices != rows
    counts = _count_chosen(block, others)
    loops = torch.arange(block.num_dst, dtype=torch.int32, device=block.indices.device)
    indptr = torch.zeros(block.num_dst + 1, dtype=torch.int32, device=block.indices.device)
    indptr[1:] = torch.cumsum(counts + 1, 0)
    indices = torch.empty(int(others.sum()) + block.num_dst, dtype=torch.int32, device=block.indices.device)
    is_loop = torch.zeros(len(indices), dtype=torch.bool, device=block.indices.device)
    is_loop[indptr[1:].long() - 1] = True
    indices[is_loop], indices[~is_loop] = loops, block.indices[others]
    return replace(block, indptr=indptr, indices=indices, edge_weights=None, draw_weights=None)


def _count_chosen(block: Block, chosen: Tensor) -> Tensor:
    """How many in-edges of each destination are chosen, bool [E] to int64 [R]."""
    running = torch.zeros(block.num_edges + 1, dtype=torch.int64, device=chosen.device)
    torch.cumsum(chosen, 0, out=running[1:])
    return running[block.indptr.long()].diff()
