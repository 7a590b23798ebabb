"""Build what a rank works with: its chunks, tables, features and optimizer, from its spec."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from penstock.engine import layered
from penstock.engine.chunked.blocks import ChunkTargets, load_chunk, train_counts
from penstock.engine.chunked.exchange import MirrorExchange
from penstock.engine.chunked.features import FeatureSource, open_features
from penstock.engine.chunked.ownership import hidden_layers, hidden_width, owned_names, unit_tensors
from penstock.engine.chunked.spec import RankSpec
from penstock.engine.chunked.stage import StageCompute
from penstock.engine.chunked.stepping import StageOptimizer
from penstock.engine.chunked.transport import Transport
from penstock.storage.chunks import PartChunks, open_chunks
from penstock.storage.graph import GraphStore
from penstock.storage.history import HistoryConfig, HistorySet, RowStore, open_history


@dataclass(frozen=True, slots=True, kw_only=True)
class RankParts:
    """What `assemble` made. `width` is H, `state_width` that of rows between stages.

    `entries` has the rows that entered the stage, where they are needed again; `train_counts` int64 [K] is over all
    parts.
    """

    owned: set[str]
    steps: StageOptimizer
    compute: StageCompute
    history: HistorySet
    features: FeatureSource | None
    entries: RowStore | None
    scratch: tuple[RowStore, RowStore]
    width: int
    state_width: int
    own_sizes: NDArray[np.int64]
    train_counts: NDArray[np.int64]


def _open_history(spec: RankSpec, part: PartChunks, stack: ExitStack) -> HistorySet:
    chunked = spec.chunked
    config = HistoryConfig(
        storage=chunked.history_storage,
        dtype="float64" if spec.dtype == "float64" else chunked.history_dtype,
        push=chunked.push,
        ema_gamma=chunked.ema_gamma,
        poison=spec.poison,
    )
    folder = spec.scratch / f"rank-{spec.rank:03d}"
    opened = open_history(folder, part.run_sizes, part.own_sizes, config=config, memory=spec.history_memory)
    return stack.enter_context(opened)


def _open_features(
    spec: RankSpec, graph: GraphStore, part: PartChunks, model: nn.Module, stack: ExitStack
) -> FeatureSource | None:
    if spec.first_unit != 0:
        return None
    return stack.enter_context(
        open_features(
            spec.features,
            graph,
            part,
            halo=layered.first_hidden(model) == 1,
            host_memory=spec.feed_memory,
            threads=spec.threads,
            dtype=spec.torch_dtype,
            device=torch.device(spec.device),
        )
    )


def assemble(spec: RankSpec, graph: GraphStore, transport: Transport, model: nn.Module, stack: ExitStack) -> RankParts:
    """Build it all; `stack` frees it. DoesNotFit where tables exceed the rank's memory and may not go to disk."""
    layout, device = spec.layout, torch.device(spec.device)
    store, stage = open_chunks(spec.chunks), layout.stage_of(spec.rank)
    part = store.part(layout.part_of(spec.rank))
    owned = owned_names(unit_tensors(model, graph.meta.num_features), spec.units)[stage]
    width = hidden_width(model, graph.meta.num_features)
    state_width = width * (2 if layered.uses_initial(model) else 1)
    first = hidden_layers(model).start  # unit 0 is `enter`, unit n the n-th hidden layer
    hidden = range(first + max(0, spec.first_unit - 1), first + spec.last_unit - 1)
    exchange = MirrorExchange(transport, layout.same_stage(spec.rank))
    sends_gradients = any(spec.chunked.message_weights()) or not exchange.is_alone
    history = _open_history(spec, part, stack)
    named: dict[str, Any] = {
        "histories": {layer: history.run_table(f"history-{layer}", width) for layer in hidden},
        "messages": {layer: history.message_table(f"messages-{layer}", width) for layer in hidden if sends_gradients},
    }
    keeps_entries = spec.recompute and layout.prev_rank(spec.rank) is not None
    entries = history.row_store("entries", state_width) if keeps_entries else None
    leaves = layout.next_rank(spec.rank) is None
    with_loops = graph if getattr(model, "needs_degrees", True) else None
    compute = StageCompute(
        model,
        [load_chunk(part.chunk(c), device, with_loops) for c in range(part.num_chunks)],
        hidden=hidden,
        enters=spec.first_unit == 0,
        leaves=leaves,
        message_weights=spec.chunked.message_weights(),
        staleness_bound=spec.chunked.staleness_bound,
        exchange=exchange,
        targets=ChunkTargets(graph, part, device, spec.torch_dtype) if leaves else None,
        dtype=spec.torch_dtype,
        device=device,
        **named,
    )
    return RankParts(
        owned=owned,
        steps=StageOptimizer(model, owned, spec.train, layout, transport),
        compute=compute,
        history=history,
        features=_open_features(spec, graph, part, model, stack),
        entries=entries,
        scratch=(history.row_store("exact-0", state_width), history.row_store("exact-1", state_width)),
        width=width,
        state_width=state_width,
        own_sizes=part.own_sizes,
        train_counts=train_counts(graph, [store.part(w) for w in range(layout.parts)]),
    )
