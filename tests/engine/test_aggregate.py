import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock.engine.aggregate import (
    aggregate_max,
    aggregate_mean,
    aggregate_sum,
    aggregate_weighted,
    aggregate_weighted_mean,
    edge_softmax,
    with_self_loops,
)
from penstock.engine.minibatch import Block
from penstock.engine.pieces import edge_destinations

Function = Callable[..., Tensor]


def make_block(num_dst: int, num_src: int, max_degree: int, seed: int = 0) -> Block:
    """Random edges, with repetitions and with destinations that have none."""
    generator = torch.Generator().manual_seed(seed)
    indptr = torch.zeros(num_dst + 1, dtype=torch.int32)
    indptr[1:] = torch.randint(0, max_degree + 1, (num_dst,), generator=generator).cumsum(0)
    indices = torch.randint(0, num_src, (int(indptr[-1]),), generator=generator, dtype=torch.int32)
    return Block(num_src=num_src, num_dst=num_dst, indptr=indptr, indices=indices)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(function: Function, dtype: torch.dtype, *inputs: Tensor) -> list[Tensor]:
    """Output and gradients; float32 takes our kernels, float64 PyTorch's operations."""
    leaves = [value.to(dtype).requires_grad_() for value in inputs]
    out = function(*leaves)
    grad = random(99, *out.shape).to(dtype)
    return [out.detach().double()] + [g.double() for g in torch.autograd.grad(out, leaves, grad)]


def assert_paths_agree(function: Function, *inputs: Tensor) -> None:
    for kernel, plain in zip(run(function, torch.float32, *inputs), run(function, torch.float64, *inputs), strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-5)


blocks = st.builds(make_block, st.integers(0, 9), st.integers(9, 15), st.integers(0, 6), st.integers(0, 1000))


@given(blocks, st.sampled_from([1, 8, 21]))
def test_sums_and_their_gradients_agree_with_torch(block: Block, width: int) -> None:
    x, src, dst = random(0, block.num_src, width), random(1, block.num_src).float(), random(2, block.num_dst).float()
    assert_paths_agree(lambda x: aggregate_sum(block, x), x)
    assert_paths_agree(lambda x: aggregate_sum(block, x, src_scale=src, dst_scale=dst), x)
    assert_paths_agree(lambda x: aggregate_sum(block, x, src_scale=src, dst_scale=dst, own_scale=dst + 1), x)
    assert_paths_agree(lambda x: aggregate_mean(block, x), x)


@given(blocks, st.booleans())
def test_max_and_its_gradient_agree_with_torch(block: Block, tied: bool) -> None:
    x = random(0, block.num_src, 6)
    assert_paths_agree(lambda x: aggregate_max(block, x), x.round() if tied else x)


@given(blocks, st.sampled_from([1, 3]))
def test_weighted_sums_and_their_gradients_agree_with_torch(block: Block, heads: int) -> None:
    x, weights = random(0, block.num_src, 4 * heads), random(1, block.num_edges, heads)
    assert_paths_agree(lambda x, w: aggregate_weighted(block, x, w), x, weights)
    positive = weights[:, 0].abs() + 0.2  # gradients of a tiny weight's mean cancel
    assert_paths_agree(lambda x, w: aggregate_weighted_mean(block, x, w), x, positive)


@given(blocks, st.sampled_from([1, 4]))
def test_attention_and_its_gradients_agree_with_torch(block: Block, heads: int) -> None:
    scores = random(0, block.num_src, heads), random(1, block.num_dst, heads)
    assert_paths_agree(lambda s, d: edge_softmax(block, s, d), *scores)


def test_torch_path_passes_gradcheck() -> None:
    block = make_block(4, 6, 3)
    x, alpha = random(0, 6, 4).requires_grad_(), random(1, block.num_edges, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: aggregate_max(block, x), (x,))
    assert torch.autograd.gradcheck(lambda x, a: aggregate_weighted(block, x, a), (x, alpha))
    scores = random(2, 6, 2).requires_grad_(), random(3, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, d: edge_softmax(block, s, d), scores)


def test_mean_by_hand() -> None:
    block = Block(
        num_src=3,
        num_dst=2,
        indptr=torch.tensor([0, 3, 3], dtype=torch.int32),
        indices=torch.tensor([2, 1, 2], dtype=torch.int32),
    )
    x = torch.tensor([[1.0], [4.0], [7.0]], requires_grad=True)
    out = aggregate_mean(block, x)
    assert out.tolist() == [[6.0], [0.0]]
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[0.0], [1 / 3], [2 / 3]]))


def test_bits_do_not_depend_on_threads() -> None:
    block = make_block(3000, 5000, 14)
    x, weights = random(0, 5000, 64).float(), random(1, block.num_edges, 4).float()
    scores = random(2, 5000, 4).float(), random(3, 3000, 4).float()
    calls: list[tuple[Function, tuple[Tensor, ...]]] = [
        (lambda x: aggregate_mean(block, x), (x,)),
        (lambda x: aggregate_max(block, x), (x,)),
        (lambda x, w: aggregate_weighted(block, x, w), (x, weights)),
        (lambda s, d: edge_softmax(block, s, d), scores),
    ]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append([value for call, inputs in calls for value in run(call, torch.float32, *inputs)])
    finally:
        torch.set_num_threads(before)
    for alone, two, five in zip(*found, strict=True):
        assert torch.equal(alone, two) and torch.equal(alone, five)


def test_half_precision_keeps_its_type() -> None:
    block = make_block(20, 30, 5)
    x = random(0, 30, 8)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype).requires_grad_()
        out = aggregate_mean(block, half)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), aggregate_mean(block, x), rtol=2e-2, atol=2e-2)
        out.sum().backward()  # type: ignore[no-untyped-call]
        assert half.grad is not None and half.grad.dtype == dtype


def test_inputs_may_be_views_and_gradients_expanded() -> None:
    block = make_block(20, 30, 5)
    wide = random(0, 8, 30).float()
    x = wide.t().requires_grad_()  # columns are contiguous, rows are not
    out = aggregate_mean(block, x)
    torch.testing.assert_close(out.double(), aggregate_mean(block, x.detach().double()))
    (grad,) = torch.autograd.grad(out.sum(), x)  # the gradient of a sum is one expanded element
    plain = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(aggregate_mean(block, plain).sum(), plain)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-6)


def test_softmax_survives_large_scores() -> None:
    block = make_block(5, 9, 4)
    alpha = edge_softmax(block, torch.full((9, 1), 3e4), torch.full((5, 1), 3e4))
    sums = torch.zeros(5).index_add(0, edge_destinations(block), alpha[:, 0])
    torch.testing.assert_close(sums, (block.indptr.diff() > 0).float())


@given(blocks)
def test_self_loops_are_added_once(block: Block) -> None:
    looped = with_self_loops(block)
    assert looped.indptr.dtype == looped.indices.dtype == torch.int32
    for v in range(block.num_dst):
        before = block.indices[block.indptr[v] : block.indptr[v + 1]].tolist()
        after = looped.indices[looped.indptr[v] : looped.indptr[v + 1]].tolist()
        assert after == [u for u in before if u != v] + [v]


def test_wrong_shapes_are_named() -> None:
    block = make_block(4, 6, 3)
    with pytest.raises(ValueError, match=r"\(5, 2\).*6 sources"):
        aggregate_mean(block, torch.zeros(5, 2))
    with pytest.raises(ValueError, match="7 values do not part into 2 heads"):
        aggregate_weighted(block, torch.zeros(6, 7), torch.zeros(block.num_edges, 2))


def test_nan_is_not_hidden() -> None:
    block = make_block(6, 6, 4)
    x = torch.zeros(6, 1)
    x[int(block.indices[0])] = math.nan
    assert aggregate_max(block, x).isnan().any() and aggregate_max(block, x.double()).isnan().any()
