"""Where ranks go: replicas whole on a node and spread, or their ranks one by one; all of it without Ray."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cluster.placement import NodeResources, NoRoom, Placement, plan_placement, ranks_alone
from penstock.engine.chunked.layout import Layout


def nodes(*amounts: dict[str, float]) -> list[NodeResources]:
    return [NodeResources(name=f"node-{n}", amounts=found) for n, found in enumerate(amounts)]


def place(layout: Layout, amounts: Sequence[dict[str, float]], cpus: float = 1.0, **options: Any) -> Placement:
    groups = [layout.ranks_of(replica) for replica in range(layout.replicas)]
    return plan_placement(groups, cpus_per_rank=cpus, nodes=nodes(*amounts), **options)


def test_replicas_that_fit_a_node_are_whole_and_spread() -> None:
    found = place(Layout(2, 2, 3), [{"CPU": 8}] * 3, cpus=2)
    assert found.strategy == "SPREAD" and found.bundles == ({"CPU": 8.0},) * 3
    assert found.bundle_of_rank == (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)
    assert found.reason == "each of 3 replicas fits one node"
    assert place(Layout(2, 2, 3), [{"CPU": 24}], cpus=2).strategy == "SPREAD"  # all of them on one node, if need be


def test_a_replica_that_fits_no_node_is_placed_by_ranks() -> None:
    found = place(Layout(4, 1, 2), [{"CPU": 3}] * 3)
    assert found.strategy == "PACK" and found.bundles == ({"CPU": 1.0},) * 8
    assert found.bundle_of_rank == tuple(range(8))
    assert found.reason == "no node has room for a replica of {'CPU': 4.0}, so ranks are placed one by one"


def test_uneven_nodes_hold_whole_replicas_where_they_can() -> None:
    assert place(Layout(2, 1, 3), [{"CPU": 5}, {"CPU": 3}, {"CPU": 1}]).strategy == "SPREAD"
    found = place(Layout(2, 1, 3), [{"CPU": 3}, {"CPU": 3}, {"CPU": 1}])  # two whole ones, and three ranks more
    assert found.strategy == "PACK" and len(found.bundles) == 6
    assert "room for fewer than 3 whole replicas of {'CPU': 2.0}" in found.reason


def test_one_replica_is_packed_rank_by_rank() -> None:
    found = place(Layout(2, 1), [{"CPU": 8}])
    assert found.strategy == "PACK" and found.bundles == ({"CPU": 1.0},) * 2
    assert found.reason == "there is one replica, so ranks are placed one by one"


def test_gpus_decide_too() -> None:
    gpu = {"CPU": 8.0, "GPU": 2.0}
    found = place(Layout(2, 1, 2), [gpu, gpu], gpus_per_rank=1.0)
    assert found.bundles == ({"CPU": 2.0, "GPU": 2.0},) * 2
    found = place(Layout(2, 1, 2), [gpu, {"CPU": 64.0}], gpus_per_rank=0.5)
    assert found.strategy == "SPREAD" and found.bundles == ({"CPU": 2.0, "GPU": 1.0},) * 2
    assert place(Layout(3, 1, 2), [{"CPU": 9.0, "GPU": 2.0}] * 3, gpus_per_rank=1.0).strategy == "PACK"
    with pytest.raises(NoRoom, match=re.escape("4 ranks of {'CPU': 1.0, 'GPU': 1.0}, {'CPU': 4.0, 'GPU': 4.0} in all")):
        place(Layout(2, 1, 2), [gpu, {"CPU": 64.0}], gpus_per_rank=1.0)


def test_resources_are_a_replicas_not_a_ranks() -> None:
    trainer = {"CPU": 2.0, "trainer": 1.0}
    found = place(Layout(2, 1, 2), [trainer, {"CPU": 64.0}, trainer], resources={"trainer": 1})
    assert found.strategy == "SPREAD" and found.bundles == ({"CPU": 2.0, "trainer": 1.0},) * 2
    found = place(Layout(3, 1, 2), [trainer] * 3, resources={"trainer": 1})
    assert found.strategy == "PACK" and found.bundles == ({"CPU": 1.0, "trainer": 0.3333},) * 6
    with pytest.raises(NoRoom, match=r"node-0: \{'CPU': 9, 'disk': 0.0\}\); lower cluster.replicas"):
        place(Layout(1, 1, 2), [{"CPU": 9}], resources={"disk": 0.1})


def test_ranks_that_fit_nowhere_are_told_with_what_there_is() -> None:
    with pytest.raises(NoRoom) as caught:
        place(Layout(2, 2, 2), [{"CPU": 4}, {"CPU": 3}])
    text = str(caught.value)
    assert "8 ranks of {'CPU': 1.0}, {'CPU': 8.0} in all, do not fit" in text
    assert "node-0: {'CPU': 4}; node-1: {'CPU': 3}" in text and "add nodes" in text
    with pytest.raises(NoRoom, match=r"nodes \(none\)"):
        place(Layout(1, 1, 2), [])


def test_groups_need_not_be_a_grid() -> None:
    """Sampled training: every replica is a rank."""
    found = plan_placement([[2], [0], [1]], cpus_per_rank=3, nodes=nodes({"CPU": 6}, {"CPU": 3}))
    assert found.strategy == "SPREAD" and found.bundle_of_rank == (1, 2, 0)
    for bad in ([[0], [2]], [[0, 1], [1]], [[0], []]):
        with pytest.raises(ValueError, match="each of the ranks"):
            plan_placement(bad, cpus_per_rank=1, nodes=nodes({"CPU": 6}))
    found = ranks_alone([[0, 1]], cpus_per_rank=1, strategy="STRICT_SPREAD", reason="so it is wanted")
    assert (found.strategy, found.bundles, found.reason) == ("STRICT_SPREAD", ({"CPU": 1.0},) * 2, "so it is wanted")


@given(st.lists(st.integers(0, 9), max_size=5), st.integers(1, 4), st.integers(1, 4))
def test_every_plan_can_be_carried_out(sizes: list[int], ranks: int, replicas: int) -> None:
    """By counting: equal bundles fit if and only if the nodes' whole shares add up."""
    amounts = [{"CPU": float(size)} for size in sizes]
    try:
        found = place(Layout(ranks, 1, replicas), amounts)
    except NoRoom:
        assert sum(sizes) < ranks * replicas
        return
    (size,) = {bundle["CPU"] for bundle in found.bundles}
    assert sum(node // int(size) for node in sizes) >= len(found.bundles)
    assert (found.strategy == "SPREAD") == (replicas > 1 and sum(node // ranks for node in sizes) >= replicas)
    used = [0.0] * len(found.bundles)
    for bundle in found.bundle_of_rank:
        used[bundle] += 1.0
    assert used == [size] * len(found.bundles)
