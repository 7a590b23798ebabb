"""What every rank does in an epoch, as a list of actions: all chunks forward, then all backward in the reverse order.

GNNPipe's schedule (arXiv 2308.10087 and its code), without its barrier per slot: a rank goes on as soon as what it
receives is there. Ours is that an epoch may have several groups with an optimizer step each (GAS, mode `drop`), and
that weight gradients of later stages are put off into the time in which they would wait at the end.

Lists are data: `validate` proves one sound, `simulate` predicts it, every backend runs the same one. Every replica has
a plan of its own, since its chunks come in an order of their own; replicas meet at their STEPs only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import Literal

import numpy as np

from penstock.engine.chunked.config import GradientMode
from penstock.engine.chunked.layout import Layout
from penstock.kernels.seeds import hash_ids

Phase = Literal["forward", "backward", "exact"]
_REPLICAS = 1 << 62  # where hashes for orders have the epoch: no epoch is as late


class Kind(str, Enum):
    """LOAD a chunk's features (first stage), RECV and SEND its rows or gradients, compute it, STEP the optimizer.

    WEIGHT adds the weight gradients that BACKWARD left. ENTER and REFRESH are of exact passes: take a chunk's rows in,
    and compute one layer of it from exact rows.
    """

    LOAD = "load"
    RECV = "recv"
    FORWARD = "forward"
    SEND = "send"
    BACKWARD = "backward"
    WEIGHT = "weight"
    STEP = "step"
    ENTER = "enter"
    REFRESH = "refresh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing that a rank does. `chunk`, `peer` (a rank), `layer` and `group` are -1 where they say nothing."""

    kind: Kind
    chunk: int = -1
    peer: int = -1
    phase: Phase = "forward"
    layer: int = -1
    group: int = -1

    def __str__(self) -> str:
        """Read like `send(chunk=3, peer=1, phase=backward)`."""
        named = {name: getattr(self, name) for name in ("chunk", "layer", "group", "peer") if getattr(self, name) >= 0}
        phase = {"phase": self.phase} if self.kind in (Kind.LOAD, Kind.RECV, Kind.SEND) else {}
        return f"{self.kind.value}({', '.join(f'{name}={value}' for name, value in (named | phase).items())})"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPlan:
    """An epoch's actions per rank. `groups` cut `order` into runs of chunks with one optimizer step each.

    `exact` marks an exact pass: no gradients, no groups, chunks in ascending order. Lists are those of all ranks; the
    ranks of any other replica than `replica` have empty ones.
    """

    epoch: int
    order: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    gradient_mode: GradientMode
    recompute: bool
    actions: tuple[tuple[Action, ...], ...]
    exact: bool = False
    replica: int = 0

    def only_for(self, rank: int) -> "EpochPlan":
        """The same without the lists of other ranks, which a rank has no use for: they are most of what is sent."""
        return replace(self, actions=tuple(own if n == rank else () for n, own in enumerate(self.actions)))


def replica_seed(seed: int, replica: int) -> int:
    """The seed of a replica's orders and dropout masks; replica 0 has the run's own and draws what one alone does."""
    if replica == 0:
        return seed
    hashes = np.empty(1, np.uint64)
    with np.errstate(over="ignore"):
        hash_ids(np.array([replica]), seed, _REPLICAS, 0, 1, hashes)
    return int(hashes[0]) >> 1  # as an int64, which seeds are


def chunk_order(
    seed: int, epoch: int, num_chunks: int, cycle: int | None = None, *, shuffle: bool = True, replica: int = 0
) -> tuple[int, ...]:
    """Permute chunks 0 .. num_chunks - 1 for an epoch, by counter: it depends on nothing but the arguments.

    With `cycle`, epoch e has the order of epoch e % cycle, so that features are planned and packed for `cycle` epochs.
    """
    seed = replica_seed(seed, replica)
    if not shuffle:
        return tuple(range(num_chunks))
    hashes = np.empty(num_chunks, np.uint64)
    with np.errstate(over="ignore"):  # the hash wraps; NumPy scalars would warn where Numba is off
        hash_ids(np.arange(num_chunks), seed, epoch % cycle if cycle else epoch, 0, num_chunks, hashes)
    return tuple(int(chunk) for chunk in np.argsort(hashes, kind="stable"))


def cut_groups(order: Sequence[int], updates: int) -> tuple[tuple[int, ...], ...]:
    """Cut an order into `updates` groups whose sizes differ by one at most; ValueError where one would be empty."""
    if not 1 <= updates <= len(order):
        raise ValueError(f"updates={updates} needs as many chunks, but there are {len(order)}; lower it to that")
    bounds = [len(order) * n // updates for n in range(updates + 1)]
    return tuple(tuple(order[start:stop]) for start, stop in pairwise(bounds))


def _forward(layout: Layout, rank: int, chunk: int) -> Iterator[Action]:
    before, after = layout.prev_rank(rank), layout.next_rank(rank)
    if before is None:
        yield Action(kind=Kind.LOAD, chunk=chunk)
    else:
        yield Action(kind=Kind.RECV, chunk=chunk, peer=before)
    yield Action(kind=Kind.FORWARD, chunk=chunk)
    if after is not None:
        yield Action(kind=Kind.SEND, chunk=chunk, peer=after)


def _backward(layout: Layout, rank: int, chunk: int, recompute: bool) -> Iterator[Action]:
    before, after = layout.prev_rank(rank), layout.next_rank(rank)
    if before is None and recompute:
        yield Action(kind=Kind.LOAD, chunk=chunk, phase="backward")
    if after is not None:
        yield Action(kind=Kind.RECV, chunk=chunk, peer=after, phase="backward")
    yield Action(kind=Kind.BACKWARD, chunk=chunk, phase="backward")
    if before is not None:
        yield Action(kind=Kind.SEND, chunk=chunk, peer=before, phase="backward")


def _group_actions(
    layout: Layout, rank: int, chunks: Sequence[int], group: int, recompute: bool, delay: int
) -> Iterator[Action]:
    for chunk in chunks:
        yield from _forward(layout, rank, chunk)
    backward = tuple(reversed(chunks))
    for done, chunk in enumerate(backward):
        yield from _backward(layout, rank, chunk, recompute)
        if done >= delay:
            yield Action(kind=Kind.WEIGHT, chunk=backward[done - delay], phase="backward")
    for chunk in backward[max(0, len(backward) - delay) :]:
        yield Action(kind=Kind.WEIGHT, chunk=chunk, phase="backward")
    yield Action(kind=Kind.STEP, group=group, phase="backward")


def weight_delay(stage: int, defer_weights: bool) -> int:
    """Chunks by which a stage's weight gradients trail its backward.

    Stage s has nothing to do for s slots at the end, and a weight gradient takes about half a slot: 2 s fit there.
    """
    return 2 * stage if defer_weights else 0


def plan_epoch(
    layout: Layout,
    *,
    epoch: int,
    order: Sequence[int],
    updates: int = 1,
    gradient_mode: GradientMode = "stale",
    recompute: bool = True,
    defer_weights: bool = True,
    replica: int = 0,
) -> EpochPlan:
    """List the actions of an epoch of training, of one replica.

    With `recompute`, the first stage loads a chunk's features again before it goes backward. WEIGHT stands right after
    its chunk's BACKWARD and SEND where weights are not deferred. ValueError where several updates meet a mode with
    gradients between chunks.
    """
    if updates > 1 and gradient_mode != "drop":
        raise ValueError(f"updates={updates} needs gradient_mode drop, not {gradient_mode}; use one update")
    groups = cut_groups(order, updates)
    actions = tuple(
        tuple(
            action
            for group, chunks in enumerate(groups if rank in layout.ranks_of(replica) else ())
            for action in _group_actions(
                layout, rank, chunks, group, recompute, weight_delay(layout.stage_of(rank), defer_weights)
            )
        )
        for rank in range(layout.num_ranks)
    )
    return EpochPlan(
        epoch=epoch,
        order=tuple(order),
        groups=groups,
        gradient_mode=gradient_mode,
        recompute=recompute,
        actions=actions,
        replica=replica,
    )


def _exact_actions(layout: Layout, rank: int, layers: range, num_chunks: int) -> Iterator[Action]:
    before, after = layout.prev_rank(rank), layout.next_rank(rank)
    for chunk in range(num_chunks):
        if before is None:
            yield Action(kind=Kind.LOAD, chunk=chunk, phase="exact")
        else:
            yield Action(kind=Kind.RECV, chunk=chunk, peer=before, phase="exact")
        yield Action(kind=Kind.ENTER, chunk=chunk, phase="exact")
        if after is not None and not layers:
            yield Action(kind=Kind.SEND, chunk=chunk, peer=after, phase="exact")
    for layer in layers:
        for chunk in range(num_chunks):
            yield Action(kind=Kind.REFRESH, chunk=chunk, layer=layer, phase="exact")
            if after is not None and layer == layers[-1]:
                yield Action(kind=Kind.SEND, chunk=chunk, peer=after, phase="exact")


def plan_exact(
    layout: Layout, stage_layers: Sequence[range], num_chunks: int, epoch: int, replica: int = 0
) -> EpochPlan:
    """List the actions of an exact layer-by-layer pass; `stage_layers` are the hidden layers of each stage.

    A stage may have none (the first, where `enter` is dear): it sends what ENTER computed.
    """
    if len(stage_layers) != layout.stages:
        raise ValueError(f"stage_layers has {len(stage_layers)} ranges for {layout.stages} stages; give one each")
    order = tuple(range(num_chunks))
    actions = tuple(
        tuple(_exact_actions(layout, rank, stage_layers[layout.stage_of(rank)], num_chunks))
        if rank in layout.ranks_of(replica)
        else ()
        for rank in range(layout.num_ranks)
    )
    return EpochPlan(
        epoch=epoch,
        order=order,
        groups=(),
        gradient_mode="drop",
        recompute=False,
        actions=actions,
        exact=True,
        replica=replica,
    )


def join_plans(plans: Sequence[EpochPlan]) -> EpochPlan:
    """The first of one plan per replica, with the lists of all: for what looks at nothing but lists."""
    return replace(
        plans[0], actions=tuple(max(lists, key=len) for lists in zip(*(p.actions for p in plans), strict=True))
    )


def load_sequence(plan: EpochPlan) -> tuple[int, ...]:
    """The chunks that a rank of the first stage loads in this epoch, in order: the feature trace's items.

    Every part has the same (a replica's first rank is always of the first stage).
    """
    first = next(actions for actions in plan.actions if actions)
    return tuple(action.chunk for action in first if action.kind is Kind.LOAD)
