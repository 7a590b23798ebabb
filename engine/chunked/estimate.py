"""Compare the ways to spread full-graph training over ranks: layers (pipeline), nodes (graph parallel), or both.

Every split of D devices into W parts times S stages is planned as it would run and played with costs that are scaled
from a short profile; the fastest that fits the memory of a rank is picked. `footprint` has the formulas.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.footprint import (
    GraphFacts,
    ModelFacts,
    Profile,
    Split,
    cut_pieces,
    history_bytes,
    resident_history_bytes,
    split_costs,
)
from penstock.engine.chunked.layout import Layout, split_stages
from penstock.engine.chunked.schedule import plan_epoch
from penstock.engine.chunked.simulate import Simulation, simulate
from penstock.storage.budget import format_bytes
from penstock.storage.errors import DoesNotFit

Parallelism = Literal["single", "pipeline", "graph", "hybrid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One split, with what it is predicted to take.

    `chunks` is 1 where parts alone are enough: then no row is historical. Bytes sent are per epoch and of all ranks:
    between stages, between parts, and to sum weight gradients. `peak_bytes` is of the rank that needs most;
    `history_bytes` likewise, in memory or on disk; `resident_history_bytes` is what the peak has for them. Histories
    stay on the host, the rest of the peak, `device_bytes`, is on the device. `all_ranks_bytes` is the sum over ranks,
    with as many histories in memory as the budget has room for, which take `all_histories_bytes`. `fits` says whether
    both are within the budgets of a rank.
    """

    kind: Parallelism
    stages: int
    parts: int
    chunks: int
    units: tuple[range, ...]
    recompute: bool
    histories_in_memory: bool
    epoch_s: float
    bubble: float
    sent_bytes: int
    exchanged_bytes: int
    reduced_bytes: int
    peak_bytes: int
    history_bytes: int
    resident_history_bytes: int
    device_bytes: int
    all_ranks_bytes: int
    all_histories_bytes: int
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """As `plan.json` has it; units as pairs of first and past-the-last."""
        return {**asdict(self), "units": [[unit.start, unit.stop] for unit in self.units]}


def name_split(stages: int, parts: int) -> Parallelism:
    """What a grid of ranks is called."""
    if parts == 1:
        return "single" if stages == 1 else "pipeline"
    return "graph" if stages == 1 else "hybrid"


def _play(split: Split, facts: GraphFacts, model: ModelFacts, profile: Profile, config: ChunkedConfig) -> Simulation:
    plan = plan_epoch(
        split.layout,
        epoch=0,
        order=range(facts.num_chunks),
        updates=min(config.updates_per_epoch, facts.num_chunks),
        gradient_mode=config.gradient_mode,
        recompute=split.recompute,
        defer_weights=config.defer_weights,
    )
    return simulate(plan, split.layout, split_costs(split, facts, model, profile, config))


def _options(config: ChunkedConfig) -> Iterator[tuple[bool, bool]]:
    """(recompute, histories in memory) that the configuration allows, in order of preference."""
    recompute = {"never": (False,), "always": (True,), "auto": (False, True)}[config.recompute]
    in_memory = {"auto": (True, False), "memory": (True,)}.get(config.history_storage, (False,))
    for memory in in_memory:
        for again in recompute:
            yield again, memory


def choose_split(
    layout: Layout,
    facts: GraphFacts,
    model: ModelFacts,
    profile: Profile,
    config: ChunkedConfig,
    memory_bytes: int,
    device_bytes: int | None = None,
) -> Choice:
    """The first option of a split that fits, else the one that needs least; `device_bytes` None where the host is
    the device."""
    units = split_stages(profile.unit_costs(), layout.stages)
    piece = cut_pieces(facts, layout.parts)
    found = []
    for recompute, in_memory in _options(config):
        split = Split(layout=layout, units=units, recompute=recompute, in_memory=in_memory)
        played = _play(split, facts, model, profile, config)
        peaks, stored = np.array(played.peak_bytes), history_bytes(split, piece, model, config)
        resident = resident_history_bytes(split, piece, model, config)
        used = np.minimum(stored, max(0, memory_bytes - peaks.max()) + resident.max())
        on_device = int((peaks - resident).max())
        choice = Choice(
            kind=name_split(layout.stages, layout.parts),
            stages=layout.stages,
            parts=layout.parts,
            chunks=facts.num_chunks,
            units=units,
            recompute=recompute,
            histories_in_memory=in_memory,
            epoch_s=played.makespan_s,
            bubble=played.bubble,
            sent_bytes=played.sent_bytes,
            exchanged_bytes=played.exchanged_bytes,
            reduced_bytes=played.reduced_bytes,
            peak_bytes=int(peaks.max()),
            history_bytes=round(float(stored.max())),
            resident_history_bytes=round(float(resident.max())),
            device_bytes=on_device,
            all_ranks_bytes=round(float((peaks - resident + used).sum())),
            all_histories_bytes=round(float(used.sum())),
            fits=int(peaks.max()) <= memory_bytes and (device_bytes is None or on_device <= device_bytes),
        )
        if choice.fits:
            return choice
        found.append(choice)
    return min(found, key=lambda choice: choice.peak_bytes)


def compare_splits(
    facts: GraphFacts,
    model: ModelFacts,
    profile: Profile,
    config: ChunkedConfig,
    *,
    devices: int,
    memory_bytes: int,
    device_bytes: int | None = None,
) -> tuple[Choice, ...]:
    """Predict every split of `devices` ranks with `memory_bytes` and, on a device, `device_bytes` each, pipeline first.

    Left out are splits with more stages than the model has units, and numbers of parts that `facts` do not know. Parts
    alone come twice: with one chunk, which is exact, and with the chunks of `facts`, which need less memory.
    """
    choices, budgets = [], (memory_bytes, device_bytes)
    for parts in range(1, devices + 1):
        stages = devices // parts
        known = parts == 1 or parts in facts.part_alpha
        if devices % parts or not known or stages > model.hidden_layers + 1:
            continue
        layout = Layout(stages, parts)
        if stages == 1 and parts > 1 and facts.num_chunks > 1:
            choices.append(choose_split(layout, facts.in_one_chunk(), model, profile, config, *budgets))
        choices.append(choose_split(layout, facts, model, profile, config, *budgets))
    return tuple(choices)


def pick(choices: Sequence[Choice]) -> Choice:
    """The fastest split that fits; of equally fast ones the first.

    DoesNotFit, with the smallest budget that would do, where none does; ValueError where there is none at all.
    """
    if not choices:
        raise ValueError("no split of the devices is possible; use fewer devices, more layers, or other parts")
    fitting = [choice for choice in choices if choice.fits]
    if fitting:
        return min(fitting, key=lambda choice: choice.epoch_s)
    least = min(choices, key=lambda choice: choice.peak_bytes)
    raise DoesNotFit(
        f"no split fits the memory of a rank; {least.stages} stages x {least.parts} parts need least, "
        f"{format_bytes(least.peak_bytes)} ({least.peak_bytes} bytes) per rank, {least.device_bytes} of them on the "
        "device where that is a GPU: give that much, or use more devices or more chunks",
        host_bytes=least.peak_bytes,
    )


HEADINGS = (
    "split",
    "stages",
    "parts",
    "chunks",
    "epoch",
    "bubble",
    "stage bytes",
    "part bytes",
    "memory",
    "histories",
    "activations",
    "fits",
)
RANKS = (0, 0, 0, 1, 0, 3, 4, 5, 1, 6, 7, 0)  # what a heading matters: those of high ranks go first where room is short


def estimate_rows(choices: Sequence[Choice]) -> list[tuple[str, ...]]:
    """What `penstock plan --mode chunked` prints under `HEADINGS`: bytes are per epoch, memory is per rank."""
    return [
        (
            choice.kind,
            str(choice.stages),
            str(choice.parts),
            str(choice.chunks),
            f"{choice.epoch_s:.3g} s",
            f"{100 * choice.bubble:.0f} %",
            format_bytes(choice.sent_bytes),
            format_bytes(choice.exchanged_bytes + choice.reduced_bytes),
            format_bytes(choice.peak_bytes),
            f"{format_bytes(choice.history_bytes)} {'in memory' if choice.histories_in_memory else 'on disk'}",
            "recomputed" if choice.recompute else "kept",
            "yes" if choice.fits else "no",
        )
        for choice in choices
    ]
