"""How a chunked run fits the machine: memory per rank, and which split of devices is predicted to be the fastest.

Replicas are alike, so one is sized and predicted, with its share of the memory, threads and disk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from penstock.chunked_memory import forecast_chunked
from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.estimate import Choice, choose_split, compare_splits, pick
from penstock.engine.chunked.features import TRAIN_SHARE
from penstock.engine.chunked.footprint import GraphFacts, ModelFacts, Profile
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.ownership import hidden_layers, hidden_width
from penstock.engine.chunked.profile import profile_model
from penstock.engine.layered import first_hidden, uses_initial
from penstock.process_memory import Forecast
from penstock.run import Run
from penstock.storage.budget import format_bytes
from penstock.storage.chunks import ChunkStore
from penstock.storage.errors import DoesNotFit

_FEATURE_SHARE = 0.4  # of the host memory: features up to this are kept in memory
_FEED_SHARE = 0.25  # of the host memory, for tiers and buffers of features in packs, or what the largest chunk needs
_BATCHES = 2.1  # of the largest chunk that a feed holds, as extents and again as rows, with what belongs to them


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Memory of every rank, where features come from, and the units of every stage, by measured cost.

    `feed_bytes` is for the first stage of a part. `memory` is of the whole process.
    """

    features: Literal["memory", "packs"]
    recompute: bool
    history_bytes: int
    feed_bytes: int
    units: tuple[range, ...]
    memory: Forecast


def _feature_rows(chunks: ChunkStore, model: nn.Module) -> NDArray[np.int64]:
    """Rows of features that every chunk reads, int64 [parts, K]: with halos where layer 0 aggregates."""
    parts = [chunks.part(part) for part in range(chunks.meta.num_parts)]
    return np.array([part.own_sizes + (first_hidden(model) == 1) * part.halo_sizes for part in parts])


def _host_bytes(run: Run) -> int:
    """Memory for one replica."""
    return run.budgets.host_bytes // run.config.cluster.replicas


def _device_bytes(run: Run, num_ranks: int) -> int | None:
    """Device memory for one rank: on Ray every rank has a GPU of its own, else all share one; None on the CPU.

    None also where the machine that plans knows of no GPU and no budget was given.
    """
    config = run.config
    if torch.device(config.train.device).type == "cpu" or not run.budgets.device_bytes:
        return None
    on_ray = config.cluster.address is not None or config.chunked.backend == "ray"
    return run.budgets.device_bytes // (1 if on_ray else num_ranks * config.cluster.replicas)


def _device_too_small(choice: Choice, device_bytes: int, sharing: int) -> DoesNotFit:
    return DoesNotFit(
        f"the device memory is too small: a rank needs {format_bytes(choice.device_bytes)} there for its topology, "
        f"features, activations and weights, and has {format_bytes(device_bytes)}; use --device-memory "
        f"{choice.device_bytes * sharing} or more, more chunks, or chunked.recompute=always"
    )


def _share(run: Run, chunks: ChunkStore, model: nn.Module) -> tuple[Literal["memory", "packs"], int]:
    """Where features come from, and the bytes that they take or may take, over all parts of a replica."""
    host, rows = _host_bytes(run), _feature_rows(chunks, model)
    float_bytes = 4 * run.graph.meta.num_features
    wanted = int(rows.sum()) * float_bytes
    largest = int(rows.max()) * (float_bytes + run.graph.row_format.row_bytes) * _BATCHES
    least = largest / min(TRAIN_SHARE, 1 - TRAIN_SHARE) * chunks.meta.num_parts  # two feeds, of epochs and exact passes
    if run.config.feed == "memory" or wanted <= max(_FEATURE_SHARE * host, least):
        return "memory", wanted
    return "packs", int(max(_FEED_SHARE * host, least))


def _graph_facts(stores: dict[int, ChunkStore]) -> GraphFacts:
    whole = stores[min(stores)]
    parts = [whole.part(part) for part in range(whole.meta.num_parts)]
    own, halo, edges = (
        np.sum([getattr(part, name) for part in parts], axis=0) for name in ("own_sizes", "halo_sizes", "edge_sizes")
    )
    return GraphFacts(
        own_rows=own,
        halo_rows=np.maximum(0, halo - whole.meta.part_alpha * own).astype(np.int64),  # mirrors are counted apart
        edges=edges,
        part_alpha={parts: store.meta.part_alpha for parts, store in stores.items()},
    )


def _model_facts(run: Run, model: nn.Module) -> ModelFacts:
    meta = run.graph.meta
    return ModelFacts(
        hidden_layers=len(hidden_layers(model)),
        width=hidden_width(model, meta.num_features),
        num_features=meta.num_features,
        parameter_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        uses_initial=uses_initial(model),
        label_bytes=4 * meta.num_classes if meta.multi_label else 8,
    )


def _profile(run: Run, chunks: ChunkStore, config: ChunkedConfig, model: nn.Module, num_ranks: int) -> Profile:
    before, num_ranks = torch.get_num_threads(), num_ranks * run.config.cluster.replicas
    torch.set_num_threads(max(1, run.threads // num_ranks))
    try:
        return profile_model(
            model,
            chunks.part(0),
            run.graph.meta.num_features,
            backend=config.backend,
            disk_bytes_per_s=min(run.disk_rates.read_bytes_per_s, run.disk_rates.write_bytes_per_s) / num_ranks,
        )
    finally:
        torch.set_num_threads(before)


def size_ranks(run: Run, chunks: ChunkStore, config: ChunkedConfig, model: nn.Module) -> Sizes:
    """Share the host memory out among the ranks of a split that is settled.

    DoesNotFit where activations, topology and buffers alone are more than that.
    """
    features, feature_bytes = _share(run, chunks, model)
    layout = Layout(config.stages, config.parts)
    rank_bytes = max(0, _host_bytes(run) - feature_bytes) // layout.num_ranks
    profile = _profile(run, chunks, config, model, layout.num_ranks)
    facts = _graph_facts({config.parts: chunks})
    device_bytes = _device_bytes(run, layout.num_ranks)
    choice = choose_split(layout, facts, _model_facts(run, model), profile, config, rank_bytes, device_bytes)
    if device_bytes is not None and choice.device_bytes > device_bytes:
        raise _device_too_small(choice, device_bytes, run.budgets.device_bytes // max(1, device_bytes))
    if not choice.fits:
        replicas = run.config.cluster.replicas
        needed = (choice.peak_bytes * layout.num_ranks + feature_bytes) * replicas
        each, fewer = (f" in each of {replicas} replicas", "fewer replicas, ") if replicas > 1 else ("", "")
        raise DoesNotFit(
            f"--host-memory {format_bytes(run.budgets.host_bytes)} is too small: {layout.num_ranks} ranks need "
            f"{format_bytes(choice.peak_bytes)} each, features {format_bytes(feature_bytes)}{each}; use --host-memory "
            f"{needed} or more, {fewer}or more chunks",
            host_bytes=needed,
        )
    return Sizes(
        features=features,
        recompute=choice.recompute,
        history_bytes=rank_bytes - choice.peak_bytes + choice.resident_history_bytes,
        feed_bytes=0 if features == "memory" else feature_bytes // config.parts,
        units=choice.units,
        memory=forecast_chunked(run, model, choice, chunks, feature_bytes),
    )


def forecast_ranks(run: Run, model: nn.Module, choice: Choice, chunks: ChunkStore) -> Forecast:
    """What the process takes with a split that was compared."""
    return forecast_chunked(run, model, choice, chunks, _share(run, chunks, model)[1])


def compare_ranks(
    run: Run, model: nn.Module, devices: int, cut: Callable[[int], ChunkStore]
) -> tuple[tuple[Choice, ...], int]:
    """Predict every split of `devices`, and the bytes of features; `cut(parts)` cuts the graph for so many parts."""
    stores = {parts: cut(parts) for parts in range(1, devices + 1) if devices % parts == 0}
    config = run.config.chunked
    feature_bytes = max(_share(run, store, model)[1] for store in stores.values())
    choices = compare_splits(
        _graph_facts(stores),
        _model_facts(run, model),
        _profile(run, stores[1], config, model, devices),
        config,
        devices=devices,
        memory_bytes=(_host_bytes(run) - feature_bytes) // devices,
        device_bytes=_device_bytes(run, devices),
    )
    return choices, feature_bytes


def pick_fitting(run: Run, choices: Sequence[Choice], devices: int, feature_bytes: int) -> Choice:
    """The fastest split that fits; DoesNotFit says what memory the whole run needs."""
    try:
        return pick(choices)
    except DoesNotFit as error:
        needed = ((error.host_bytes or 0) * devices + feature_bytes) * run.config.cluster.replicas
        raise DoesNotFit(str(error), host_bytes=needed) from error


def choose_ranks(run: Run, model: nn.Module, cut: Callable[[int], ChunkStore]) -> Choice:
    """The fastest split of `chunked.devices` that fits and keeps the chunks that were asked for."""
    assert run.config.chunked.devices is not None
    devices, chunks = run.config.chunked.devices, run.config.chunked.chunks
    choices, feature_bytes = compare_ranks(run, model, devices, cut)
    return pick_fitting(run, [choice for choice in choices if choice.chunks == chunks], devices, feature_bytes)
