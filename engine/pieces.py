"""Sums and maxima over in-edges by PyTorch's operations, on any device, a piece of the edges at a time.

The obvious way gathers a row per edge, [E, F], which is more than everything else of a layer together, and sums in the
rows' own type: in bfloat16 a sum of ones stalls at 256. Here no more than a piece is ever gathered, sums are float32 or
float64, and the backward pass of a sum is a sum over the transposed block, with one owner per row, so that its bits do
not depend on the order in which a device works.

Letters: S sources, R destinations, E edges of the block, F features, K weights per edge (heads).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penstock.engine.blockcache import BlockCache, derived
from penstock.engine.minibatch import Block

_HOST_BYTES, _DEVICE_BYTES = 4 << 20, 256 << 20  # of gathered rows; a device takes its time to start a piece
Rows = Callable[[int, int], Tensor]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What rows of a type are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def edge_destinations(block: Block) -> Tensor:
    """Destination int64 [E] of every edge."""
    rows = torch.arange(block.num_dst, device=block.indptr.device)
    return torch.repeat_interleave(rows, block.indptr.diff().long(), output_size=block.num_edges)


def _pieces(block: Block, width: int, like: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Ranges of edges, and of the rows that they belong to; the first row of one may be the last of the one before."""
    limit = _DEVICE_BYTES if like.is_cuda else _HOST_BYTES
    step, num_edges = max(1, limit // (4 * max(1, width))), block.num_edges
    if num_edges <= step:
        yield 0, num_edges, 0, block.num_dst
        return
    starts = torch.arange(0, num_edges, step, device=block.indptr.device)
    ends = (starts + step).clamp(max=num_edges)
    firsts, lasts = (torch.searchsorted(block.indptr, at.int(), right=True) for at in (starts, ends - 1))
    yield from torch.stack([starts, ends, firsts - 1, lasts]).T.tolist()


def _sum(block: Block, width: int, rows: Rows, like: Tensor) -> Tensor:
    """Sum of rows(lo, hi) [hi - lo, width] of every destination's edges, in their type; 0 where there are none."""
    out: Tensor | None = None
    for lo, hi, first, last in _pieces(block, width, like):
        offsets = block.indptr[first : last + 1].long().clamp(lo, hi) - lo
        part = torch.segment_reduce(rows(lo, hi), "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
        if last - first == block.num_dst and hi - lo == block.num_edges:
            return part
        if out is None:
            out = torch.zeros(block.num_dst, width, dtype=part.dtype, device=part.device)
        out[first:last] += part
    assert out is not None
    return out


def by_source(block: Block) -> tuple[Block, Tensor]:
    """The block with its edges turned round, and where they were, int64 [E]; kept where the block has a cache."""
    return derived(block.cache, "turned round", lambda: _turn(block))


def _turn(block: Block) -> tuple[Block, Tensor]:
    order = torch.argsort(block.indices, stable=True)
    indptr = torch.zeros(block.num_src + 1, dtype=torch.int32, device=order.device)
    indptr[1:] = torch.bincount(block.indices, minlength=block.num_src).cumsum(0)
    turned = Block(
        num_src=block.num_dst, num_dst=block.num_src, indptr=indptr, indices=edge_destinations(block)[order].int()
    )
    return replace(turned, cache=None if block.cache is None else BlockCache()), order


def _scaled(block: Block, x: Tensor, src: Tensor | None, dst: Tensor | None, own: Tensor | None) -> Tensor:
    dtype = wide_dtype(x.dtype)

    def rows(lo: int, hi: int) -> Tensor:
        indices = block.indices[lo:hi]
        found = x.index_select(0, indices).to(dtype)
        return found if src is None else found.mul_(src.index_select(0, indices).to(dtype)[:, None])

    out = _sum(block, x.shape[1], rows, x)
    if dst is not None:
        out *= dst.to(dtype)[:, None]
    if own is not None:  # of the nodes that are on both sides
        shared = min(len(own), len(out), len(x))
        out[:shared] += x[:shared].to(dtype) * own[:shared].to(dtype)[:, None]
    return out.to(x.dtype)


class ScaledPieces(torch.autograd.Function):
    """`native.ScaledSum` on any device and in any type."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block: Block, src: Tensor | None, dst: Tensor | None, own: Tensor | None
    ) -> Tensor:
        ctx.block, ctx.scales = block, (src, dst, own)
        return _scaled(block, x, src, dst, own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        src, dst, own = ctx.scales
        turned, _ = by_source(ctx.block)
        return _scaled(turned, grads[0], dst, src, own), None, None, None, None


def _weighted(block: Block, x: Tensor, weights: Tensor, edges: Tensor | None) -> Tensor:
    """Sum of weights[e, k] * x[u, k]; `edges` says whose weight an edge of a block that was turned round has."""
    dtype, heads = wide_dtype(x.dtype), weights.shape[1]

    def rows(lo: int, hi: int) -> Tensor:
        mine = weights[lo:hi] if edges is None else weights.index_select(0, edges[lo:hi])
        by_head = x.index_select(0, block.indices[lo:hi]).to(dtype).view(hi - lo, heads, x.shape[1] // heads)
        return (by_head * mine.to(dtype)[:, :, None]).flatten(1)

    return _sum(block, x.shape[1], rows, x).to(x.dtype)


class WeightedPieces(torch.autograd.Function):
    """`native.WeightedSum` on any device and in any type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, block: Block) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x, weights)
        return _weighted(block, x, weights, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weights = ctx.saved_tensors
        block, grad_x, grad_weights = ctx.block, None, None
        if ctx.needs_input_grad[0]:
            turned, order = by_source(block)
            grad_x = _weighted(turned, grads[0], weights, order).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weights, destinations = torch.empty_like(weights), edge_destinations(block)
            dtype, shape = wide_dtype(x.dtype), (weights.shape[1], x.shape[1] // weights.shape[1])
            for lo, hi, _, _ in _pieces(block, x.shape[1], x):
                product = x.index_select(0, block.indices[lo:hi]).to(dtype)
                product = product * grads[0].index_select(0, destinations[lo:hi]).to(dtype)
                grad_weights[lo:hi] = product.view(hi - lo, *shape).sum(-1)
        return grad_x, grad_weights, None


class LargestPieces(torch.autograd.Function):
    """`native.MaxRows` on any device and in any type: the gradient goes to the first edge that has the largest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block) -> Tensor:
        destinations = edge_destinations(block)
        out = torch.full((block.num_dst, x.shape[1]), -torch.inf, dtype=x.dtype, device=x.device)
        for lo, hi, _, _ in _pieces(block, x.shape[1], x):
            to = destinations[lo:hi, None].expand(-1, x.shape[1])
            out.scatter_reduce_(0, to, x.index_select(0, block.indices[lo:hi]), "amax")
        if not ctx.needs_input_grad[0]:
            return out.masked_fill_((block.indptr.diff() == 0)[:, None], 0)
        first = torch.full(out.shape, block.num_edges, device=x.device)
        for lo, hi, _, _ in _pieces(block, x.shape[1], x):
            rows, to = x.index_select(0, block.indices[lo:hi]), destinations[lo:hi]
            wins = (rows == out.index_select(0, to)) | rows.isnan()
            edges = torch.arange(lo, hi, device=x.device)[:, None]
            first.scatter_reduce_(0, to[:, None].expand_as(rows), torch.where(wins, edges, block.num_edges), "amin")
        none = first == block.num_edges
        sources = block.indices.long()[first.masked_fill(none, 0)] if block.num_edges else torch.zeros_like(first)
        ctx.save_for_backward(sources, none)
        ctx.num_src = block.num_src
        return out.masked_fill_(none, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        sources, none = ctx.saved_tensors
        grad = grads[0].masked_fill(none, 0)
        dtype = wide_dtype(grad.dtype)
        out = torch.zeros(ctx.num_src, grad.shape[1], dtype=dtype, device=grad.device)
        return out.scatter_add_(0, sources, grad.to(dtype)).to(grad.dtype), None
