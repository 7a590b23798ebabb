"""Predict what a plan takes: when each rank does what, how long it waits, what it sends, how much memory it needs.

Sends are asynchronous; tensors on one wire follow each other. What is not modelled: ranks that share cores, and reads
that are slower than the profile's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.play import Span, play
from penstock.engine.chunked.schedule import Action, EpochPlan, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What actions take; arrays are [ranks, K], in seconds or bytes per chunk.

    `load_s` is what reading ahead does not hide; `backward_s` leaves out `weight_s` and, where activations are
    recomputed, `recompute_s`.
    `exchange_s` and `exchange_bytes` are among parts, once in FORWARD and once in BACKWARD. `wire_bytes` is what a SEND
    carries, `step_bytes` what a rank sends to sum weight gradients over parts. `activation_bytes` is what the tape of
    a chunk keeps, `gradient_bytes` what a backward pass holds beside it, `input_bytes` the stage's input rows (kept to
    recompute from), `deferred_bytes` what a weight gradient that is put off holds. `constant_bytes` [ranks] is there
    all the time: histories, topology, weights.
    """

    load_s: NDArray[np.float64]
    forward_s: NDArray[np.float64]
    backward_s: NDArray[np.float64]
    weight_s: NDArray[np.float64]
    recompute_s: NDArray[np.float64]
    exchange_s: NDArray[np.float64]
    step_s: float
    latency_s: float
    bytes_per_s: float
    wire_bytes: NDArray[np.int64]
    exchange_bytes: NDArray[np.int64]
    step_bytes: int
    activation_bytes: NDArray[np.int64]
    gradient_bytes: NDArray[np.int64]
    input_bytes: NDArray[np.int64]
    deferred_bytes: NDArray[np.int64]
    constant_bytes: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What `simulate` found. `spans[rank]` has (start, end) of every action; RECV includes waiting.

    `busy_s` counts computing and loading, `bubble` is the fraction of all ranks' time that is neither. Bytes are sums
    over ranks: between stages, between parts, and to sum weight gradients. `peak_bytes` is per rank.
    """

    spans: tuple[tuple[Span, ...], ...]
    makespan_s: float
    busy_s: tuple[float, ...]
    bubble: float
    sent_bytes: int
    exchanged_bytes: int
    reduced_bytes: int
    peak_bytes: tuple[int, ...]


def uniform_costs(
    layout: Layout, num_chunks: int, *, forward_s: float = 1.0, backward_s: float = 1.0, weight_s: float = 0.0
) -> Costs:
    """The same for every chunk and rank; wires are free and memory is not counted."""
    shape = layout.num_ranks, num_chunks
    none, zeros = np.zeros(shape), np.zeros(shape, np.int64)
    return Costs(
        load_s=none,
        forward_s=np.full(shape, forward_s),
        backward_s=np.full(shape, backward_s),
        weight_s=np.full(shape, weight_s),
        recompute_s=np.full(shape, forward_s),
        exchange_s=none,
        step_s=0.0,
        latency_s=0.0,
        bytes_per_s=float("inf"),
        wire_bytes=zeros,
        exchange_bytes=zeros,
        step_bytes=0,
        activation_bytes=zeros,
        gradient_bytes=zeros,
        input_bytes=zeros,
        deferred_bytes=zeros,
        constant_bytes=np.zeros(layout.num_ranks, np.int64),
    )


def _num_layers(plan: EpochPlan) -> list[int]:
    """Layers that each rank computes one by one; 0 in training, where FORWARD does all."""
    refreshed = ((action.layer for action in actions if action.kind is Kind.REFRESH) for actions in plan.actions)
    return [len(set(layers)) for layers in refreshed]


def _share(action: Action, num_layers: int) -> float:
    """The part of a chunk's forward that an action of an exact pass does: ENTER all of it where no layer follows."""
    if action.kind is Kind.ENTER:
        return 0.0 if num_layers else 1.0
    return 1.0 / num_layers


def _compute_s(plan: EpochPlan, costs: Costs, rank: int, action: Action, num_layers: int) -> float:
    at = rank, action.chunk
    match action.kind:
        case Kind.LOAD:
            return float(costs.load_s[at])
        case Kind.FORWARD:
            return float(costs.forward_s[at])
        case Kind.BACKWARD:
            return float(costs.backward_s[at] + plan.recompute * costs.recompute_s[at])
        case Kind.WEIGHT:
            return float(costs.weight_s[at])
        case Kind.STEP:
            return costs.step_s
        case Kind.ENTER | Kind.REFRESH:
            return float(costs.forward_s[at]) * _share(action, num_layers)
        case _:
            return 0.0


def _exchanges(action: Action, num_layers: int) -> float:
    """How many times an action exchanges a chunk's rows among parts, all layers of the stage counted as once."""
    if action.kind in (Kind.FORWARD, Kind.BACKWARD):
        return 1.0
    return _share(action, num_layers) if action.kind is Kind.REFRESH else 0.0


def _memory(plan: EpochPlan, costs: Costs, rank: int, num_layers: int) -> Iterator[int]:
    """Bytes of a rank while it does each of its actions."""
    kept = int(costs.constant_bytes[rank])
    for action in plan.actions[rank]:
        at = rank, action.chunk
        activations, inputs = int(costs.activation_bytes[at]), int(costs.input_bytes[at])
        match action.kind:
            case Kind.FORWARD:
                kept += inputs if plan.recompute else activations
                yield kept
            case Kind.BACKWARD:
                kept += int(costs.deferred_bytes[at])
                yield kept + int(costs.gradient_bytes[at]) + (activations if plan.recompute else 0)
                kept -= inputs if plan.recompute else activations
            case Kind.WEIGHT:
                yield kept
                kept -= int(costs.deferred_bytes[at])
            case Kind.ENTER | Kind.REFRESH:
                yield kept + int(activations * _share(action, num_layers))
            case _:
                yield kept


def simulate(plan: EpochPlan, layout: Layout, costs: Costs) -> Simulation:
    """Play a plan with costs. ValueError where it cannot end (`validate_plan` says why)."""
    layers = _num_layers(plan)

    def seconds(rank: int, action: Action) -> float:
        exchanges = _exchanges(action, layers[rank])
        exchange_s = float(costs.exchange_s[rank, action.chunk]) * exchanges if exchanges else 0.0
        return _compute_s(plan, costs, rank, action, layers[rank]) + exchange_s

    def travel(rank: int, action: Action) -> float:
        return float(costs.wire_bytes[rank, action.chunk]) / costs.bytes_per_s

    played = play(plan, layout, seconds, travel, latency_s=costs.latency_s)
    if played.stuck:
        raise ValueError(f"the plan of epoch {plan.epoch} cannot end: ranks {sorted(played.stuck)} wait; validate it")
    makespan_s = max((spans[-1][1] for spans in played.spans if spans), default=0.0)
    every = [(rank, action) for rank, actions in enumerate(plan.actions) for action in actions]
    busy = [0.0] * layout.num_ranks
    for rank, action in every:
        busy[rank] += _compute_s(plan, costs, rank, action, layers[rank])
    return Simulation(
        spans=played.spans,
        makespan_s=makespan_s,
        busy_s=tuple(busy),
        bubble=1 - sum(busy) / (layout.num_ranks * makespan_s) if makespan_s else 0.0,
        sent_bytes=sum(int(costs.wire_bytes[rank, a.chunk]) for rank, a in every if a.kind is Kind.SEND),
        exchanged_bytes=round(
            sum(
                float(costs.exchange_bytes[rank, a.chunk]) * times
                for rank, a in every
                if (times := _exchanges(a, layers[rank]))
            )
        ),
        reduced_bytes=costs.step_bytes * sum(a.kind is Kind.STEP for _, a in every),
        peak_bytes=tuple(max(_memory(plan, costs, rank, layers[rank]), default=0) for rank in range(layout.num_ranks)),
    )


def count_slots(plan: EpochPlan, layout: Layout) -> int:
    """The length of a plan in slots: forward and backward of a chunk take one each, everything else nothing.

    2 (K + S - 1) for one group of K chunks in S stages.
    """
    plan = replace(plan, recompute=False)
    return round(simulate(plan, layout, uniform_costs(layout, len(plan.order))).makespan_s)
