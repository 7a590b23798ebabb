"""What the process of `penstock infer` holds: see `process_memory`."""

from typing import Any

from numpy.typing import NDArray
from torch import nn

from penstock.engine.exact import exact_peak_bytes
from penstock.process_memory import (
    PROCESS,
    TOPOLOGY,
    WAITING_PART,
    Forecast,
    Mode,
    Phase,
    process_bytes,
    unloaded_bytes,
)
from penstock.sampler.footprint import topology_bytes
from penstock.storage.budget import MIB, default_host_bytes
from penstock.storage.graph import GraphStore


def infer_process_bytes(mode: Mode) -> int:
    """Resident bytes of this process without data; nothing is trained, so what only training loads is left out."""
    return process_bytes(mode) - unloaded_bytes()


def default_infer_memory(process: int) -> int:
    """A power of two, at most what fits beside the process: mostly the same at the next call, which then continues
    this one."""
    fitting = max(MIB, default_host_bytes(process) * WAITING_PART // (WAITING_PART + 1))
    return 1 << (fitting.bit_length() - 1)


def forecast_infer(
    process: int, model: nn.Module, graph: GraphStore, host_bytes: int, nodes: NDArray[Any] | None
) -> Forecast:
    """Predict the exact pass over all layers, for `nodes` or all of them; writing takes less. DoesNotFit where a node's
    neighbourhood alone is more than `host_bytes`."""
    exact = exact_peak_bytes(model, graph, host_bytes, nodes)
    parts = {PROCESS: process, TOPOLOGY: topology_bytes(graph), "layers": exact}
    parts["memory that waits for its next use"] = exact // WAITING_PART
    return Forecast(phases=(Phase(name="infer", parts=parts, budgeted=exact + exact // WAITING_PART),))
