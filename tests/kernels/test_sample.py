"""`sample` and `sample_weighted` against their twins, and against the probabilities they must have."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.kernels import (
    reference_sample,
    reference_sample_weighted,
    sample,
    sample_weighted,
)

PICKS: dict[str, tuple[str, Any, Any]] = {
    "uniform": ("bitmap", sample.pick_uniform, reference_sample.pick_uniform),
    "replace": ("", sample.pick_replace, reference_sample.pick_replace),
    "weighted": ("weights heap", sample_weighted.pick_weighted, reference_sample_weighted.pick_weighted),
    "labor": ("indices heap", sample_weighted.pick_labor, reference_sample_weighted.pick_labor),
    "labor_weighted": (
        "indices weights heap",
        sample_weighted.pick_labor_weighted,
        reference_sample_weighted.pick_labor_weighted,
    ),
    "weighted_replace": (
        "weights heap",
        sample_weighted.pick_weighted_replace,
        reference_sample_weighted.pick_weighted_replace,
    ),
}


def _pick(
    pick: Callable[..., Any], wants: str, degrees: list[int], fanout: int, weights: NDArray[np.float32], reference: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets and positions of one hop over destinations of the given degrees, node i being i of slot i % 3."""
    num_dst = len(degrees)
    indptr = np.cumsum([0, *degrees]).astype(np.int64)
    indices = (np.arange(indptr[-1]) * 7 % 50).astype(np.int32)
    nodes, slots = np.arange(num_dst, dtype=np.int32), (np.arange(num_dst) % 3).astype(np.int32)
    keys = np.array([3, 1 << 63, 77], np.uint64)
    starts, widths = np.zeros(num_dst, np.int64), np.zeros(num_dst, np.int64)
    offsets = np.zeros(num_dst + 1, np.int64)
    replace = pick.__name__.endswith("replace")
    out = (starts, widths, offsets)
    if "weights" in wants:
        count: Any = reference_sample_weighted.count_weighted if reference else sample_weighted.count_weighted
        count(indptr, weights, nodes, 0, num_dst, fanout, replace, *out)
    else:
        plain: Any = reference_sample.count_edges if reference else sample.count_edges
        plain(indptr, nodes, 0, num_dst, fanout, replace, *out)
    np.cumsum(offsets, out=offsets)
    positions = np.full(offsets[-1], -1, np.int64)
    before = {"indices": indices, "weights": weights}
    after = {"heap": np.zeros(fanout), "bitmap": np.zeros(max([0, *degrees]) // 64 + 1, np.uint64)}
    head = [before[name] for name in wants.split() if name in before]
    tail = [after[name] for name in wants.split() if name in after]
    middle = num_dst // 2  # two ranges must give what one does
    for lo, hi in ((0, middle), (middle, num_dst)):
        pick(*head, nodes, slots, keys, starts, widths, offsets, lo, hi, *tail, positions)
    assert not after["bitmap"].any()
    return offsets, positions


@pytest.mark.parametrize("name", PICKS)
@settings(max_examples=40, deadline=None)
@given(
    degrees=st.lists(st.one_of(st.integers(0, 12), st.integers(60, 200)), max_size=6),
    fanout=st.sampled_from([1, 2, 5, 33, 40, 100]),
    seed=st.integers(0, 9),
)
def test_picks_are_those_of_the_twin(name: str, degrees: list[int], fanout: int, seed: int) -> None:
    wants, fast, slow = PICKS[name]
    rng = np.random.default_rng(seed)
    weights = (rng.random(sum(degrees)) * (rng.random(sum(degrees)) > 0.3)).astype(np.float32)
    offsets, positions = _pick(fast, wants, degrees, fanout, weights, False)
    offsets_twin, positions_twin = _pick(slow, wants, degrees, fanout, weights, True)
    np.testing.assert_array_equal(offsets, offsets_twin)
    np.testing.assert_array_equal(positions, positions_twin)
    starts = np.cumsum([0, *degrees])
    for i in range(len(degrees)):
        mine = positions[offsets[i] : offsets[i + 1]]
        assert ((mine >= starts[i]) & (mine < starts[i + 1])).all()
        steps = np.diff(mine)
        assert (steps >= 0).all() if "replace" in name else (steps > 0).all()
        if "weights" in wants:
            assert (weights[mine] > 0).all()


@given(weights=st.lists(st.sampled_from([0.0, 0.5, 2.0]), max_size=30), cut=st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_pick_positive_is_that_of_the_twin(weights: list[float], cut: int) -> None:
    cut = min(cut, len(weights))
    array = np.array(weights, np.float32)
    starts, degrees = np.array([0, cut]), np.array([cut, len(array) - cut])
    offsets = np.cumsum([0, (array[:cut] > 0).sum(), (array[cut:] > 0).sum()])
    fast, slow = np.zeros(offsets[-1], np.int64), np.zeros(offsets[-1], np.int64)
    twins: Any = reference_sample_weighted
    sample_weighted.pick_positive(array, starts, degrees, offsets, 0, 2, fast)
    twins.pick_positive(array, starts, degrees, offsets, 0, 2, slow)
    np.testing.assert_array_equal(fast, slow)


@pytest.mark.parametrize("family", [(sample, reference_sample), (sample_weighted, reference_sample_weighted)])
def test_every_kernel_has_a_twin_of_the_same_signature(family: tuple[Any, Any]) -> None:
    kernels, twins = family
    names = [
        name
        for name, value in vars(kernels).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == kernels.__name__ and callable(value)
    ]
    assert len(names) >= 4
    for name in names:
        assert inspect.signature(getattr(kernels, name)) == inspect.signature(getattr(twins, name)), name


@given(values=st.lists(st.integers(-5, 5), max_size=80), lo=st.integers(0, 80), hi=st.integers(0, 80))
@settings(max_examples=40, deadline=None)
def test_sort_range(values: list[int], lo: int, hi: int) -> None:
    array = np.array(values, np.int64)
    lo, hi = min(lo, hi, len(array)), min(max(lo, hi), len(array))
    sample.sort_range(array, lo, hi)
    assert array.tolist() == values[:lo] + sorted(values[lo:hi]) + values[hi:]


def _draw_many(name: str, degree: int, fanout: int, weights: list[float], trials: int = 20_000) -> NDArray[np.int64]:
    """Positions [trials, fanout] that independent keys draw from one neighbour list."""
    wants, fast, _ = PICKS[name]
    indptr, nodes = np.array([0, degree]), np.zeros(trials, np.int32)
    starts, degrees = np.zeros(trials, np.int64), np.full(trials, degree, np.int64)
    offsets = np.arange(trials + 1) * fanout
    keys = np.arange(trials).astype(np.uint64)
    slots = np.arange(trials, dtype=np.int32)
    arrays = {
        "indices": np.arange(100, 100 + degree, dtype=np.int32),
        "weights": np.array(weights, np.float32),
        "heap": np.zeros(fanout),
        "bitmap": np.zeros(degree // 64 + 1, np.uint64),
    }
    head = [arrays[n] for n in wants.split() if n in ("indices", "weights")]
    tail = [arrays[n] for n in wants.split() if n in ("heap", "bitmap")]
    positions = np.zeros(trials * fanout, np.int64)
    fast(*head, nodes, slots, keys, starts, degrees, offsets, 0, trials, *tail, positions)
    assert indptr[-1] > positions.max()
    return positions.reshape(trials, fanout)


def _assert_plausible(counts: NDArray[Any], expected: NDArray[Any]) -> None:
    """Chi-square of counts within five standard deviations of its mean; seeds are fixed, so this never flickers."""
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom), (counts, expected)


@pytest.mark.parametrize("name", ["uniform", "labor"])
@pytest.mark.parametrize(
    ("degree", "fanout"), [(5, 2), (6, 4), (64, 10), (65, 3), (100, 33), (200, 60), (100, 90), (64, 63)]
)
def test_every_neighbour_is_as_likely(name: str, degree: int, fanout: int) -> None:
    picks = _draw_many(name, degree, fanout, [])
    counts = np.bincount(picks.reshape(-1), minlength=degree)
    # Inclusions of one draw are not independent; their variance is that of a coin of probability fanout / degree.
    expected = len(picks) * fanout / degree
    spread = np.sqrt(expected * (1 - fanout / degree))
    assert (np.abs(counts - expected) < 5 * spread).all()


@pytest.mark.parametrize("name", ["uniform", "labor"])
def test_every_pair_is_as_likely(name: str) -> None:
    picks = _draw_many(name, 6, 2, [])
    pairs = list(itertools.combinations(range(6), 2))
    counts = np.array([(picks == pair).all(axis=1).sum() for pair in pairs])
    _assert_plausible(counts, np.full(len(pairs), len(picks) / len(pairs)))


def test_replacement_draws_are_independent() -> None:
    picks = _draw_many("replace", 4, 3, [])
    _assert_plausible(np.bincount(picks.reshape(-1), minlength=4), np.full(4, picks.size / 4))
    assert abs((picks[:, 0] == picks[:, 2]).mean() - 1 / 16) < 0.01  # all three equal: sorted, so ends agree


def test_weighted_replacement_follows_the_weights() -> None:
    weights = [0.0, 1.0, 2.0, 0.0, 5.0, 0.0]
    picks = _draw_many("weighted_replace", 6, 3, weights)
    counts = np.bincount(picks.reshape(-1), minlength=6)
    assert counts[[0, 3, 5]].sum() == 0
    _assert_plausible(counts[[1, 2, 4]], picks.size * np.array([1, 2, 5]) / 8)


@pytest.mark.parametrize("name", ["weighted", "labor_weighted"])
def test_weighted_picks_are_successive_draws(name: str) -> None:
    """The probability of a set is the sum, over its orders, of the products of successive shares."""
    weights = [1.0, 2.0, 0.0, 4.0, 3.0]
    picks = _draw_many(name, 5, 2, weights)
    pairs = [pair for pair in itertools.combinations(range(5), 2) if 2 not in pair]
    total = sum(weights)

    def probability(a: int, b: int) -> float:
        return weights[a] * weights[b] / total * (1 / (total - weights[a]) + 1 / (total - weights[b]))

    counts = np.array([(picks == pair).all(axis=1).sum() for pair in pairs])
    assert counts.sum() == len(picks)
    _assert_plausible(counts, len(picks) * np.array([probability(*pair) for pair in pairs]))


def test_labor_destinations_agree_and_uniform_ones_do_not() -> None:
    degree, fanout = 40, 10
    starts, degrees = np.zeros(2, np.int64), np.full(2, degree, np.int64)
    nodes, slots, keys = np.array([1, 2], np.int32), np.zeros(2, np.int32), np.array([9], np.uint64)
    offsets = np.array([0, fanout, 2 * fanout])
    around = (nodes, slots, keys, starts, degrees, offsets, 0, 2)
    labor, uniform = np.zeros(2 * fanout, np.int64), np.zeros(2 * fanout, np.int64)
    sample_weighted.pick_labor(np.arange(degree, dtype=np.int32), *around, np.zeros(fanout), labor)
    sample.pick_uniform(*around, np.zeros(1, np.uint64), uniform)
    assert (labor[:fanout] == labor[fanout:]).all()
    assert (uniform[:fanout] != uniform[fanout:]).any()
