"""Make the specs of all ranks: which layers each stage has, what memory each rank may use, what all start from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import nn

from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.layout import Layout, split_stages
from penstock.engine.chunked.ownership import hidden_layers, hidden_width
from penstock.engine.chunked.spec import FeatureSpec, RankSpec
from penstock.engine.layered import first_hidden
from penstock.engine.models import ModelConfig
from penstock.engine.trainer import TrainConfig
from penstock.storage.chunks import ChunkStore
from penstock.storage.graph import GraphStore

_GATHER_COST = 14  # multiply-adds in the time of gathering one float; as in `engine.layers`


def unit_costs(model: nn.Module, graph: GraphStore) -> list[float]:
    """Relative cost of unit 0 and of every hidden layer, by their matrices and edges; the head counts to the last."""
    width, edges = hidden_width(model, graph.meta.num_features), graph.num_edges / max(1, graph.num_nodes)
    layers = hidden_layers(model)
    entry = graph.meta.num_features * width / _GATHER_COST + (edges * graph.meta.num_features if layers.start else 0)
    hidden = [3 * (width * width / _GATHER_COST + edges * width)] * len(layers)
    costs = [2 * entry, *hidden]
    costs[-1] += 3 * width * graph.meta.num_classes / _GATHER_COST
    return costs


def make_specs(
    *,
    graph: GraphStore,
    chunks: ChunkStore,
    scratch: Path,
    weights: Path,
    model: nn.Module,
    model_config: ModelConfig,
    train: TrainConfig,
    chunked: ChunkedConfig,
    features: Sequence[FeatureSpec],
    recompute: bool,
    history_memory: int,
    feed_memory: int = 0,
    threads: int = 1,
    dtype: Literal["float32", "float64"] = "float32",
    poison: bool = False,
    units: Sequence[range] | None = None,
    replicas: int = 1,
) -> list[RankSpec]:
    """One spec per rank; `history_memory` and `feed_memory` are for each. `features` are by part, of every replica.

    ValueError where the chunks were cut for other numbers of chunks or parts, or there are more stages than units.
    """
    layout = Layout(chunked.stages, chunked.parts, replicas)
    meta = chunks.meta
    if len(features) != layout.parts * replicas:
        raise ValueError(f"{len(features)} features for {replicas} replicas of {layout.parts} parts; give one for each")
    if meta.num_parts != layout.parts:
        raise ValueError(f"{chunks.path} has {meta.num_parts} parts, parts={layout.parts}; cut the graph again")
    units = units or split_stages(unit_costs(model, graph), layout.stages)
    return [
        RankSpec(
            rank=rank,
            layout=layout,
            units=tuple((unit.start, unit.stop) for unit in units),
            first_hidden=first_hidden(model),
            graph=graph.path,
            chunks=chunks.path,
            scratch=scratch,
            weights=weights,
            model=model_config,
            train=train,
            chunked=chunked,
            features=features[rank // layout.stages],
            recompute=recompute,
            history_memory=history_memory,
            feed_memory=feed_memory if layout.stage_of(rank) == 0 else 0,
            threads=threads,
            device=train.device,
            dtype=dtype,
            poison=poison,
        )
        for rank in range(layout.num_ranks)
    ]
