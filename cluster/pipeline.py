"""Ranks of full-graph training as Ray actors: one per part and stage, in one placement group, one call per epoch.

Ray restarts nobody (`max_restarts=0`): a new actor could not join the process group of the others. The first error ends
all of them, and the caller opens new ones from the last checkpoint, in a placement group of their own: the nodes of the
old one may be gone.
"""

import logging
import os
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from penstock.cluster.actor import HEARTBEATS, RankActor
from penstock.cluster.head import HeadLost, ask, require_head
from penstock.cluster.nodes import ask_nodes, end_actors, is_lost, node_names
from penstock.cluster.placement import (
    Amounts,
    NodeResources,
    NoRoom,
    Placement,
    Strategy,
    plan_placement,
    ranks_alone,
)
from penstock.cluster.reservation import give_back, reserve
from penstock.cluster.session import open_session
from penstock.cluster.shared import require_seen
from penstock.engine.chunked.backend import (
    POLL_S,
    Board,
    NodeLost,
    Poll,
    RankFailed,
    WorkerSpec,
    open_board,
)
from penstock.engine.chunked.failures import died
from penstock.engine.chunked.torch_transport import GroupBackend
from penstock.engine.chunked.worker import OPEN_RANK
from penstock.engine.supervision import stacks
from penstock.engine.supervision.watch import START_S, Watch

logger = logging.getLogger(__name__)

_HEARTBEAT_S = 0.5
_GRACE_S = 20.0  # for actors that were told to end
PROCESS_BYTES = 768 << 20  # of a process beside its budget: interpreter, torch, what is mapped of the topology
_STACKS_S = 15.0  # for stacks from other nodes: a process has to start there first
T = TypeVar("T")


class RayBackend:
    """See backend.Backend; made by `open_ray`. Single use: it takes no call after an error."""

    def __init__(self, specs: Sequence[WorkerSpec], board: Board, actors: Sequence[Any]) -> None:
        self._specs, self._board, self._actors = specs, board, actors
        self._usable = True
        self._places: list[tuple[str, int]] = []
        self._far: list[int] = []
        self._hosts: dict[str, str] = {}
        self._beats: dict[Any, int] = {}  # heartbeats asked for, with their rank
        self._beat_at = 0.0
        self._heard: dict[int, tuple[int, int]] = {}

    @property
    def pids(self) -> list[int]:
        """Process ids by rank, each on its own node."""
        return [pid for _, pid in self._places]

    @property
    def nodes(self) -> list[str]:
        """Ray's node ids by rank."""
        return [node for node, _ in self._places]

    def start(self, backend: GroupBackend, open_rank: str, shared: tuple[Path, Path] | None, poll: Poll) -> None:
        """Wait until all ranks are open."""
        self._places = self._gather("start", [actor.whereabouts.remote() for actor in self._actors], poll=poll)
        if shared is not None:
            require_seen(*shared, set(self.nodes))
        self._hosts = node_names()
        here = ray.get_runtime_context().get_node_id()
        self._far = [rank for rank, node in enumerate(self.nodes) if node != here]
        address = self._gather("start", [self._actors[0].host_store.remote()], poll=poll)[0]
        boards = [None if rank in self._far else self._board.path for rank in range(len(self._actors))]
        self._gather(
            "start",
            [
                actor.start.remote(address, board, backend, open_rank)
                for actor, board in zip(self._actors, boards, strict=True)
            ],
            poll=poll,
        )

    def call(
        self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None, poll: Poll | None = None
    ) -> list[Any]:
        """See Backend."""
        given = list(arguments) if arguments is not None else [()] * len(self._actors)
        if not self._usable:
            raise RuntimeError(f"{method}: ranks that failed take no more calls; leave them and open new ones")
        self._board.reset()
        self._heard.clear()
        refs = [actor.call.remote(method, found) for actor, found in zip(self._actors, given, strict=True)]
        return self._gather(method, refs, given, poll)

    def _gather(
        self,
        method: str,
        refs: Sequence[Any],
        arguments: Sequence[tuple[Any, ...]] | None = None,
        poll: Poll | None = None,
    ) -> list[Any]:
        """Wait for the answers of ranks 0, 1, ... as they come: the first error ends the wait."""
        self._usable = False  # until all has gone well
        timeout_s = self._specs[0].timeout_s
        given = arguments or [()] * len(self._specs)
        pending = {ref: rank for rank, ref in enumerate(refs)}
        watch = Watch(
            self._specs[: len(refs)],
            self._board,
            method,
            given[: len(refs)],
            collect=self._stacks,
            where=self._where,
            timeout_s=max(START_S, timeout_s) if method == "start" else timeout_s,
            far=self._far,
        )
        while not watch.is_over:
            require_head()
            ready = ray.wait(list(pending), num_returns=1, timeout=POLL_S)[0] if pending else ()
            for ref in ready:
                rank = pending.pop(ref)
                self._take(watch, rank, ref, method, given[rank])
            if not watch.has_failed:
                self._hear_far_ranks()
                if poll is not None:
                    poll()
            if not ready:
                watch.tick()
            if not pending:  # only peers were lost, and what became of them is still to be told
                time.sleep(POLL_S)
        values = watch.values()
        self._usable = True
        return values

    def _take(self, watch: Watch, rank: int, ref: Any, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            well, value = ray.get(ref, timeout=self._specs[rank].timeout_s)
            (watch.add if well else watch.fail)(rank, pickle.loads(value))
        except RayError as error:  # of the actor, not of what it ran: that comes as a value
            has_no_node = bool(self._places) and is_lost(self.nodes[rank])
            failed = died(
                self._specs[rank],
                "was lost with its node" if has_no_node else "was lost",
                self._where(rank),
                method,
                arguments,
                self._board,
                is_current=rank not in self._far,
            )
            kind = NodeLost if has_no_node else RankFailed
            watch.fail(rank, kind(f"{failed}. Ray says: {' '.join(str(error).split())}"))

    def _where(self, rank: int) -> str:
        if not self._places:
            return "not placed yet"
        node = self.nodes[rank]
        return f"process {self.pids[rank]} on node {node}, host {self._hosts.get(node, 'unknown')}"

    def _stacks(self, ranks: Sequence[int]) -> dict[int, str]:
        """The stacks of ranks, each collected on its own node."""
        if not self._places:
            return dict.fromkeys(ranks, "its actor has not started; look at `ray status` and the actor's log")
        files = {rank: stacks.stacks_file(self._specs[rank].scratch, rank) for rank in ranks}
        pids = {rank: self.pids[rank] for rank in ranks}
        found: dict[int, str] = dict.fromkeys(ranks, f"its node did not answer within {_STACKS_S:.0f} s")
        near = [rank for rank in ranks if rank not in self._far]
        found |= stacks.collect({rank: pids[rank] for rank in near}, {rank: files[rank] for rank in near})
        there = {
            node: [rank for rank in ranks if self.nodes[rank] == node]
            for node in {self.nodes[rank] for rank in ranks if rank in self._far}
        }
        arguments = {
            node: ({rank: pids[rank] for rank in own}, {rank: files[rank] for rank in own})
            for node, own in there.items()
        }
        for answer in ask_nodes(stacks.collect, arguments, _STACKS_S).values():
            found |= answer
        return found

    def _hear_far_ranks(self) -> None:
        """Write on the board how far ranks on other nodes are; those of this node do it themselves."""
        for ref in ray.wait(list(self._beats), num_returns=len(self._beats), timeout=0)[0] if self._beats else ():
            rank = self._beats.pop(ref)
            with suppress(RayError):  # a death is told by the call that it ends
                progress = ray.get(ref)
                if self._heard.get(rank, (0, 0)) != progress:  # else it has not moved since
                    self._heard[rank] = progress
                    self._board.heartbeat(rank)(*progress)
        if self._far and time.monotonic() - self._beat_at > _HEARTBEAT_S:
            self._beat_at = time.monotonic()
            asked = set(self._beats.values())
            self._beats |= {self._actors[rank].progress.remote(): rank for rank in self._far if rank not in asked}

    def close(self) -> None:
        """End the actors: in good order, or at once if something went wrong. The next ones use the same scratch
        folder."""
        try:
            self._close()
        except HeadLost:  # whoever uses Ray next is told
            for actor in self._actors:
                actor.__ray_terminate__.remote()  # goes from process to process

    def _close(self) -> None:
        require_head()
        if self._usable:
            refs = [actor.stop.remote() for actor in self._actors]
            ready, late = ray.wait(refs, num_returns=len(refs), timeout=_GRACE_S)
            if late:
                logger.warning("%d ranks did not end within %.0f s; they are killed", len(late), _GRACE_S)
        ask(lambda: [ray.kill(actor, no_restart=True) for actor in self._actors])
        left = end_actors([pid for rank, pid in enumerate(self.pids) if rank not in self._far], _GRACE_S)
        if not self._usable:
            far = {self.nodes[rank] for rank in self._far}
            arguments = {
                node: ([self.pids[rank] for rank in self._far if self.nodes[rank] == node], _GRACE_S / 2)
                for node in far
                if not is_lost(node)
            }
            left += [pid for answer in ask_nodes(end_actors, arguments, _GRACE_S).values() for pid in answer]
        if left:
            logger.error("processes %s of ranks do not end", left)


def _absolute(value: T) -> T:
    """The same dataclass with absolute paths, since actors work in another folder."""
    changes: dict[str, Any] = {}
    for field in fields(value):  # type: ignore[arg-type]
        found = getattr(value, field.name)
        if isinstance(found, Path):
            changes[field.name] = found.absolute()
        elif is_dataclass(found):
            changes[field.name] = _absolute(found)
    return replace(value, **changes)  # type: ignore[type-var]


def _gpus_per_rank(specs: Sequence[WorkerSpec], ranks_per_replica: int, gpus_per_replica: float | None) -> float:
    """A GPU for each rank, or its share of what a replica is to have. What is free now decides nothing: an autoscaler
    starts nodes for what was asked for."""
    if not specs[0].device.startswith("cuda"):
        return 0.0
    share = 1.0 if gpus_per_replica is None else gpus_per_replica / ranks_per_replica
    if share > 1.0:
        raise ValueError(
            f"cluster.gpus_per_replica={gpus_per_replica:g} is more than one for each of the {ranks_per_replica} ranks "
            f"of a replica, which use one; set {ranks_per_replica} or less"
        )
    return share


def _place(
    specs: Sequence[WorkerSpec],
    gpus: float,
    memory: int,
    groups: Sequence[Sequence[int]],
    resources: Amounts | None,
    strategy: Strategy | None,
) -> Placement:
    """Place replicas on the nodes there are; where they have no room, an autoscaler may bring others."""
    wanted: dict[str, Any] = {
        "cpus_per_rank": float(max(spec.threads for spec in specs)),
        "gpus_per_rank": gpus,
        "memory_per_rank": memory,
        "resources": resources,
    }
    if strategy is not None:
        return ranks_alone(groups, **wanted, strategy=strategy, reason="as the caller wants it")
    nodes = [
        NodeResources(name=node["NodeManagerHostname"], amounts=node["Resources"])
        for node in ask(ray.nodes)
        if node["Alive"]
    ]
    try:
        return plan_placement(groups, **wanted, nodes=nodes)
    except NoRoom as error:
        return ranks_alone(groups, **wanted, reason=str(error))


@contextmanager
def open_ray(
    specs: Sequence[WorkerSpec],
    *,
    address: str | None = None,
    strategy: Strategy | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    resources: Amounts | None = None,
    gpus_per_replica: float | None = None,
    memory_bytes: int = 0,
    wait_s: float = 600.0,
    shared: tuple[Path, Path] | None = None,
    open_rank: str = OPEN_RANK,
    poll: Poll = lambda: None,
) -> Iterator[RayBackend]:
    """Start one actor per rank; they have ended when the context is left, and so has Ray if it was started here.

    Ranks on other nodes find the run's files under the same paths. `groups` are ranks that belong together, the
    layout's replicas unless told, and `resources` what each group needs besides; see `placement`. `memory_bytes` is
    the budget of all of them together: Ray is asked for each one's share, and for what a process holds besides. With a
    `strategy` ranks are placed one by one. `open_rank` is as in `open_processes`. NoRoomYet where the cluster has no
    room within `wait_s`: an autoscaler may bring some. ValueError where nodes lack the `shared` graph or folder. `poll`
    is called now and then until all ranks have started; what it raises ends the wait.
    """
    specs = [_absolute(spec) for spec in specs]
    with ExitStack() as stack:
        num_cpus = max(os.cpu_count() or 1, sum(spec.threads for spec in specs))
        stack.enter_context(open_session(address, specs[0].scratch, num_cpus=num_cpus))
        layout = specs[0].layout
        groups = groups or [layout.ranks_of(replica) for replica in range(layout.replicas)]
        gpus = _gpus_per_rank(specs, len(groups[0]), gpus_per_replica)
        memory = memory_bytes // len(specs) + PROCESS_BYTES
        placement = _place(specs, gpus, memory, groups, resources, strategy)
        group = reserve(placement, len(specs), wait_s, poll)
        stack.callback(give_back, group)
        decorate: Any = ray.remote(concurrency_groups={HEARTBEATS: 1})  # type: ignore[call-overload]  # Ray's types lack it
        actor_class = decorate(RankActor)
        path = [path for path in map(os.path.abspath, sys.path) if os.path.exists(path)]
        if gpus:  # each actor sees the GPU that Ray gives it, and no other
            specs = [replace(spec, device="cuda:0") for spec in specs]  # type: ignore[type-var]
        options = [
            {
                "num_cpus": spec.threads,
                "num_gpus": gpus,
                "memory": memory,
                "max_restarts": 0,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=placement.bundle_of_rank[spec.rank]
                ),
            }
            for spec in specs
        ]
        actors = ask(
            lambda: [actor_class.options(**own).remote(spec, path) for spec, own in zip(specs, options, strict=True)]
        )
        ranks = RayBackend(specs, open_board(specs), actors)
        stack.callback(ranks.close)
        ranks.start("nccl" if gpus == 1 else "gloo", open_rank, shared, poll)
        yield ranks
