"""Orders of epochs and seeds of items."""

from collections.abc import Callable

import numpy as np
import pytest

from penstock.sampler.neighbors import SampleConfig, make_trace_meta
from penstock.sampler.seeds import epoch_order, item_seeds
from penstock.storage.graph import GraphStore

IDS = np.arange(0, 3000, 3, dtype=np.int32)


def test_an_epoch_permutes_the_split_and_keeps_the_dtype() -> None:
    order = epoch_order(IDS, seed=1, epoch=0)
    assert order.dtype == IDS.dtype
    assert not np.array_equal(order, IDS)
    np.testing.assert_array_equal(np.sort(order), IDS)


def test_orders_depend_on_seed_and_epoch_alone() -> None:
    order = epoch_order(IDS, seed=1, epoch=4)
    np.testing.assert_array_equal(order, epoch_order(IDS.astype(np.int64), seed=1, epoch=4))
    assert not np.array_equal(order, epoch_order(IDS, seed=1, epoch=5))
    assert not np.array_equal(order, epoch_order(IDS, seed=2, epoch=4))


def test_orders_are_pinned() -> None:
    """Traces of today must be continued by the release of tomorrow."""
    assert epoch_order(np.arange(8, dtype=np.int32), seed=7, epoch=3).tolist() == [2, 5, 4, 7, 3, 1, 0, 6]


def test_every_place_is_as_likely() -> None:
    firsts = np.array([int(epoch_order(np.arange(5), seed=3, epoch=epoch)[0]) for epoch in range(5000)])
    counts = np.bincount(firsts, minlength=5)
    assert (np.abs(counts - 1000) < 5 * np.sqrt(5000 * 0.2 * 0.8)).all()


def test_items_cover_every_epoch_once(make_graph: Callable[..., GraphStore]) -> None:
    graph = make_graph(103, [], train=np.arange(3, 103))
    meta = make_trace_meta(graph, SampleConfig(fanouts=(1,), batch_size=32), num_epochs=3)
    assert meta.items_per_epoch == 4
    seeds = [item_seeds(graph, meta, item) for item in range(meta.num_items)]
    assert [len(s) for s in seeds] == 3 * [32, 32, 32, 4]
    epochs = [np.concatenate(seeds[4 * n : 4 * n + 4]) for n in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(3, 103))
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_evaluation_keeps_ascending_order(make_graph: Callable[..., GraphStore], num_epochs: int) -> None:
    graph = make_graph(20, [])
    meta = make_trace_meta(graph, SampleConfig(fanouts=(1,), batch_size=4), "valid", num_epochs, shuffle=False)
    seeds = np.concatenate([item_seeds(graph, meta, item) for item in range(meta.num_items)])
    assert seeds.tolist() == num_epochs * list(range(0, 20, 2))
