import inspect
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.kernels import reference_synthetic, synthetic

NAMES = [name for name in dir(reference_synthetic) if name.startswith(("draw_", "scatter", "unscatter"))]
MODULES = (synthetic, reference_synthetic)
keys64 = st.integers(0, 2**64 - 1)


def _keys(module: ModuleType, key: int, num_nodes: int) -> NDArray[np.uint64]:
    out = np.empty(6, np.uint64)
    module.scatter_keys(np.uint64(key), num_nodes, out)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_twins_have_the_same_signature(name: str) -> None:
    ours, twin = getattr(synthetic, name), getattr(reference_synthetic, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(twin).parameters)


@given(keys64, st.integers(1, 2**35), st.data())
def test_scattering_equals_the_reference(key: int, num_nodes: int, data: st.DataObject) -> None:
    keys = _keys(synthetic, key, num_nodes)
    np.testing.assert_array_equal(keys, _keys(reference_synthetic, key, num_nodes))
    rank = data.draw(st.integers(0, num_nodes - 1))
    node = synthetic.scatter(rank, num_nodes, keys)
    assert node == reference_synthetic.scatter(rank, num_nodes, keys)
    assert synthetic.unscatter(node, num_nodes, keys) == rank
    assert reference_synthetic.unscatter(node, num_nodes, keys) == rank


@given(keys64, st.integers(0, 2**40), st.integers(0, 30))
def test_draws_per_node_equal_the_reference(key: int, lo: int, size: int) -> None:
    results: list[list[NDArray[Any]]] = []
    for module in MODULES:
        labels, degrees = np.empty(size, np.int64), np.empty(size, np.int64)
        splits = np.empty(size, np.int8)
        module.draw_labels(np.uint64(key), 5, lo, lo + size, labels)
        module.draw_degrees(np.uint64(key), 2.5, 1 / 1.5, 60, lo, lo + size, degrees)
        module.draw_splits(np.uint64(key), 0.3, 0.2, 0.1, lo, lo + size, splits)
        results.append([labels, degrees, splits])
    for ours, twin in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, twin)


@given(keys64, st.integers(16, 200), st.integers(2, 4), st.floats(0, 0.95), st.data())
def test_sources_equal_the_reference(
    key: int, num_nodes: int, num_classes: int, homophily: float, data: st.DataObject
) -> None:
    degree = st.integers(0, num_nodes // 2)
    degrees = data.draw(st.lists(degree, min_size=num_nodes, max_size=num_nodes))
    indptr = np.concatenate([[0], np.cumsum(degrees)])
    lo, hi = sorted(data.draw(st.tuples(st.integers(0, num_nodes), st.integers(0, num_nodes))))
    base = int(indptr[lo])
    results = []
    for module in MODULES:
        keys = _keys(module, key, num_nodes)
        out = np.empty(int(indptr[hi]) - base, np.int32)
        module.draw_sources(np.uint64(key), num_nodes, num_classes, homophily, 3.0, keys, indptr, base, lo, hi, out)
        results.append(out)
    np.testing.assert_array_equal(results[0], results[1])


def test_source_offsets_may_exceed_32_bits() -> None:
    num_nodes, base = 50, 2**33
    keys = _keys(synthetic, 3, num_nodes)
    degrees = np.full(num_nodes, 4)
    indptr = np.concatenate([[0], np.cumsum(degrees)])
    near, far = np.empty(200, np.int64), np.empty(200, np.int64)
    synthetic.draw_sources(np.uint64(3), num_nodes, 4, 0.5, 3.0, keys, indptr, 0, 0, num_nodes, near)
    synthetic.draw_sources(np.uint64(3), num_nodes, 4, 0.5, 3.0, keys, indptr + base, base, 0, num_nodes, far)
    np.testing.assert_array_equal(near, far)


@given(keys64, st.integers(1, 9), st.integers(20, 60), st.integers(0, 20))
def test_features_equal_the_reference(key: int, width: int, num_nodes: int, lo: int) -> None:
    results = []
    for module in MODULES:
        keys = _keys(module, key, num_nodes)
        centroids, rows = np.empty((3, width), np.float32), np.empty((num_nodes - lo, width), np.float32)
        module.draw_centroids(np.uint64(key), 4.0, centroids)
        module.draw_features(np.uint64(key), num_nodes, centroids, 1.5, keys, lo, num_nodes, rows)
        np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 4, rtol=1e-6)
        results.append(rows)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-5)
