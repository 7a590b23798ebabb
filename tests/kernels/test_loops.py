import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.kernels import loops, reference_loops


@st.composite
def graphs(draw: Any) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """indptr and indices, ascending within a node, with duplicates and loops."""
    num_nodes = draw(st.integers(1, 8))
    lists = [sorted(draw(st.lists(st.integers(0, num_nodes - 1), max_size=9))) for _ in range(num_nodes)]
    return np.cumsum([0, *map(len, lists)]), np.array([u for one in lists for u in one], np.int32)


@pytest.mark.parametrize("name", ["count_own", "count_in_block"])
def test_twins_have_the_same_signature(name: str) -> None:
    ours, twin = getattr(loops, name), getattr(reference_loops, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(twin).parameters)


@given(graphs(), st.data())
def test_equals_the_reference(graph: tuple[NDArray[np.int64], NDArray[np.int32]], data: Any) -> None:
    indptr, indices = graph
    num_nodes = len(indptr) - 1
    nodes = np.array(data.draw(st.lists(st.integers(0, num_nodes - 1), max_size=40)), np.int32)
    lo = data.draw(st.integers(0, len(nodes)))
    outs = np.full((2, len(nodes)), -7, np.int32)
    in_block = np.full((2, num_nodes), -7, np.int32)
    shuffled = indices.copy()
    for start, stop in zip(indptr[:-1], indptr[1:], strict=True):
        shuffled[start:stop] = indices[start:stop][::-1]
    for module, out, row in zip((loops, reference_loops), outs, in_block, strict=True):
        module.count_own(indptr, indices, nodes, lo, len(nodes), out)
        module.count_in_block(indptr, shuffled, row, 0, num_nodes)
    np.testing.assert_array_equal(*outs)
    np.testing.assert_array_equal(*in_block)
    np.testing.assert_array_equal(outs[0][lo:], in_block[0][nodes[lo:]])
