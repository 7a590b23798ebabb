import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.kernels import aggregate, attention, reference_aggregate, reference_attention
from penstock.kernels.parallel import run_ranges, split_by_edges

TWINS = [
    (aggregate, reference_aggregate, "scaled_sum"),
    (aggregate, reference_aggregate, "weighted_sum"),
    (aggregate, reference_aggregate, "mean_shares"),
    (aggregate, reference_aggregate, "weighted_dot"),
    (aggregate, reference_aggregate, "max_rows"),
    (aggregate, reference_aggregate, "max_rows_backward"),
    (attention, reference_attention, "edge_softmax"),
    (attention, reference_attention, "edge_softmax_backward"),
    (attention, reference_attention, "edge_sum"),
]
Blocks = tuple[NDArray[np.int32], NDArray[np.int32], int]


@st.composite
def blocks(draw: Any, max_rows: int = 12) -> Blocks:
    """CSC with empty rows, repeated edges and, now and then, no rows or one source only."""
    num_src = draw(st.integers(1, 10))
    counts = draw(st.lists(st.integers(0, 9), max_size=max_rows))
    indptr = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int32)
    num_edges = int(indptr[-1])
    indices = draw(st.lists(st.integers(0, num_src - 1), min_size=num_edges, max_size=num_edges))
    return indptr, np.array(indices, np.int32), num_src


def rows(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def both(
    modules: tuple[ModuleType, ModuleType], name: str, call: Callable[[Any, NDArray[np.float32]], None], shape: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Outputs of a kernel and its twin; the kernel writes into garbage that it has to overwrite."""
    outs = np.full(shape, np.nan, np.float32), np.zeros(shape, np.float32)
    for module, out in zip(modules, outs, strict=True):
        call(getattr(module, name), out)
    return outs


@pytest.mark.parametrize(("module", "reference", "name"), TWINS)
def test_twins_have_the_same_signature(module: ModuleType, reference: ModuleType, name: str) -> None:
    ours, twin = getattr(module, name), getattr(reference, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(twin).parameters)


@given(blocks(), st.sampled_from([1, 3, 16, 37]), st.booleans(), st.booleans(), st.booleans())
def test_scaled_sum_equals_the_reference_bit_for_bit(
    block: Blocks, width: int, by_src: bool, by_dst: bool, by_own: bool
) -> None:
    indptr, indices, num_src = block
    num_dst = len(indptr) - 1
    x, src, dst, own = rows(0, num_src, width), rows(1, num_src), rows(2, num_dst), rows(3, min(num_src, num_dst))
    args = (indptr, indices, x, src if by_src else None, dst if by_dst else None, own if by_own else None)
    modules = aggregate, reference_aggregate
    ours, twin = both(modules, "scaled_sum", lambda f, out: f(*args, out, 0, num_dst), (num_dst, width))
    np.testing.assert_array_equal(ours, twin)


@given(blocks(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 5, 16]), st.booleans())
def test_weighted_sum_equals_the_reference_bit_for_bit(block: Blocks, heads: int, dim: int, permuted: bool) -> None:
    indptr, indices, num_src = block
    num_dst, num_edges = len(indptr) - 1, len(indices)
    x, weights = rows(0, num_src, heads * dim), rows(1, num_edges, heads)
    edges = np.random.default_rng(2).permutation(num_edges).astype(np.int32) if permuted else None
    args = (indptr, indices, edges, weights, x)
    modules = aggregate, reference_aggregate
    ours, twin = both(modules, "weighted_sum", lambda f, out: f(*args, out, 0, num_dst), (num_dst, heads * dim))
    np.testing.assert_array_equal(ours, twin)


@given(blocks(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 5, 16, 40]))
def test_weighted_dot_equals_the_reference(block: Blocks, heads: int, dim: int) -> None:
    indptr, indices, num_src = block
    num_dst, num_edges = len(indptr) - 1, len(indices)
    args = (indptr, indices, rows(0, num_src, heads * dim), rows(1, num_dst, heads * dim))
    modules = aggregate, reference_aggregate
    ours, twin = both(modules, "weighted_dot", lambda f, out: f(*args, out, 0, num_dst), (num_edges, heads))
    np.testing.assert_allclose(ours, twin, rtol=1e-5, atol=1e-5)


@given(blocks(), st.sampled_from([1, 3, 16]), st.booleans())
def test_max_and_its_backward_equal_the_reference(block: Blocks, width: int, with_nan: bool) -> None:
    indptr, indices, num_src = block
    num_dst, num_edges = len(indptr) - 1, len(indices)
    x = np.round(rows(0, num_src, width))  # few values, so that many tie
    if with_nan:
        x[0, 0] = np.nan
    argmaxes = np.full((num_dst, width), 7, np.int32), np.zeros((num_dst, width), np.int32)
    outs = []
    for module, argmax in zip((aggregate, reference_aggregate), argmaxes, strict=True):
        out = np.zeros((num_dst, width), np.float32)
        module.max_rows(indptr, indices, x, out, argmax, 0, num_dst)
        outs.append(out)
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(argmaxes[0], argmaxes[1])

    order = np.argsort(indices, kind="stable").astype(np.int32)
    by_source = np.searchsorted(indices[order], np.arange(num_src + 1)).astype(np.int32)
    destinations = np.repeat(np.arange(num_dst), np.diff(indptr))[order].astype(np.int32)
    args = (by_source, destinations, order, argmaxes[0], rows(1, num_dst, width))
    modules = aggregate, reference_aggregate
    ours, twin = both(modules, "max_rows_backward", lambda f, out: f(*args, out, 0, num_src), (num_src, width))
    np.testing.assert_array_equal(ours, twin)
    assert num_edges or not ours.any()


@given(blocks(), st.sampled_from([1, 4]))
def test_attention_equals_the_reference(block: Blocks, heads: int) -> None:
    indptr, indices, num_src = block
    num_dst, num_edges = len(indptr) - 1, len(indices)
    modules = attention, reference_attention
    scores = (indptr, indices, 9 * rows(0, num_src, heads), 9 * rows(1, num_dst, heads), np.float32(0.2))
    alpha, twin = both(modules, "edge_softmax", lambda f, out: f(*scores, out, 0, num_dst), (num_edges, heads))
    np.testing.assert_allclose(alpha, twin, rtol=1e-5, atol=1e-6)

    grad = rows(2, num_edges, heads)
    by_module = []
    for module in modules:
        grad_edges, grad_dst = np.zeros((num_edges, heads), np.float32), np.ones((num_dst, heads), np.float32)
        module.edge_softmax_backward(*scores, alpha, grad, grad_edges, grad_dst, 0, num_dst)
        by_module.append((grad_edges, grad_dst))
    for ours, twin in zip(*by_module, strict=True):
        np.testing.assert_allclose(ours, twin, rtol=1e-4, atol=1e-5)

    for edges in (None, np.random.default_rng(3).permutation(num_edges).astype(np.int32)):
        sums = np.full((num_dst, heads), np.nan, np.float32), np.zeros((num_dst, heads), np.float32)
        for module, out in zip(modules, sums, strict=True):
            module.edge_sum(indptr, edges, grad, out, 0, num_dst)
        np.testing.assert_allclose(sums[0], sums[1], rtol=1e-5, atol=1e-6)


@given(blocks(max_rows=40), st.integers(1, 7))
@settings(max_examples=50)
def test_ranges_cover_every_row_once(block: Blocks, parts: int) -> None:
    indptr = block[0]
    ranges = split_by_edges(indptr, parts)
    assert len(ranges) <= parts
    assert [row for lo, hi in ranges for row in range(lo, hi)] == list(range(len(indptr) - 1))


def test_ranges_are_balanced_where_edges_are_not() -> None:
    counts = np.array([1000] * 10 + [1] * 10_000)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    work = [int(indptr[hi] - indptr[lo]) + hi - lo for lo, hi in split_by_edges(indptr, 4)]
    assert len(work) == 4
    assert max(work) - min(work) <= 2 * 1001


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_bits_do_not_depend_on_threads(parts: int) -> None:
    generator = np.random.default_rng(0)
    indptr = np.concatenate([[0], np.cumsum(generator.integers(0, 20, 300))]).astype(np.int32)
    indices = generator.integers(0, 500, indptr[-1]).astype(np.int32)
    x, weights = rows(1, 500, 32), rows(2, len(indices), 4)
    calls: list[Callable[[Any, int, int], None]] = [
        lambda out, lo, hi: aggregate.scaled_sum(indptr, indices, x, None, None, None, out, lo, hi),
        lambda out, lo, hi: aggregate.weighted_sum(indptr, indices, None, weights, x, out, lo, hi),
    ]
    for call in calls:
        alone, shared = np.zeros((300, 32), np.float32), np.zeros((300, 32), np.float32)
        call(alone, 0, 300)
        run_ranges(lambda lo, hi, call=call, out=shared: call(out, lo, hi), split_by_edges(indptr, parts), parts)  # type: ignore[misc]
        np.testing.assert_array_equal(alone, shared)


@given(blocks(), st.integers(0, 3))
def test_mean_shares_equal_the_reference(block: Blocks, seed: int) -> None:
    indptr, _, _ = block
    weights = np.random.default_rng(seed).choice(np.array([0, 1, 3e38, 1e-42], np.float32), indptr[-1])
    modules = aggregate, reference_aggregate
    ours, twin = both(
        modules, "mean_shares", lambda kernel, out: kernel(indptr, weights, out, 0, len(indptr) - 1), len(weights)
    )
    np.testing.assert_allclose(ours, twin, rtol=1e-6)
    assert np.isfinite(ours).all()
