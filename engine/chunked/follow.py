"""Follow one rank's list: refuse the first action that lacks something, or that would make another result.

What a rank has: chunks loaded, received, computed and sent, and how many optimizer steps it has made. Whether others
send what it receives is for `validate` to compare.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.schedule import Action, EpochPlan, Kind

MESSAGE_BOUND = 1  # epochs: every chunk writes its gradient messages in every epoch


class ScheduleError(ValueError):
    """A plan that must not run. The message names rank, position in its list, action and reason."""


def refuse(plan: EpochPlan, rank: int, position: int, reason: str) -> NoReturn:
    """Raise ScheduleError for an action, or for the end of a list."""
    actions = plan.actions[rank]
    action = str(actions[position]) if position < len(actions) else "end of the list"
    raise ScheduleError(f"epoch {plan.epoch}, rank {rank}, action {position} of {len(actions)}, {action}: {reason}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stale:
    """Chunks whose history or gradient messages are of the wrong epoch, with their age; most plans have none."""

    history: dict[int, int]
    messages: dict[int, int]
    period: int


class _Rank(ABC):
    """One rank's list, followed action by action; every method refuses an action or records it."""

    def __init__(self, plan: EpochPlan, layout: Layout, rank: int) -> None:
        self.plan, self.rank, self.position = plan, rank, 0
        self.before, self.after = layout.prev_rank(rank), layout.next_rank(rank)
        self.kinds: dict[Kind, Callable[[Action], None]] = {}

    def check(self) -> None:
        """Follow the list to its end; ScheduleError at the first action that must not be there."""
        chunks = set(self.plan.order)
        for position, action in enumerate(self.plan.actions[self.rank]):
            self.position = position
            self.require(action.kind in self.kinds, "has no place in this kind of plan")
            self.require(action.kind is Kind.STEP or action.chunk in chunks, "no such chunk in the order")
            self.kinds[action.kind](action)
        self.position = len(self.plan.actions[self.rank])
        self.end()

    @abstractmethod
    def end(self) -> None:
        """Refuse a list that stops too early."""

    def require(self, condition: bool, reason: str) -> None:
        if not condition:
            refuse(self.plan, self.rank, self.position, reason)


class TrainingRank(_Rank):
    """What a rank has done so far in an epoch of training."""

    def __init__(self, plan: EpochPlan, layout: Layout, rank: int, stale: Stale) -> None:
        super().__init__(plan, layout, rank)
        self.stale = stale
        self.group_of = {chunk: group for group, chunks in enumerate(plan.groups) for chunk in chunks}
        self.reverse = [chunk for group in plan.groups for chunk in reversed(group)]
        self.loaded: set[tuple[str, int]] = set()
        self.received: set[tuple[str, int]] = set()
        self.sent: set[tuple[str, int]] = set()
        self.forward: dict[int, int] = {}  # chunk -> how many went before
        self.backward: dict[int, int] = {}
        self.weighed: dict[int, int] = {}
        self.steps = 0
        self.kinds = {
            Kind.LOAD: self._load,
            Kind.RECV: self._recv,
            Kind.FORWARD: self._forward,
            Kind.SEND: self._send,
            Kind.BACKWARD: self._backward,
            Kind.WEIGHT: self._weight,
            Kind.STEP: self._step,
        }

    def _require_open(self, action: Action) -> None:
        self.require(self.group_of[action.chunk] >= self.steps, "uses a chunk whose group has had its STEP")

    def _load(self, action: Action) -> None:
        self._require_open(action)
        self.require(self.before is None, "only the first stage loads features")
        needed = action.phase == "forward" or (action.phase == "backward" and self.plan.recompute)
        self.require(needed, "nothing needs this load")
        self.require((action.phase, action.chunk) not in self.loaded, "loads the chunk twice")
        self.loaded.add((action.phase, action.chunk))

    def _recv(self, action: Action) -> None:
        self._require_open(action)
        source = {"forward": self.before, "backward": self.after}.get(action.phase)
        self.require(source is not None and action.peer == source, f"must receive from rank {source}")
        self.require((action.phase, action.chunk) not in self.received, "receives the chunk twice")
        self.received.add((action.phase, action.chunk))

    def _send(self, action: Action) -> None:
        self._require_open(action)
        target = {"forward": self.after, "backward": self.before}.get(action.phase)
        done = self.forward if action.phase == "forward" else self.backward
        self.require(target is not None and action.peer == target, f"must send to rank {target}")
        self.require(action.chunk in done, f"sends a chunk that has not gone {action.phase}")
        self.require((action.phase, action.chunk) not in self.sent, "sends the chunk twice")
        self.sent.add((action.phase, action.chunk))

    def _forward(self, action: Action) -> None:
        chunk, nth = action.chunk, len(self.forward)
        self.require(chunk not in self.forward, "goes forward twice")
        self.require(self.plan.order[nth] == chunk, f"chunk {self.plan.order[nth]} comes next in the order")
        have = self.loaded if self.before is None else self.received
        self.require(("forward", chunk) in have, "goes forward without its rows; LOAD or RECV must come before")
        self.require(self.group_of[chunk] == self.steps, "goes forward with the weights of another group")
        self.forward[chunk] = nth
        for other, age in self.stale.history.items():
            limit = f"outside 1..{self.stale.period}"
            self.require(other in self.forward, f"reads history of chunk {other} that is {age} epochs old, {limit}")

    def _backward(self, action: Action) -> None:
        chunk, nth = action.chunk, len(self.backward)
        self.require(chunk in self.forward, "goes backward before it has gone forward")
        self.require(chunk not in self.backward, "goes backward twice")
        self.require(self.group_of[chunk] == self.steps, "goes backward with weights of another group than forward")
        if self.plan.gradient_mode != "drop":
            self.require(self.reverse[nth] == chunk, f"not in reverse order: chunk {self.reverse[nth]} comes next")
        if self.before is None and self.plan.recompute:
            self.require(("backward", chunk) in self.loaded, "recomputes without features; LOAD must come before")
        if self.after is not None:
            self.require(("backward", chunk) in self.received, "goes backward without gradients; RECV must come before")
        self.backward[chunk] = nth
        for other, age in self.stale.messages.items():
            limit = f"outside 1..{MESSAGE_BOUND}"
            self.require(other in self.backward, f"reads gradients of chunk {other} that are {age} epochs old, {limit}")

    def _weight(self, action: Action) -> None:
        nth = len(self.weighed)
        self.require(action.chunk in self.backward, "needs its BACKWARD first")
        self.require(self.backward[action.chunk] == nth, "weight gradients must be summed in backward order, once each")
        self.weighed[action.chunk] = nth

    def _step(self, action: Action) -> None:
        self.require(self.steps < len(self.plan.groups), f"the plan has {len(self.plan.groups)} groups")
        self.require(action.group == self.steps, f"group {self.steps} steps next")
        chunks = self.plan.groups[self.steps]
        for name, done in (("FORWARD", self.forward), ("BACKWARD", self.backward), ("WEIGHT", self.weighed)):
            missing = [chunk for chunk in chunks if chunk not in done]
            self.require(not missing, f"without {name} of chunks {missing}")
        for phase, target in (("forward", self.after), ("backward", self.before)):
            missing = [chunk for chunk in chunks if target is not None and (phase, chunk) not in self.sent]
            self.require(not missing, f"without {phase} SEND of chunks {missing} to rank {target}")
        self.steps += 1

    def end(self) -> None:
        self.require(self.steps == len(self.plan.groups), f"ends before the STEP of group {self.steps}")


class ExactRank(_Rank):
    """What a rank has done so far in an exact pass."""

    def __init__(self, plan: EpochPlan, layout: Layout, rank: int, layers: range) -> None:
        super().__init__(plan, layout, rank)
        self.layers, self.chunks = layers, set(plan.order)
        self.held: set[int] = set()
        self.sent: set[int] = set()
        # layer -> chunks that have it; what ENTER takes in counts as the layer before the stage's first
        self.done: dict[int, set[int]] = {layer: set() for layer in range(layers.start - 1, layers.stop)}
        self.kinds = {
            Kind.LOAD: self._take,
            Kind.RECV: self._take,
            Kind.ENTER: self._enter,
            Kind.REFRESH: self._refresh,
            Kind.SEND: self._send,
        }

    def _take(self, action: Action) -> None:
        wanted, peer = (Kind.LOAD, -1) if self.before is None else (Kind.RECV, self.before)
        self.require((action.kind, action.peer) == (wanted, peer), f"rows come by {wanted.value} from rank {peer}")
        self.require(action.phase == "exact", "is not of the exact phase")
        self.require(action.chunk not in self.held, "takes the chunk twice")
        self.held.add(action.chunk)

    def _enter(self, action: Action) -> None:
        done = self.done[self.layers.start - 1]
        self.require(action.chunk in self.held, "enters without its rows; LOAD or RECV must come before")
        self.require(action.chunk not in done, "enters twice")
        done.add(action.chunk)

    def _refresh(self, action: Action) -> None:
        layer = action.layer
        self.require(layer in self.layers, f"the stage has layers {self.layers}")
        self.require(action.chunk not in self.done[layer], "computes the layer twice")
        self.require(self.done[layer - 1] == self.chunks, "reads a layer before all chunks have it")
        self.done[layer].add(action.chunk)

    def _send(self, action: Action) -> None:
        self.require(self.after is not None and action.peer == self.after, f"must send to rank {self.after}")
        self.require(action.phase == "exact", "is not of the exact phase")
        self.require(action.chunk not in self.sent, "sends the chunk twice")
        self.require(action.chunk in self.done[self.layers.stop - 1], "sends a chunk that lacks a layer")
        self.sent.add(action.chunk)

    def end(self) -> None:
        complete = all(chunks == self.chunks for chunks in self.done.values())
        self.require(complete, "ends before all chunks have all layers")
        self.require(self.after is None or self.sent == self.chunks, "ends before all chunks are sent")
