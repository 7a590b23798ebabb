"""Policies against brute force on traces so small that every movement can be tried."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.sampler.movement import (
    LapCounts,
    Tiers,
    cyclic_future,
    find_next_uses,
    settle,
    take_census,
)
from penstock.sampler.policies import PolicyName, top_rows

NUM_NODES = 5
Items = list[NDArray[np.int32]]


class Uses(dict[int, NDArray[np.int32]]):
    """Next uses in memory."""

    def put(self, item: int, values: NDArray[np.int32]) -> None:
        self[item] = values.copy()

    def get(self, item: int) -> NDArray[np.int32]:  # type: ignore[override]  # only the protocol's `get` is called
        return self[item]


items_strategy = st.lists(
    st.lists(st.integers(0, NUM_NODES - 1), min_size=1, unique=True).map(lambda v: np.array(v, np.int32)),
    min_size=1,
    max_size=6,
)


def subsets(nodes: set[int], size: int) -> list[frozenset[int]]:
    return [frozenset(c) for n in range(min(size, len(nodes)) + 1) for c in combinations(sorted(nodes), n)]


def fewest_misses(items: Items, num_host: int, start: frozenset[int]) -> dict[frozenset[int], int]:
    """Try everything: the fewest misses from `start` to every state of the tier after the last item."""
    states = {start: 0}
    for ids in items:
        wanted, following = set(ids.tolist()), dict[frozenset[int], int]()
        for held, misses in states.items():
            cost = misses + len(wanted - held)
            for kept in subsets(wanted | held, num_host):
                following[kept] = min(cost, following.get(kept, cost))
        states = following
    return states


def run_once(items: Items, num_host: int) -> int:
    """Misses of one pass from an empty tier, nothing known beyond the end."""
    never, uses = len(items), Uses()
    census = take_census(items.__getitem__, len(items), NUM_NODES, never=never)
    find_next_uses(items.__getitem__, len(items), np.full(NUM_NODES, never, np.int32), uses, NUM_NODES)
    tiers = Tiers(census.counts, policy="belady", num_device=0, num_host=num_host, max_inputs=NUM_NODES)
    tiers.policy.start(np.full(num_host, never, np.int32), never)
    return sum(len(move.missing) for move in tiers.replay(items.__getitem__, range(len(items)), uses))


def run_laps(items: Items, num_host: int, policy: PolicyName, num_device: int = 0) -> tuple[Tiers, LapCounts, Uses]:
    census, uses = take_census(items.__getitem__, len(items), NUM_NODES, never=2 * len(items)), Uses()
    cyclic_future(items.__getitem__, len(items), census, uses, NUM_NODES)
    tiers = Tiers(census.counts, policy=policy, num_device=num_device, num_host=num_host, max_inputs=NUM_NODES)
    return tiers, settle(tiers, items.__getitem__, len(items), uses if policy == "belady" else None), uses


@settings(max_examples=60)
@given(items_strategy, st.integers(0, 3))
def test_belady_misses_as_few_rows_as_any_movement_can(items: Items, num_host: int) -> None:
    assert run_once(items, num_host) == min(fewest_misses(items, num_host, frozenset()).values())


@settings(max_examples=40)
@given(items_strategy, st.integers(1, 2))
def test_a_settled_lap_misses_as_few_rows_as_any_cycle_can(items: Items, num_host: int) -> None:
    _, counts, _ = run_laps(items, num_host, "belady")
    best = min(
        fewest_misses(items, num_host, start)[start]
        for start in subsets({int(i) for ids in items for i in ids}, num_host)
        if start in fewest_misses(items, num_host, start)
    )
    if counts.settled:
        assert counts.misses.sum() == best


@given(items_strategy, st.integers(0, 4), st.integers(0, 2))
def test_static_keeps_the_rows_of_most_items(items: Items, num_host: int, num_device: int) -> None:
    tiers, counts, _ = run_laps(items, num_host, "static", num_device)
    held = tiers.residents()
    reads = np.bincount(np.concatenate(items), minlength=NUM_NODES)
    order = [node for node in np.lexsort((np.arange(NUM_NODES), -reads)) if reads[node]]
    assert sorted(held[:num_device][held[:num_device] >= 0]) == sorted(order[:num_device])
    assert sorted(held[num_device:][held[num_device:] >= 0]) == sorted(order[num_device : num_device + num_host])
    assert counts.misses.sum() == reads.sum() - reads[order[: num_device + num_host]].sum()
    assert not counts.admits.any()


@given(items_strategy, st.integers(0, 4), st.integers(0, 2), st.sampled_from(["belady", "static", "none"]))
def test_sources_follow_the_rows(items: Items, num_host: int, num_device: int, policy: PolicyName) -> None:
    """Move real rows as the plan says: every input must find its own."""
    tiers, _, uses = run_laps(items, 0 if policy == "none" else num_host, policy, num_device)
    slots = tiers.residents()
    for move in tiers.replay(items.__getitem__, range(len(items)), uses if policy == "belady" else None):
        assert np.array_equal(move.missing, np.sort(move.missing))
        assert np.array_equal(np.concatenate([slots, move.missing])[move.source], items[move.item])
        slots[num_device + move.admit_slots] = move.missing[move.admit_rows]
        assert np.array_equal(slots, tiers.residents())


def test_numbering_of_slots_does_not_change_what_is_kept() -> None:
    rng = np.random.default_rng(0)
    items = [rng.permutation(NUM_NODES)[: rng.integers(1, 5)].astype(np.int32) for _ in range(9)]
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        tiers, _, uses = run_laps(items, 3, "belady")
        tiers.policy.nodes[:] = tiers.policy.nodes[order]
        held = tiers.policy.nodes
        tiers.place[held[held >= 0]] = np.flatnonzero(held >= 0)
        first = [next((t for t, ids in enumerate(items) if node in ids), 18) for node in held]
        tiers.policy.start(np.array(first, np.int32), 18)
        list(tiers.replay(items.__getitem__, range(9), uses))
        results.append(tiers.host_set())
    assert np.array_equal(results[0], results[1])


@pytest.mark.parametrize(("counts", "wanted"), [([3, 0, 5, 3, 1], [0, 2, 3]), ([1, 1, 1, 0, 1], [0, 1, 2])])
def test_top_rows_take_ties_in_order(counts: Sequence[int], wanted: Sequence[int]) -> None:
    placeless = np.full(5, -1, np.int32)
    assert top_rows(np.array(counts, np.int32), placeless, 3).tolist() == wanted
    assert top_rows(np.zeros(5, np.int32), placeless, 3).tolist() == []
    placeless[0] = 0
    assert 0 not in top_rows(np.array(counts, np.int32), placeless, 5)
