"""Products of matrices, and sums over rows, whose bits do not depend on the number of threads.

A BLAS cuts a product by the threads that it has: of X^T dY, whose sum runs over the rows, other parts are added then.
Here the cuts depend on shapes alone. Rows are cut into tiles, each tile is one product on one thread, and several tiles
are under way at a time; X^T dY adds the tiles' products in their order. `docs/decisions.md` has what that costs.

CPU only. Letters: M rows, F features, H outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from penstock.engine import recycled
from penstock.kernels.parallel import run_ranges

_TILE_WORK = 1 << 24  # multiply-adds: about half a millisecond, fifty times what it costs to start a tile
_TILE_ROWS = 4096  # at most, unless the matrix itself is larger
_MOST_TILES = 64  # more cores than that are not kept busy by one product
_ALIGN = 64  # rows: tiles of float32 rows of any width begin on a cache line, as their matrix does


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let torch compute with so many threads for a while, in this thread of ours."""
    before = torch.get_num_threads()  # asked first: a thread takes its number from the last that was set when it asks
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tiles(num_rows: int, num_features: int, num_outputs: int) -> list[tuple[int, int]]:
    """Cut rows by shapes alone. A tile has as many rows as the matrix has columns, so its product is no larger."""
    widest = max(num_features, num_outputs)
    rows = min(max(_TILE_WORK // max(1, num_features * num_outputs), widest), max(_TILE_ROWS, widest))
    count = min(-(-num_rows // rows), _MOST_TILES) or 1
    rows = max(1, -(-num_rows // (count * _ALIGN))) * _ALIGN  # equal tiles, so that no thread has the large one
    return [(lo, min(lo + rows, num_rows)) for lo in range(0, num_rows, rows)]


def _run(function: Callable[[int, int], object], tiles: list[tuple[int, int]]) -> None:
    """Call `function(lo, hi)` for every tile, on as many threads as torch has here, each with one of its own."""
    threads = torch.get_num_threads()

    def alone(lo: int, hi: int) -> None:
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)
        function(lo, hi)

    try:
        run_ranges(alone, tiles, threads)
    finally:
        torch.set_num_threads(threads)  # also what threads begin with that are born later


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of single values to `x` [M, F]; without gradients."""
    x = x.detach().contiguous()
    out = _empty(x)
    _run(lambda lo, hi: out[lo:hi].copy_(function(x[lo:hi])), _tiles(len(x), x.shape[1], 1))
    return out


def _empty(like: Tensor, width: int | None = None) -> Tensor:
    with torch.inference_mode(False):  # threads that know of no such mode write to it
        return torch.empty(len(like), like.shape[1] if width is None else width, dtype=like.dtype)


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x matrix + bias for `x` [M, F], `matrix` [F, H] (may be transposed), `bias` [H]; without gradients."""
    x, matrix = x.detach(), matrix.detach()
    out = _empty(x, matrix.shape[1])
    tiles = _tiles(len(x), *matrix.shape)
    if bias is None:
        _run(lambda lo, hi: torch.mm(x[lo:hi], matrix, out=out[lo:hi]), tiles)
    else:
        bias = bias.detach()
        _run(lambda lo, hi: torch.addmm(bias, x[lo:hi], matrix, out=out[lo:hi]), tiles)
    return out


def transposed_product(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x for `grad` [M, H] and `x` [M, F]: the gradient of a weight [H, F]; without gradients."""
    grad, x = grad.detach(), x.detach()
    tiles = _tiles(len(x), x.shape[1], grad.shape[1])
    if len(tiles) < 2:
        with torch_threads(1):
            return grad.t() @ x
    rows = tiles[0][1]
    parts = recycled.empty(len(tiles), grad.shape[1], x.shape[1], dtype=x.dtype)
    _run(lambda lo, hi: torch.mm(grad[lo:hi].t(), x[lo:hi], out=parts[lo // rows]), tiles)
    return sum_rows(parts)


def sum_rows(x: Tensor) -> Tensor:
    """Sum of `x` [M, ...] over its rows, to [...]; torch cuts a sum to one number by threads, and no other."""
    if x.device.type == "cpu" and x[:1].numel() < 2:
        with torch_threads(1):
            return x.sum(0)
    return x.sum(0)
