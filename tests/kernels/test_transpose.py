import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.kernels import reference_transpose, transpose
from penstock.kernels.parallel import split_by_edges

NAMES = ["count_sources", "offsets_of_counts", "place_edges"]
Ints = NDArray[np.int32]


@st.composite
def blocks(draw: Any) -> tuple[Ints, Ints, int]:
    num_src = draw(st.integers(1, 8))
    counts = draw(st.lists(st.integers(0, 6), max_size=15))
    indptr = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int32)
    num_edges = int(indptr[-1])
    indices = draw(st.lists(st.integers(0, num_src - 1), min_size=num_edges, max_size=num_edges))
    return indptr, np.array(indices, np.int32), num_src


def run(module: Any, block: tuple[Ints, Ints, int], parts: int, with_edges: bool) -> tuple[Any, ...]:
    indptr, indices, num_src = block
    ranges = split_by_edges(indptr, parts) or [(0, 0)]
    counts = np.full((len(ranges), num_src), -7, np.int32)
    for part, (lo, hi) in enumerate(ranges):
        module.count_sources(indptr, indices, counts[part], lo, hi)
    by_source = np.zeros(num_src + 1, np.int32)
    module.offsets_of_counts(counts, by_source)
    out, edges = np.zeros(len(indices), np.int32), np.zeros(len(indices), np.int32)
    for part, (lo, hi) in reversed(list(enumerate(ranges))):  # any order of the parts
        module.place_edges(indptr, indices, counts[part], out, edges if with_edges else None, lo, hi)
    return by_source, out, edges


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_the_same_signature(name: str) -> None:
    ours, twin = getattr(transpose, name), getattr(reference_transpose, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(twin).parameters)


@given(blocks(), st.integers(1, 4), st.booleans())
def test_equals_the_reference(block: tuple[Ints, Ints, int], parts: int, with_edges: bool) -> None:
    ours, twin = run(transpose, block, parts, with_edges), run(reference_transpose, block, parts, with_edges)
    for one, other in zip(ours, twin, strict=True):
        np.testing.assert_array_equal(one, other)


@given(blocks(), st.integers(1, 5))
def test_is_a_stable_sort_by_source(block: tuple[Ints, Ints, int], parts: int) -> None:
    indptr, indices, num_src = block
    by_source, destinations, edges = run(transpose, block, parts, True)
    np.testing.assert_array_equal(edges, np.argsort(indices, kind="stable"))
    np.testing.assert_array_equal(by_source, np.searchsorted(np.sort(indices), np.arange(num_src + 1)))
    np.testing.assert_array_equal(destinations, np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))[edges])
