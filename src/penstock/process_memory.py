"""How large the process becomes at its largest: one number to give a container, and what it is made of.

`--host-memory` is a budget for tiers, buffers and scratch; the process also has an interpreter with its libraries, the
mapped topology while it samples, the model, and what a step computes. What is predicted is the resident size (RSS) of
the process and its children, summed. That is the right number for a container: its limit counts the same pages (those
that processes share once) and page cache, which the kernel takes back before it ends anybody. Mapped topology is such
cache, so a container may be smaller by that much: sampling is slower then, and does not fail.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from penstock.kernels import gather, partition
from penstock.kernels.cache import cache_folder
from penstock.storage.budget import MIB, format_bytes, rss_bytes
from penstock.storage.errors import DoesNotFit

Mode = Literal["sampled", "chunked"]

PROCESS = "interpreter and libraries"
TOPOLOGY = "mapped topology"

# What a run loads when it first needs it, as measured with torch 2.13 and numba 0.68 on the reference machine.
_MODULES = {"torch._dynamo": 80 * MIB}  # comes with the first optimizer
_KERNELS = 120 * MIB  # compiled kernels and what loads them, threads, the allocator's arenas
_COMPILING = 70 * MIB  # the first run after an installation compiles them
PRODUCER = 240 * MIB  # the process that makes rolling windows, which does without torch
RANK = 420 * MIB  # a rank or replica in a process of its own
_KERNEL_OF: dict[Mode, tuple[str, Any]] = {  # one that every run of the mode needs, by the name of its file
    "sampled": ("gather.gather_float32", gather.gather_float32),
    "chunked": ("partition.collect_edges", partition.collect_edges),
}
_DIFFERS_BY = 32  # libraries take some MiB more or less in every process, and predictions err upwards
STATE_COPIES = 6  # of the weights: they, gradients, two moments, the best so far, and a checkpoint being written
WAITING_PART = 3  # of what ranks allocate anew with every chunk a third waits so at most: 10 to 35 % in seven runs
WAITING = 2  # times what a step holds: what came back waits in `recycled` and in the allocator for its next use


def unloaded_bytes() -> int:
    """What modules that training loads will take."""
    return sum(size for name, size in _MODULES.items() if name not in sys.modules)


def process_bytes(mode: Mode = "sampled") -> int:
    """Resident bytes of this process once all is loaded that a run uses, with nothing of the run in it."""
    later = unloaded_bytes()
    name, kernel = _KERNEL_OF[mode]
    if not getattr(kernel, "overloads", True):
        cache = cache_folder()
        is_compiled = cache is not None and any(cache.glob(f"{name}-*.nbi"))
        later += _KERNELS + (0 if is_compiled else _COMPILING)
    return rss_bytes() + later


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What is resident together at some time: bytes by component. `budgeted` of them are what `--host-memory` rules."""

    name: str
    parts: Mapping[str, int]
    budgeted: int = 0

    @property
    def num_bytes(self) -> int:
        """The sum."""
        return sum(self.parts.values())

    @property
    def least_bytes(self) -> int:
        """Without what the kernel can drop and read again."""
        return self.num_bytes - self.parts.get(TOPOLOGY, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The phases of a run; they follow each other, so the largest one is what counts."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The largest."""
        return max(self.phases, key=lambda phase: phase.num_bytes)

    @property
    def num_bytes(self) -> int:
        """The one number."""
        return self.peak.num_bytes

    def to_json(self) -> dict[str, Any]:
        """As `plan.json` and `result.json` have it under `memory`."""
        return {
            "predicted_peak_bytes": self.num_bytes,
            "phase": self.peak.name,
            "components": dict(self.peak.parts),
            "phases": {phase.name: phase.num_bytes for phase in self.phases},
        }

    def check(self, host_bytes: int, limit: int) -> None:
        """DoesNotFit where a container or machine of `limit` bytes cannot hold a phase, with a --host-memory that
        works, or the size that it must have."""
        worst = max(self.phases, key=lambda phase: phase.least_bytes)
        if worst.least_bytes - worst.least_bytes // _DIFFERS_BY <= limit:
            return
        lower = min(_lower(phase, host_bytes, limit) for phase in self.phases)
        remedy = f"give the container {self.container_bytes} bytes ({format_bytes(self.container_bytes)})"
        if lower > 0:
            remedy = f"use --host-memory {lower} or less, or {remedy}"
        raise DoesNotFit(
            f"the process needs {format_bytes(worst.least_bytes)} in its step {worst.name!r} with --host-memory "
            f"{format_bytes(host_bytes)}, this container or machine has {format_bytes(limit)} "
            f"({describe(worst)}); {remedy}"
        )

    @property
    def container_bytes(self) -> int:
        """The limit to give a container, in whole MiB."""
        return -(-self.num_bytes // MIB) * MIB


def _lower(phase: Phase, host_bytes: int, limit: int) -> int:
    """A --host-memory with which a phase fits; the allocator may hold more than what the budget rules."""
    room = limit - (phase.least_bytes - phase.budgeted)
    return min(room, room * host_bytes // max(1, phase.budgeted))


def describe(phase: Phase) -> str:
    """What a phase is made of, the largest first."""
    parts = sorted(phase.parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)


def forecast_rows(memory: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `penstock plan` and `penstock doctor` print of `to_json`: components of the largest phase, and the sum."""
    rows = [(f"  {name}", format_bytes(size)) for name, size in memory["components"].items() if size]
    total = memory["predicted_peak_bytes"]
    return [
        ("memory of the process", f"at its largest, in step {memory['phase']}:"),
        *rows,
        ("  in all", f"{format_bytes(total)}: give the container {-(-total // MIB)} MiB"),
    ]
