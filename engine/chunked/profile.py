"""Measure a model on one chunk for a moment, so that splits can be compared before anything runs."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from penstock.engine import layered
from penstock.engine.chunked.blocks import load_chunk
from penstock.engine.chunked.config import BackendName
from penstock.engine.chunked.footprint import Profile
from penstock.engine.chunked.ownership import hidden_layers, hidden_width
from penstock.engine.deferred import WeightGradients
from penstock.engine.livebytes import LiveBytes
from penstock.storage.chunks import PartChunks

_REPEATS = 3
# Bytes per second and seconds per message of a hop between two ranks: tensors handed over among threads; gloo on one
# machine moved 16 MiB in 9 ms and 4 KiB in 2 ms (two shared cores).
_WIRES: dict[BackendName, tuple[float, float]] = {
    "threads": (20e9, 50e-6),
    "processes": (1.7e9, 2e-3),
    "ray": (1.7e9, 2e-3),
}


def _median_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """What `_measure` found of a unit: seconds of its passes, the bytes that its tape keeps, and those that a backward
    pass holds beside them at most."""

    forward_s: float
    backward_s: float
    weight_s: float
    kept_bytes: int
    gradient_bytes: int


def _backward(outputs: tuple[Tensor, ...]) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])


def _measure(unit: Callable[[], tuple[Tensor, ...]], known: Sequence[Tensor], leaf: Tensor | None = None) -> _Unit:
    """Run a unit some times; tensors that are `known` are there anyway. Of these, `leaf` are rows that went in, which a
    tape keeps for their gradient: autograd may have no use for them, as where dropout comes first."""
    with torch.no_grad():
        unit()  # compiles and warms up
        forward_s = _median_s(unit)
    backward, weight = [], []
    for _ in range(_REPEATS):
        with WeightGradients() as collector:
            outputs = unit()
        began = time.perf_counter()
        _backward(outputs)
        backward.append(time.perf_counter() - began)
        began = time.perf_counter()
        collector.flush()
        weight.append(time.perf_counter() - began)
    gradients = [tensor.grad for tensor in known if tensor.is_leaf and tensor.grad is not None and tensor is not leaf]
    with LiveBytes([*known, *gradients]) as live, WeightGradients():
        if leaf is not None:
            leaf.grad = None
        outputs = unit()
        kept = live.live
        live.peak = kept
        _backward(outputs)
    return _Unit(
        forward_s=forward_s,
        backward_s=statistics.median(backward),
        weight_s=statistics.median(weight),
        kept_bytes=kept + (0 if leaf is None else leaf.nbytes),
        gradient_bytes=live.peak - kept,
    )


def profile_model(
    model: nn.Module, part: PartChunks, num_features: int, *, backend: BackendName, disk_bytes_per_s: float
) -> Profile:
    """Run the units of a float32 CPU model on the largest chunk with random rows; takes a second or few."""
    chunk = part.chunk(int(part.own_sizes.argmax()))
    data = load_chunk(chunk, torch.device("cpu"))
    width, rows = hidden_width(model, num_features), data.num_own + data.num_halo
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, num_features, generator=generator)
    x = torch.randn(rows, width, generator=generator)
    initial = torch.randn(data.num_own, width, generator=generator) if layered.uses_initial(model) else None
    was_training = model.training
    model.train()

    def some(found: layered.Rows) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in found if tensor is not None and tensor.requires_grad) or (found[0],)

    def enter() -> tuple[Tensor, ...]:
        return some(layered.enter(model, data.drawn(0, 0), features))

    def layer(number: int) -> tuple[Tensor, ...]:
        leaf = None if initial is None else initial.requires_grad_()
        return some(layered.apply_layer(model, number, data.drawn(0, number), x.requires_grad_(), leaf))

    def head() -> tuple[Tensor, ...]:
        scores = layered.leave(model, x[: data.num_own].detach().requires_grad_(), initial)
        return (scores,)

    layers = hidden_layers(model)
    known = [*model.parameters(), *model.buffers(), features, x, *(() if initial is None else (initial,))]
    try:
        ends = {number: _measure(partial(layer, number), known, x) for number in {*layers[:1], *layers[-1:]}}
        hidden = [ends.get(number, ends[layers[0]]) for number in layers]  # those between are as the first
        found = [_measure(enter, known), *hidden, _measure(head, known)]
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
    bytes_per_s, latency_s = _WIRES[backend]
    return Profile(
        rows=data.num_own,
        halo=data.num_halo,
        edges=data.block.num_edges,
        forward_s=tuple(unit.forward_s for unit in found),
        backward_s=tuple(unit.backward_s for unit in found),
        weight_s=tuple(unit.weight_s for unit in found),
        kept_bytes=tuple(unit.kept_bytes for unit in found),
        gradient_bytes=tuple(unit.gradient_bytes for unit in found),
        bytes_per_s=bytes_per_s,
        latency_s=latency_s,
        disk_bytes_per_s=disk_bytes_per_s,
    )
