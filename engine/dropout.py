"""Dropout whose mask is a hash, which a block may tie to nodes: the same on any chunk, stage, part, thread and device.

Without `Block.draws` a key is drawn from torch's generator for every call, on a CPU, and places decide what is kept:
torch itself draws value by value on one thread, which was half of a step (docs/decisions.md). Elsewhere, and for other
types than float32 and float64, it is torch's own. With draws, whether a value is dropped follows from (key, layer,
salt, node id, column) alone, or (key, layer, salt, source id, destination id, head) for values of edges, so halo rows
lose what they lose at their owner, and a forward pass that is run again gives the same bits. The hash is that of
`kernels.dropout`, on CPU by the kernel and elsewhere by integer operations of torch; nothing but the ids is kept for
the backward pass. The probability is rounded to a multiple of 1/65536.

Letters: S sources, R destinations, E edges of a block, F columns, K heads.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from penstock.engine import recycled
from penstock.kernels import dropout as kernels
from penstock.kernels.parallel import num_parts, parallel_for, run_ranges, split_by_edges

if TYPE_CHECKING:
    from penstock.engine.minibatch import Block

_WORK_PER_THREAD = 1 << 15  # values; below, waking a thread costs more than it saves
_LEVELS = 1 << 16
_LARGEST = (1 << 63) - 1
_WORD, _SIGN = 1 << 64, 1 << 63
_NATIVE = {torch.float32: np.float32, torch.float64: np.float64}


def _signed(value: int) -> int:
    """The int64 with the bits of a uint64."""
    return value - _WORD if value >= _SIGN else value


_GOLDEN, _M1, _M2 = (_signed(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draws:
    """What a block's dropout is drawn from: `key` uint64 of the epoch, `layer`, `src_ids` int64 [S] of its sources.

    A block with draws may be run again to get gradients, so nothing about it may depend on whether they are on.
    """

    key: int
    layer: int
    src_ids: Tensor


def epoch_key(seed: int, epoch: int) -> int:
    """Key uint64 of all masks of an epoch."""
    with np.errstate(over="ignore"):
        return int(kernels.epoch_key(np.uint64(seed), np.uint64(epoch)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Mask:
    """Which values of a tensor go: of rows of nodes, or of the edges of `edges` (indptr and indices) where given."""

    draws: Draws
    salt: int
    threshold: int
    edges: tuple[Tensor, Tensor] | None

    @property
    def scale(self) -> float:
        return _LEVELS / (_LEVELS - self.threshold)

    def apply(self, x: Tensor) -> Tensor:
        is_native = x.device.type == "cpu" and x.dtype in _NATIVE
        return self._apply_native(x) if is_native else self.apply_torch(x)

    def _apply_native(self, x: Tensor) -> Tensor:
        out = recycled.empty(*x.shape, dtype=x.dtype)
        threads = max(1, min(torch.get_num_threads(), x.numel() // _WORK_PER_THREAD))
        draws = self.draws
        key = (np.uint64(draws.key), draws.layer, self.salt, self.threshold, _NATIVE[x.dtype](self.scale), out.numpy())
        values, ids = x.detach().contiguous().numpy(), draws.src_ids.numpy()
        if self.edges is None:
            parallel_for(lambda lo, hi: kernels.drop_nodes(values, ids, *key, lo, hi), len(x), threads)
        else:
            indptr, indices = (tensor.numpy() for tensor in self.edges)
            ranges = split_by_edges(indptr, num_parts(threads))
            run_ranges(lambda lo, hi: kernels.drop_edges(values, indptr, indices, ids, *key, lo, hi), ranges, threads)
        return out

    def apply_torch(self, x: Tensor) -> Tensor:
        """The same by torch's operations, on any device."""
        root = torch.tensor(_signed(self.draws.key), device=x.device)
        for value in (self.draws.layer, self.salt):
            root = _fold(root, torch.tensor(value, device=x.device))
        ids = self.draws.src_ids
        if self.edges is None:
            keys = _fold(root, ids[: len(x)])
        else:
            indptr, indices = self.edges
            targets = torch.repeat_interleave(ids[: len(indptr) - 1], indptr.diff().long(), output_size=len(indices))
            keys = _fold(_fold(root, ids[indices]), targets)
        return torch.where(_kept(keys, x.shape[1], self.threshold), x * self.scale, 0)


def _shift(x: Tensor, by: int) -> Tensor:
    """Shift int64 right without its sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _M1
    x = (x ^ _shift(x, 27)) * _M2
    return x ^ _shift(x, 31)


def _fold(key: Tensor, value: Tensor) -> Tensor:
    return _mix(key + _GOLDEN + value * _M2)


def _kept(keys: Tensor, width: int, threshold: int) -> Tensor:
    """Which values are kept, bool [len(keys), width]."""
    words = torch.arange(1, -(-width // 4) + 1, device=keys.device)
    bits = _mix(keys[:, None] + words * _GOLDEN)
    lanes = bits.view(torch.int16)[:, :width]  # little-endian: the lowest 16 bits come first
    return (lanes ^ -0x8000) >= threshold - 0x8000  # as unsigned numbers


class _Drop(torch.autograd.Function):
    """Apply a mask; the gradient goes through the same one, made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: _Mask) -> Tensor:
        ctx.mask = mask
        return mask.apply(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.mask.apply(grads[0]), None


_places = torch.arange(1 << 12)  # grows, and is shared: 0, 1, 2, ...


def _draws_of_places(num_rows: int) -> Draws:
    """Draws for rows that belong to nobody; their key is the next number of torch's generator."""
    global _places
    places = _places
    if len(places) < num_rows:
        places = _places = torch.arange(2 * num_rows)
    key = int(torch.randint(_LARGEST, ()))
    return Draws(key=key, layer=0, src_ids=places[:num_rows])


def _drop_places(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of rows [M, F] that follows torch's generator."""
    if not training or not 0 < p < 1 or x.ndim != 2 or x.device.type != "cpu" or x.dtype not in _NATIVE:
        return nn.functional.dropout(x, p, training)
    return _drop(x, p, _draws_of_places(len(x)), 0, None)


def _drop(x: Tensor, p: float, draws: Draws, salt: int, edges: tuple[Tensor, Tensor] | None) -> Tensor:
    threshold = min(round(p * _LEVELS), _LEVELS - 1)
    mask = _Mask(draws=draws, salt=salt, threshold=threshold, edges=edges)
    return _Drop.apply(x, mask) if threshold else x  # type: ignore[no-untyped-call]


def dropout(x: Tensor, p: float, training: bool, block: "Block | None" = None, salt: int = 0) -> Tensor:
    """Drop values of `x` [M, F], its rows the first M sources of the block, with probability p in [0, 1).

    Two calls in one layer draw alike unless their salts differ. ValueError where the block's ids are fewer than rows.
    """
    if block is None or block.draws is None:
        return _drop_places(x, p, training)
    if not training or not p:
        return x
    if x.ndim != 2 or len(x) > len(block.draws.src_ids):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but draws are for {len(block.draws.src_ids)} nodes: pass one row for each"
        )
    return _drop(x, p, block.draws, salt, None)


def edge_dropout(x: Tensor, p: float, training: bool, block: "Block", salt: int = 0) -> Tensor:
    """Drop values of `x` [E, K], one row per edge of the block; parallel edges lose the same. See `dropout`."""
    if block.draws is None:
        return _drop_places(x, p, training)
    if not training or not p:
        return x
    if x.ndim != 2 or len(x) != block.num_edges:
        raise ValueError(f"x has shape {tuple(x.shape)}, the block {block.num_edges} edges: pass one row for each")
    return _drop(x, p, block.draws, salt, (block.indptr, block.indices))


class NodeDropout(nn.Module):
    """Dropout for a user's layers, called `(block, x)`; give several in one layer different salts."""

    def __init__(self, p: float = 0.5, *, salt: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p={p} is no probability of dropping; give at least 0 and less than 1")
        self.p, self.salt = p, salt

    def forward(self, block: "Block", x: Tensor) -> Tensor:
        """[M, F] to [M, F], the rows those of the block's first M sources."""
        return dropout(x, self.p, self.training, block, self.salt)

    def extra_repr(self) -> str:
        """Show p and salt."""
        return f"p={self.p}, salt={self.salt}"
