"""Where ranks go in a cluster: what belongs together on one node, what belongs together apart.

The stages and parts of a replica send each other rows all the time, so they are close; replicas meet once per optimizer
step and each has a disk and a cache of its own, so they are spread. Nothing here imports Ray: bundles are what a
placement group asks for, each of them from one node.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
Amounts = Mapping[str, float]
_GRAIN = 1e-4  # what Ray counts resources in


class NoRoom(ValueError):
    """The ranks do not fit the nodes, however they are placed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResources:
    """What a node has in all, like `{"CPU": 8, "GPU": 1, "trainer": 1}`."""

    name: str
    amounts: Amounts


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The bundles of a placement group, and in which of them every rank goes; `reason` says why they are so."""

    bundles: tuple[dict[str, float], ...]
    strategy: Strategy
    bundle_of_rank: tuple[int, ...]
    reason: str


def _has(room: Amounts, bundle: Amounts) -> bool:
    return all(room.get(name, 0.0) >= amount - _GRAIN / 2 for name, amount in bundle.items())


def _fits(bundles: Sequence[Amounts], nodes: Sequence[NodeResources]) -> bool:
    """Whether every bundle finds a node: the largest first, each where the least is left. Exact for equal bundles."""
    rooms = [dict(node.amounts) for node in nodes]
    for bundle in sorted(bundles, key=lambda bundle: sum(bundle.values()), reverse=True):
        open_rooms = [room for room in rooms if _has(room, bundle)]
        if not open_rooms:
            return False
        room = min(open_rooms, key=lambda room: sum(room.get(name, 0.0) for name in bundle))  # noqa: B023
        room.update({name: room[name] - amount for name, amount in bundle.items()})
    return True


def _shared(amount: float, ranks: int) -> float:
    """A rank's share of what its replica needs, rounded down to what can be counted."""
    return max(_GRAIN, math.floor(amount / ranks / _GRAIN + 1e-6) * _GRAIN)


def _bundle(cpus: float, gpus: float, memory: int, resources: Amounts) -> dict[str, float]:
    """What a placement group takes: nothing that is zero. `memory` is what Ray calls bytes of it."""
    amounts = {"CPU": cpus, "GPU": gpus, "memory": float(memory), **resources}
    return {name: round(amount, 4) for name, amount in amounts.items() if amount > 0}


def ranks_alone(
    groups: Sequence[Sequence[int]],
    *,
    cpus_per_rank: float,
    gpus_per_rank: float = 0.0,
    memory_per_rank: int = 0,
    resources: Amounts | None = None,
    strategy: Strategy = "PACK",
    reason: str,
) -> Placement:
    """One bundle for each rank, whatever the nodes are."""
    needs = resources or {}
    bundle_of = {
        rank: _bundle(
            cpus_per_rank,
            gpus_per_rank,
            memory_per_rank,
            {name: _shared(amount, len(group)) for name, amount in needs.items() if amount},
        )
        for group in groups
        for rank in group
    }
    ranks = range(len(bundle_of))
    bundles = tuple(bundle_of[rank] for rank in ranks)
    return Placement(bundles=bundles, strategy=strategy, bundle_of_rank=tuple(ranks), reason=reason)


def _groups_whole(
    groups: Sequence[Sequence[int]],
    cpus_per_rank: float,
    gpus_per_rank: float,
    memory_per_rank: int,
    resources: Amounts,
) -> Placement:
    bundles = tuple(
        _bundle(len(group) * cpus_per_rank, len(group) * gpus_per_rank, len(group) * memory_per_rank, resources)
        for group in groups
    )
    places = {rank: number for number, group in enumerate(groups) for rank in group}
    return Placement(
        bundles=bundles,
        strategy="SPREAD",
        bundle_of_rank=tuple(places[rank] for rank in range(len(places))),
        reason=f"each of {len(groups)} replicas fits one node",
    )


def plan_placement(
    groups: Sequence[Sequence[int]],
    *,
    cpus_per_rank: float,
    gpus_per_rank: float = 0.0,
    memory_per_rank: int = 0,
    nodes: Sequence[NodeResources],
    resources: Amounts | None = None,
) -> Placement:
    """Place ranks 0 .. n - 1; `groups` are the ranks of every replica, `resources` what a replica needs besides.

    Where every replica fits a node there is a bundle for each, and bundles are spread over the nodes; else, and where
    there is one replica only, there is a bundle for each rank, and they are packed. NoRoom where that cannot be.
    """
    ranks = sorted(rank for group in groups for rank in group)
    if ranks != list(range(len(ranks))) or not all(groups):
        raise ValueError(f"groups={groups} must have each of the ranks 0, 1, ... once, and no group may be empty")
    wanted = {"cpus_per_rank": cpus_per_rank, "gpus_per_rank": gpus_per_rank, "memory_per_rank": memory_per_rank}
    whole = _groups_whole(groups, **wanted, resources=resources or {})  # type: ignore[arg-type]
    if len(groups) > 1 and _fits(whole.bundles, nodes):
        return whole
    why = "there is one replica" if len(groups) == 1 else f"no node has room for a replica of {whole.bundles[0]}"
    if len(groups) > 1 and any(_has(node.amounts, whole.bundles[0]) for node in nodes):
        why = f"the nodes have room for fewer than {len(groups)} whole replicas of {whole.bundles[0]}"
    alone = ranks_alone(groups, **wanted, resources=resources, reason=f"{why}, so ranks are placed one by one")  # type: ignore[arg-type]
    if not _fits(alone.bundles, nodes):
        raise NoRoom(_lack(alone.bundles, nodes))
    return alone


def _lack(bundles: Sequence[Amounts], nodes: Sequence[NodeResources]) -> str:
    names = list(dict.fromkeys(name for bundle in bundles for name in bundle))
    needed = {name: round(sum(bundle.get(name, 0.0) for bundle in bundles), 4) for name in names}
    has = "; ".join(f"{node.name}: { {name: node.amounts.get(name, 0.0) for name in names} }" for node in nodes)
    return (
        f"{len(bundles)} ranks of {bundles[0]}, {needed} in all, do not fit the cluster's nodes ({has or 'none'}); "
        "lower cluster.replicas, stages, parts, threads, host memory or cluster.gpus_per_replica, change "
        "cluster.replica_resources, or add nodes"
    )
