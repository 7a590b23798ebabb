"""`dropout` against its twins, and what its bits must not depend on."""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.kernels import dropout, reference_dropout
from penstock.kernels.parallel import split

MODULES: list[Any] = [dropout, reference_dropout]
TWINS = ["epoch_key", "drop_nodes", "drop_edges"]
WORDS = st.integers(0, 2**64 - 1)


@pytest.fixture(autouse=True)
def without_overflow_warnings() -> Iterator[None]:
    """Words wrap around on purpose; NumPy's scalars warn of it where kernels run uncompiled."""
    with np.errstate(over="ignore"):
        yield


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_the_same_signature(name: str) -> None:
    ours, twin = (getattr(module, name) for module in MODULES)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(twin).parameters)


@given(st.integers(0, 2**63), st.integers(0, 10_000))
def test_epoch_keys_equal_the_reference(seed: int, epoch: int) -> None:
    ours, twin = (module.epoch_key for module in MODULES)
    assert int(ours(np.uint64(seed), np.uint64(epoch))) == twin(seed, epoch)


@given(
    WORDS, st.integers(0, 130), st.integers(0, 3), st.integers(0, 65535), st.integers(0, 9), st.booleans(), st.data()
)
def test_rows_of_nodes_equal_the_reference(
    key: int, layer: int, salt: int, threshold: int, width: int, double: bool, data: st.DataObject
) -> None:
    dtype = np.float64 if double else np.float32
    ids = np.array(data.draw(st.lists(st.integers(0, 2**40), max_size=5)), np.int64)
    x = np.random.default_rng(0).standard_normal((len(ids), width)).astype(dtype)
    outs = np.full_like(x, np.nan), np.full_like(x, np.nan)
    scale = dtype(65536 / (65536 - threshold))
    for module, word, out in zip(MODULES, (np.uint64(key), key), outs, strict=True):
        module.drop_nodes(x, ids, word, layer, salt, threshold, scale, out, 0, len(ids))
    np.testing.assert_array_equal(*outs)


@given(WORDS, st.integers(0, 65535), st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 6))
def test_rows_of_edges_equal_the_reference(key: int, threshold: int, counts: list[int], heads: int) -> None:
    generator = np.random.default_rng(1)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    indices = generator.integers(0, 6, indptr[-1]).astype(np.int32)
    ids = generator.integers(0, 2**40, 6)
    x = generator.standard_normal((len(indices), heads)).astype(np.float32)
    outs = np.full_like(x, np.nan), np.full_like(x, np.nan)
    for module, word, out in zip(MODULES, (np.uint64(key), key), outs, strict=True):
        module.drop_edges(x, indptr, indices, ids, word, 2, 0, threshold, np.float32(2), out, 0, len(counts))
    np.testing.assert_array_equal(*outs)


def test_bits_do_not_depend_on_how_rows_are_cut() -> None:
    x, ids = np.ones((300, 17), np.float32), np.arange(300)
    args = (x, ids, np.uint64(5), 1, 0, 20000, np.float32(1))
    alone, shared = np.zeros_like(x), np.zeros_like(x)
    dropout.drop_nodes(*args, alone, 0, 300)
    for lo, hi in reversed(split(300, 7)):
        dropout.drop_nodes(*args, shared, lo, hi)
    np.testing.assert_array_equal(alone, shared)


def test_lanes_columns_nodes_and_layers_are_dropped_independently() -> None:
    """Frequencies of single values and of pairs, at five standard deviations."""
    nodes, width, p = 4000, 8, 0.25
    x, ids, threshold = np.ones((nodes, width), np.float32), np.arange(nodes), round(p * 65536)
    kept = []
    for layer in (0, 1):
        out = np.empty_like(x)
        dropout.drop_nodes(x, ids, np.uint64(11), layer, 0, threshold, np.float32(1), out, 0, nodes)
        kept.append(out > 0)
    five = 5 / np.sqrt(nodes)
    assert np.abs(kept[0].mean(0) - (1 - p)).max() < five * np.sqrt(p * (1 - p))
    both = np.concatenate(kept, axis=1).astype(float)
    correlation = np.corrcoef(np.concatenate([both, np.roll(both, 1, axis=0)], axis=1).T)
    assert np.abs(correlation - np.eye(4 * width)).max() < 1.2 * five
