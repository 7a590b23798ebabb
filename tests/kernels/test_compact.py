"""`compact`, `seeds` and `rng` against their twins."""

import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import compact, reference_compact, reference_rng, reference_seeds, rng, seeds

NUM_NODES = 40
ids_lists = st.lists(st.integers(0, NUM_NODES - 1), max_size=60)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@settings(max_examples=60, deadline=None)
@given(known=st.lists(st.integers(0, NUM_NODES - 1), max_size=20, unique=True), ids=ids_lists)
def test_all_ways_to_number_agree(dtype: Any, known: list[int], ids: list[int]) -> None:
    array, results = np.array(ids, dtype), []
    for module, hashed in ((compact, False), (reference_compact, False), (compact, True), (reference_compact, True)):
        nodes = np.zeros(NUM_NODES + 1, dtype)
        nodes[: len(known)] = known
        local = np.zeros(len(ids), np.int32)
        if hashed:
            table: Any = (np.full(128, -1, dtype), np.zeros(128, np.int32))
            module.fill_hash(nodes, 0, len(known), *table)
            count = module.compact_hash(array, 0, len(ids), *table, nodes, len(known), local)
        else:
            table = np.full(NUM_NODES, -1, np.int32)
            module.fill_table(nodes, 0, len(known), table)
            count = module.compact_table(array, 0, len(ids), table, nodes, len(known), local)
            module.clear_table(nodes, 0, count, table)
            assert (table == -1).all()
        results.append((count, nodes[:count].tolist(), local.tolist()))
    assert results.count(results[0]) == 4
    count, nodes_list, local_list = results[0]
    assert nodes_list == list(dict.fromkeys(known + ids))
    assert [nodes_list[n] for n in local_list] == ids


def test_a_full_probe_sequence_wraps_around() -> None:
    ids = np.arange(7, dtype=np.int32)
    table, numbers = np.full(8, -1, np.int32), np.zeros(8, np.int32)
    local, nodes = np.zeros(7, np.int32), np.zeros(8, np.int32)
    assert compact.compact_hash(ids, 0, 7, table, numbers, nodes, 0, local) == 7
    assert compact.compact_hash(ids[::-1].copy(), 0, 7, table, numbers, nodes, 7, local) == 7
    assert local.tolist() == list(range(6, -1, -1))


@settings(max_examples=40, deadline=None)
@given(runs=st.lists(st.integers(0, 5), max_size=20), seed=st.integers(0, 5))
def test_gather_and_scatter(runs: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    total, offsets = sum(runs), np.cumsum([0, *runs])
    values, positions = random.random(100, np.float32), random.integers(0, 100, total)
    targets = (total - offsets[1:]).astype(np.int64)  # the runs in reverse order
    outs = []
    for module in (compact, reference_compact):
        gathered, scattered = np.zeros(total, np.float32), np.zeros(total, np.float32)
        module.gather_flat(values, positions, 0, total, gathered)
        module.scatter_runs(gathered, offsets, targets, 0, len(runs), scattered)
        outs.append((gathered.tolist(), scattered.tolist()))
    assert outs[0] == outs[1]
    assert outs[0][0] == values[positions].tolist()


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 2**40), max_size=20), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 99))
def test_hashes_and_keys(ids: list[int], seed: int, epoch: int) -> None:
    array = np.array(ids, np.int64)
    cases: list[tuple[Any, Any, Any]] = [
        (seeds.hash_ids, reference_seeds.hash_ids, (array, seed, epoch)),
        (seeds.hop_keys, reference_seeds.hop_keys, (array, array + 1, seed, 2)),
    ]
    for fast, slow, arguments in cases:
        mine, twin = np.zeros(len(ids), np.uint64), np.zeros(len(ids), np.uint64)
        fast(*arguments, 0, len(ids), mine)
        slow(*arguments, 0, len(ids), twin)
        np.testing.assert_array_equal(mine, twin)


def test_keys_differ_in_every_coordinate() -> None:
    def key(seed: int, epoch: int, item: int, hop: int) -> int:
        out = np.zeros(1, np.uint64)
        seeds.hop_keys(np.array([item]), np.array([epoch]), seed, hop, 0, 1, out)
        return int(out[0])

    keys = {key(*where) for where in np.ndindex(3, 3, 3, 3)}
    assert len(keys) == 81


@pytest.mark.parametrize("family", [(compact, reference_compact), (seeds, reference_seeds)])
def test_every_kernel_has_a_twin_of_the_same_signature(family: tuple[Any, Any]) -> None:
    kernels, twins = family
    names = [
        name
        for name, value in vars(kernels).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == kernels.__name__ and callable(value)
    ]
    assert len(names) >= 2
    for name in names:
        assert inspect.signature(getattr(kernels, name)) == inspect.signature(getattr(twins, name)), name


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(0, 2**64 - 1), value=st.integers(0, 2**63 - 1))
def test_random_numbers_are_those_of_the_twin(bits: int, value: int) -> None:
    word = np.uint64(bits)
    assert int(rng.mix(word)) == reference_rng.mix(bits)
    assert int(rng.fold(word, value)) == reference_rng.fold(bits, value)
    assert int(rng.draw(word, value)) == reference_rng.draw(bits, value)
    assert int(rng.below(word, value >> 31)) == reference_rng.below(bits, value >> 31)
    assert float(rng.unit(word)) == reference_rng.unit(bits)
