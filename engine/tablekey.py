"""What a table of a model's outputs depends on, as a digest: the weights, the function, and the device it runs on.

Equal weights do not make equal functions: an aggregator, an exponent or a user's own code may differ. So the digest
has, per module, its class with the source file that defines it, and its attributes; and the outputs on a few nodes,
which see what a source file imports. What cannot be described has a digest that no other call has: then a table is
computed anew, never taken for another.
"""

import functools
import inspect
import uuid
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import xxhash
from pydantic import BaseModel
from torch import Tensor, nn

from penstock.engine.checkpoint import model_checksum
from penstock.engine.minibatch import Block
from penstock.engine.models import check_layer_forward, layer_forward

_TORCH = {
    "_parameters",
    "_buffers",
    "_modules",
    "training",
}  # of a module: weights are digested apart, the mode is eval
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Path, Enum, torch.dtype, torch.device, np.generic)


def probe_block(device: torch.device) -> Block:
    """Five nodes of unequal in-degrees and weights, with a self-loop and parallel edges; none without an in-edge."""
    indptr, indices = [0, 1, 4, 5, 9, 10], [1, 0, 2, 2, 2, 1, 2, 3, 4, 0]
    return Block(
        num_src=5,
        num_dst=5,
        indptr=torch.tensor(indptr, dtype=torch.int32, device=device),
        indices=torch.tensor(indices, dtype=torch.int32, device=device),
        edge_weights=torch.linspace(0.5, 2, len(indices), device=device),
        src_degrees=torch.tensor(indptr, dtype=torch.int32, device=device).diff(),
    )


@torch.no_grad()
def probe_layers(
    model: nn.Module, num_features: int, num_layers: int, device: torch.device
) -> tuple[list[int], list[str]]:
    """Columns of every layer's input, and of the last one's output, and a digest of each layer's outputs."""
    block = probe_block(device)
    x = torch.linspace(-1, 1, 5 * num_features, device=device).view(5, num_features).sin()
    if not hasattr(model, "layer_forward"):
        check_layer_forward(model, [block] * len(model.layers), x)  # type: ignore[arg-type]  # a ModuleList
    widths, digests = [num_features], []
    for layer in range(num_layers):
        x = layer_forward(model, layer, block, x)
        widths.append(x.shape[1])
        digests.append(_digest(x.float().cpu().numpy().tobytes()))
    return widths, digests


def _digest(data: bytes) -> str:
    return str(xxhash.xxh3_64_hexdigest(data))


def function_digest(model: nn.Module) -> str:
    """A digest of what the model computes, whatever its weights are; see above."""
    return _digest(repr([model_checksum(model), _Describer().module(model)]).encode())


class _Describer:
    """Makes plain lists of objects; each object once, so that cycles end."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, Any]] = {}  # with the object, so that its id stays its own

    def module(self, module: nn.Module) -> list[Any]:
        """Every module of a tree: its name, class, attributes and the buffers that no state has."""
        found = []
        for name, one in module.named_modules():
            state = {key: value for key, value in vars(one).items() if key not in _TORCH}
            hidden = {key: one._buffers[key] for key in sorted(one._non_persistent_buffers_set)}
            found.append([name, self.value(type(one)), self.value(state), self.value(hidden)])
        return found

    def value(self, value: Any) -> Any:
        """Anything, as plain as it gets."""
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, type):
            return [f"{value.__module__}.{value.__qualname__}", [_source_of(base) for base in value.__mro__]]
        if isinstance(value, ModuleType):
            return _source_of(value)
        if id(value) in self._seen:
            return ["again", self._seen[id(value)][0]]
        self._seen[id(value)] = len(self._seen), value
        if isinstance(value, Tensor | np.ndarray):
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            return [str(array.dtype), array.shape, _digest(np.ascontiguousarray(array).tobytes())]
        if isinstance(value, nn.Module):  # in an attribute that torch does not look into
            return [_digest(model_checksum(value).encode()), self.module(value)]
        if isinstance(value, dict):
            return [type(value).__name__, [[self.value(key), self.value(item)] for key, item in value.items()]]
        if isinstance(value, list | tuple):
            return [type(value).__name__, [self.value(item) for item in value]]
        if isinstance(value, set | frozenset):
            return ["set", sorted(repr(self.value(item)) for item in value)]
        return self._code(value) or self._object(value)

    def _code(self, value: Any) -> Any:
        if isinstance(value, functools.partial):
            return ["partial", self.value(value.func), self.value(value.args), self.value(value.keywords)]
        if isinstance(value, MethodType):
            return ["method", self.value(value.__func__), self.value(value.__self__)]
        if isinstance(value, FunctionType):
            held = [cell.cell_contents for cell in value.__closure__ or ()]
            where = [value.__module__, value.__qualname__, value.__code__.co_firstlineno, _source_of(value)]
            return [*where, self.value(held), self.value(value.__defaults__), self.value(value.__kwdefaults__)]
        if isinstance(value, BuiltinFunctionType):
            return [value.__module__, value.__qualname__, torch.__version__]
        return None

    def _object(self, value: Any) -> Any:
        if isinstance(value, BaseModel):
            return [self.value(type(value)), value.model_dump_json()]
        if hasattr(value, "__dict__") and not hasattr(type(value), "__slots__"):
            return [self.value(type(value)), self.value(vars(value))]
        return ["unknown", uuid.uuid4().hex]


def _source_of(value: Any) -> str:
    """A digest of the file that defines a class or function; torch and Python itself by version."""
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
    if module.partition(".")[0] in ("torch", "builtins", "numpy"):
        return f"{module} {torch.__version__} {np.__version__}"
    try:
        file = Path(inspect.getsourcefile(value) or "")
        stat = file.stat()
        return _file_digest(file, stat.st_mtime_ns, stat.st_size)
    except (TypeError, OSError):  # made in memory: two of one name may differ
        return uuid.uuid4().hex


@functools.lru_cache(maxsize=256)
def _file_digest(file: Path, mtime_ns: int, num_bytes: int) -> str:
    return _digest(file.read_bytes())
