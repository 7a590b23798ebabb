"""What draws by weight count: the twin, and sums that estimate without bias."""

import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.kernels import reference_weigh, weigh
from penstock.kernels.sample_weighted import (
    count_weighted,
    pick_labor,
    pick_labor_weighted,
    pick_weighted,
    pick_weighted_replace,
)

METHODS = ["weighted", "labor", "replace"]


def draw_and_weigh(
    module: Any, method: str, weights: Any, fanout: int, trials: int, indices: Any = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Positions and weights [trials, c] that independent keys give one neighbour list."""
    weights = np.asarray(weights, np.float32)
    degree, nodes = len(weights), np.zeros(trials, np.int32)
    indices = np.arange(100, 100 + degree, dtype=np.int32) if indices is None else np.asarray(indices, np.int32)
    starts, degrees = np.zeros(trials, np.int64), np.zeros(trials, np.int64)
    offsets, replace = np.zeros(trials + 1, np.int64), method == "replace"
    assert (
        count_weighted(np.array([0, degree]), weights, nodes, 0, trials, fanout, replace, starts, degrees, offsets) < 0
    )
    np.cumsum(offsets, out=offsets)
    who = (nodes, np.arange(trials, dtype=np.int32), np.arange(trials).astype(np.uint64) + np.uint64(9))
    around = (*who, starts, degrees, offsets, 0, trials)
    positions, heap = np.zeros(int(offsets[-1]), np.int64), np.zeros(fanout)
    if method == "labor":
        pick_labor_weighted(indices, weights, *around, heap, positions)
    else:
        (pick_weighted_replace if replace else pick_weighted)(weights, *around, heap, positions)
    out = np.full(len(positions), np.nan, np.float32)
    scratch = (np.zeros(fanout), np.zeros(fanout), np.zeros(fanout, np.int64))
    module.weigh_draws(indices, weights, *around, method == "labor", replace, *scratch, positions, out)
    return positions.reshape(trials, -1), out.reshape(trials, -1)


@pytest.mark.parametrize("name", ["copy_number", "weigh_draws"])
def test_twins_have_the_same_signature(name: str) -> None:
    ours, twin = getattr(weigh, name), getattr(reference_weigh, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(twin).parameters)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-3, 0.5, 1.0, 7.0, 3e38]), min_size=1, max_size=40),
    fanout=st.sampled_from([1, 2, 5, 39, 50]),
    method=st.sampled_from(METHODS),
)
def test_equals_the_reference(weights: list[float], fanout: int, method: str) -> None:
    indices = np.sort(np.arange(len(weights)) // 2)  # every source twice
    found = [draw_and_weigh(module, method, weights, fanout, 3, indices)[1] for module in (weigh, reference_weigh)]
    total = float(np.sum(np.array(weights, np.float32), dtype=np.float64))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    assert (found[0] >= 0).all() and np.isfinite(found[0]).all()
    if total < 3.4e38 and any(weights):
        np.testing.assert_allclose(found[0].sum(axis=1, dtype=np.float64), total, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("fanout", [1, 2, 3, 5])
def test_sums_over_draws_are_unbiased(method: str, parallel: bool, fanout: int) -> None:
    """The mean over many keys is within five of its own standard errors of the sum over all in-edges."""
    weights = np.array([10.0, 1.0, 0.0, 1.0, 3.0, 0.5, 2.0], np.float32)
    values = np.array([[1.0, 0, 5, -3, 2, 8, -1], [1, 1, 1, 1, 1, 1, 1]])
    positions, found = draw_and_weigh(
        weigh, method, weights, fanout, 40_000, [0, 0, 1, 2, 2, 3, 4] if parallel else None
    )
    for row in values:
        sums = (found * row[positions]).sum(axis=1, dtype=np.float64)
        error = 5 * sums.std() / np.sqrt(len(sums)) + 1e-5
        assert abs(sums.mean() - (weights * row).sum()) < error, (sums.mean(), (weights * row).sum(), error)


def test_the_plain_mean_of_such_draws_is_biased() -> None:
    """What the estimator is there for: the test above would see it."""
    weights, row = np.array([10.0, 1.0, 1.0, 3.0], np.float32), np.array([1.0, 0.0, -3.0, 2.0])
    positions, _ = draw_and_weigh(weigh, "weighted", weights, 2, 40_000)
    sums = weights.sum() * row[positions].mean(axis=1)
    assert abs(sums.mean() - (weights * row).sum()) > 20 * sums.std() / np.sqrt(len(sums))


@pytest.mark.parametrize(("degree", "fanout", "at_most"), [(12, 10, 0.5), (12, 3, 1.05), (200, 10, 1.05)])
def test_no_noisier_than_draws_with_replacement(degree: int, fanout: int, at_most: float) -> None:
    """Of equal weights, in variance; nearly all neighbours leave little to guess."""
    weights, row = np.ones(degree), np.random.default_rng(0).standard_normal(degree)
    variances = []
    for method in ("weighted", "replace"):
        positions, found = draw_and_weigh(weigh, method, weights, fanout, 20_000)
        variances.append((found * row[positions]).sum(axis=1).var())
    assert variances[0] < at_most * variances[1]


def test_labor_draws_parallel_edges_as_often_as_others() -> None:
    """Two edges from one source are two of three edges, not one of two sources."""
    trials, indices = 20_000, np.array([4, 4, 9], np.int32)
    starts, degrees, offsets = np.zeros(trials, np.int64), np.full(trials, 3), np.arange(trials + 1)
    who = (np.zeros(trials, np.int32), np.arange(trials, dtype=np.int32), np.arange(trials).astype(np.uint64))
    positions = np.zeros(trials, np.int64)
    pick_labor(indices, *who, starts, degrees, offsets, 0, trials, np.zeros(1), positions)
    counts = np.bincount(positions, minlength=3)
    assert (np.abs(counts - trials / 3) < 5 * np.sqrt(trials * 2 / 9)).all()
