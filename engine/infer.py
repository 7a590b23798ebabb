"""Write embeddings and predictions of a trained model to Parquet, under the user's own node ids."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penstock.engine.exact import LayerTable, exact_tables
from penstock.engine.layered import uses_initial
from penstock.engine.minibatch import MiniBatch
from penstock.engine.models import count_layers, layer_forward
from penstock.engine.outputs import Outputs
from penstock.storage.budget import require_free_disk
from penstock.storage.export import ColumnType, NodeTableWriter
from penstock.storage.graph import GraphStore
from penstock.storage.npyfile import drop_pages
from penstock.storage.progress import Progress, silent

_ROWS = 1 << 16  # rows per group of the Parquet file
_Rows = NDArray[np.float32]
_Part = tuple[NDArray[Any], _Rows | None, _Rows]  # node ids, embeddings where there are any, logits


def _choose_layer(model: nn.Module, embedding_layer: int | None) -> int:
    num_layers = count_layers(model)
    layer = max(1, num_layers - 1) if embedding_layer is None else embedding_layer
    if not 1 <= layer <= num_layers:
        raise ValueError(f"embedding_layer={layer} is not among the model's layers 1..{num_layers}")
    return layer


def _embedding_width(model: nn.Module, layer: int, columns: int) -> int:
    """Columns of a layer's rows that are its own; between layers initial rows may lie behind them."""
    return columns // 2 if uses_initial(model) and layer < count_layers(model) else columns


def _write(
    graph: GraphStore, out: Path, widths: tuple[int | None, int], parts: Iterator[_Part], outputs: Outputs
) -> int:
    embedding_width, num_classes = widths
    columns: dict[str, ColumnType] = {} if embedding_width is None else {"embedding": ("float32", embedding_width)}
    columns |= {"logits": ("float32", num_classes), "prediction": outputs.column(num_classes)}
    with NodeTableWriter(out, graph, columns) as writer:
        for ids, embeddings, logits in parts:
            values = {"embedding": embeddings, "logits": logits, "prediction": outputs.predictions(logits)}
            writer.append(ids, {name: value for name, value in values.items() if value is not None})
    return writer.num_rows


def _table_parts(
    embeddings: LayerTable, logits: LayerTable, nodes: NDArray[Any] | None, num_nodes: int
) -> Iterator[tuple[NDArray[Any], _Rows, _Rows]]:
    embedding_rows, logit_rows = embeddings.open(), logits.open()
    total = num_nodes if nodes is None else len(nodes)
    for lo in range(0, total, _ROWS):
        ids = np.arange(lo, min(lo + _ROWS, total)) if nodes is None else nodes[lo : lo + _ROWS]
        yield ids, embedding_rows[embeddings.positions(ids)], logit_rows[logits.positions(ids)]
        for rows in (embedding_rows, logit_rows):
            drop_pages(rows)


def infer_to_parquet(
    model: nn.Module,
    graph: GraphStore,
    out: Path,
    scratch: Path,
    *,
    host_memory: int,
    threads: int,
    device: torch.device | str = "cpu",
    nodes: NDArray[Any] | None = None,
    embedding_layer: int | None = None,
    outputs: Outputs | None = None,
    progress: Progress = silent,
) -> int:
    """Write `id, embedding, logits, prediction` for `nodes` (ascending; all by default), exact over all neighbours.

    The embedding is the output of layer `embedding_layer` (1 is the first), by default the last but one, or the logits
    where the model has one layer. Returns the number of rows. Memory, disk and resuming are as for `exact_tables`.
    `outputs` says what the model's outputs mean, where it was trained on another graph.
    """
    layer = _choose_layer(model, embedding_layer)
    nodes = None if nodes is None else np.unique(nodes)
    with exact_tables(
        model,
        graph,
        scratch,
        host_memory=host_memory,
        threads=threads,
        device=device,
        targets=nodes,
        progress=progress,
    ) as logits:
        embeddings = logits.below(layer)
        num_rows = graph.num_nodes if nodes is None else len(nodes)
        require_free_disk(out.parent, num_rows * 4 * (embeddings.width + logits.width), f"the node table {out.name}")
        parts = _table_parts(embeddings, logits, nodes, graph.num_nodes)
        width = _embedding_width(model, layer, embeddings.width)
        own = ((ids, np.ascontiguousarray(rows[:, :width]), scores) for ids, rows, scores in parts)
        return _write(graph, out, (width, logits.width), own, outputs or Outputs.of(graph))


@torch.no_grad()
def infer_feed_to_parquet(
    model: nn.Module,
    graph: GraphStore,
    out: Path,
    feed: Iterable[MiniBatch],
    *,
    by_layer: bool = True,
    embedding_layer: int | None = None,
    outputs: Outputs | None = None,
) -> int:
    """As `infer_to_parquet`, for the seeds of a feed, over the neighbours that were sampled for them.

    Without `by_layer` the model is called as a whole, as any can be. Embeddings are then what its `embed(blocks, x)`
    gives, [B, H]; there are none where it has no such method.
    """
    embed = _embed_by_layer(model, embedding_layer) if by_layer else _embed_as_a_whole(model)
    was_training, device = model.training, next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        on_device = (batch if batch.features.device.type == device.type else batch.to(device) for batch in feed)
        parts = ((batch.seeds.cpu().numpy().copy(), *map(_rows, embed(batch))) for batch in on_device)
        first = next(parts, None)
        if first is None:
            raise ValueError("the feed has no items, so there is nothing to write; choose a split that has nodes")
        widths = (None if first[1] is None else first[1].shape[1], first[2].shape[1])
        return _write(graph, out, widths, chain([first], parts), outputs or Outputs.of(graph))
    finally:
        model.train(was_training)


def _rows(x: Tensor | None) -> Any:
    return None if x is None else x.float().cpu().numpy().copy()


_Embed = Callable[[MiniBatch], tuple[Tensor | None, Tensor]]


def _embed_by_layer(model: nn.Module, embedding_layer: int | None) -> _Embed:
    layer = _choose_layer(model, embedding_layer)

    def embed(batch: MiniBatch) -> tuple[Tensor, Tensor]:
        x = batch.features
        for n, block in enumerate(batch.blocks):
            x = layer_forward(model, n, block, x)
            if n + 1 == layer:
                embeddings = x[: batch.num_seeds, : _embedding_width(model, layer, x.shape[1])].clone()
        return embeddings, x

    return embed


def _embed_as_a_whole(model: nn.Module) -> _Embed:
    own = getattr(model, "embed", None)

    def embed(batch: MiniBatch) -> tuple[Tensor | None, Tensor]:
        embeddings = None if own is None else own(batch.blocks, batch.features)
        wanted = batch.num_seeds
        if embeddings is not None and (embeddings.ndim != 2 or len(embeddings) != wanted):
            raise ValueError(
                f"{type(model).__name__}.embed(blocks, x) returned {list(embeddings.shape)} for {wanted} seeds; return "
                "a row per destination of blocks[-1] (docs/models.md)"
            )
        return embeddings, model(batch.blocks, batch.features)

    return embed
