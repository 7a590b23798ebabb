"""Measure a model on one chunk for a moment, so that splits can be compared before anything runs."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine import layered
from penstock.engine.chunked.blocks import load_chunk
from penstock.engine.chunked.config import BackendName
from penstock.engine.chunked.footprint import Profile
from penstock.engine.chunked.ownership import hidden_layers, hidden_width
from penstock.engine.deferred import WeightGradients
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


class _Saved:
    """Counts the bytes that autograd keeps, each storage once, as a context."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(self._seen.values())

    def __enter__(self) -> "_Saved":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exit: Any) -> None:
        self._hooks.__exit__(*exit)


def _measure(unit: Callable[[], tuple[Tensor, ...]]) -> tuple[float, float, float, int]:
    """Seconds forward, backward and of weight gradients of one unit, and the bytes it keeps."""
    with torch.no_grad():
        unit()  # compiles and warms up
        forward_s = _median_s(unit)
    backward, weight = [], []
    for _ in range(_REPEATS):
        collector = WeightGradients()
        with _Saved() as saved, collector:
            outputs = unit()
        began = time.perf_counter()
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
        backward.append(time.perf_counter() - began)
        began = time.perf_counter()
        collector.flush()
        weight.append(time.perf_counter() - began)
    return forward_s, statistics.median(backward), statistics.median(weight), saved.num_bytes


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

    def layer() -> tuple[Tensor, ...]:
        last = hidden_layers(model)[-1]
        leaf = None if initial is None else initial.requires_grad_()
        return some(layered.apply_layer(model, last, data.drawn(0, last), x.requires_grad_(), leaf))

    def head() -> tuple[Tensor, ...]:
        scores = layered.leave(model, x[: data.num_own].detach().requires_grad_(), initial)
        return (scores,)

    layers = hidden_layers(model)
    try:
        found = [_measure(enter), *([_measure(layer)] * len(layers) if layers else []), _measure(head)]
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
    forward_s, backward_s, weight_s, saved = zip(*found, strict=True)
    bytes_per_s, latency_s = _WIRES[backend]
    return Profile(
        rows=data.num_own,
        halo=data.num_halo,
        edges=data.block.num_edges,
        forward_s=forward_s,
        backward_s=backward_s,
        weight_s=weight_s,
        saved_bytes=saved,
        bytes_per_s=bytes_per_s,
        latency_s=latency_s,
        disk_bytes_per_s=disk_bytes_per_s,
    )
