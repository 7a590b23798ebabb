"""Which parameters and buffers belong to which unit of a model, found by running every unit once.

Stages keep, step and save what their units own, under the model's own names, so any number of stages can load it again.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from penstock.engine import layered
from penstock.engine.exact import single_block


class _Called:
    """Notes which modules run, as a context."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self.names = model, set[str]()

    def __enter__(self) -> "_Called":
        self._hooks = [
            module.register_forward_pre_hook(lambda _, __, name=name: self.names.add(name))
            for name, module in self._model.named_modules()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def _tensors_of(model: nn.Module, modules: set[str]) -> set[str]:
    """State names that lie directly in modules; the model's own are found by their gradients instead."""
    found = set()
    for name, module in model.named_modules():
        if name and name in modules:
            own = [*module._parameters, *module._buffers]
            found |= {f"{name}.{key}" for key in own}
    return found & set(model.state_dict())


def _with_gradient(model: nn.Module, out: Sequence[Tensor | None]) -> set[str]:
    model.zero_grad(set_to_none=True)
    total = sum(tensor.sum() for tensor in out if tensor is not None)
    if isinstance(total, Tensor) and total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def hidden_layers(model: nn.Module) -> range:
    """Layers whose input is hidden rows, and so has a history."""
    return range(layered.first_hidden(model), len(model.layers))  # type: ignore[arg-type]  # a ModuleList


def _probe(model: nn.Module, num_features: int) -> Tensor:
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return torch.linspace(-1, 1, num_features, dtype=dtype)[None]


def hidden_width(model: nn.Module, num_features: int) -> int:
    """H: columns of the rows that unit 0 makes."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            h, _ = layered.enter(model, single_block(torch.device("cpu")), _probe(model, num_features))
    finally:
        model.train(was_training)
    return int(h.shape[1])


def unit_tensors(model: nn.Module, num_features: int) -> list[set[str]]:
    """State names of unit 0 (what reads features), of every hidden layer, and of the head, L_hidden + 2 sets.

    ValueError where a tensor that no unit uses would be trained by nobody.
    """
    block = single_block(torch.device("cpu"))
    was_training = model.training
    model.eval()  # no dropout, and batch statistics of one row would be refused
    found: list[set[str]] = []
    try:
        with _Called(model) as called:
            h, initial = layered.enter(model, block, _probe(model, num_features))
        found.append(_tensors_of(model, called.names) | _with_gradient(model, (h, initial)))
        for layer in hidden_layers(model):
            h, initial = h.detach(), None if initial is None else initial.detach()
            with _Called(model) as called:
                h, initial = layered.apply_layer(model, layer, replace(block), h.requires_grad_(), initial)
            found.append(_tensors_of(model, called.names) | _with_gradient(model, (h, initial)))
        h, initial = h.detach().requires_grad_(), None if initial is None else initial.detach()
        with _Called(model) as called:
            scores = layered.leave(model, h, initial)
        found.append(_tensors_of(model, called.names) | _with_gradient(model, (scores,)))
    finally:
        model.train(was_training)
    unused = set(model.state_dict()) - set().union(*found)
    if unused:
        raise ValueError(f"{type(model).__name__} never uses {sorted(unused)[:4]}; remove what no layer uses")
    return found


def owned_names(units: Sequence[set[str]], bounds: Sequence[tuple[int, int]]) -> list[set[str]]:
    """State names of every stage; ValueError where two stages would own the same tensor."""
    owned = []
    for n, (start, stop) in enumerate(bounds):
        parts = list(units[start:stop]) + ([units[-1]] if n == len(bounds) - 1 else [])
        owned.append(set().union(*parts))
    for n, names in enumerate(owned):
        for m in range(n):
            if shared := names & owned[m]:
                raise ValueError(
                    f"stages {m} and {n} share {sorted(shared)[:3]}: weights that several layers use have to be in one "
                    "stage; use fewer stages, or give each layer its own"
                )
    return owned
