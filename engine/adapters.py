"""Mini-batches as DGL and PyG users know them; both libraries are imported on first use only.

DGL's message flow graphs are our blocks, so they convert without a copy. PyG has one graph per batch that all layers
share; what our layers sampled is united into it, each edge once, at the hop that first drew it. Where a layer takes all
neighbours the two are the same; where it samples, a PyG layer sees for a seed what every hop drew for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.storage.errors import MissingDependency
from penstock.storage.extras import install_command

if TYPE_CHECKING:
    from penstock.engine.minibatch import Block, MiniBatch


def require(module: str, extra: str) -> Any:
    """Import an optional library; MissingDependency names the command that brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependency(f"this needs {module} ({error}); {install_command(extra)}") from error


def to_dgl(batch: "MiniBatch") -> tuple[Tensor, Tensor, list[Any]]:
    """Make what `dgl.dataloading.DataLoader` yields: (input nodes, output nodes, blocks), sharing our memory.

    `blocks[0].srcdata["feat"]` and `blocks[-1].dstdata["label"]` are set, `dgl.NID` on both sides of every block;
    `srcdata["degree"]`, `srcdata["self_loops"]`, `edata["weight"]` and `edata["draw_weight"]` (what each draw by weight
    counts) where the trace has them, see `Block`. Structure is int32; node ids are int64.
    """
    dgl = require("dgl", "dgl")
    input_nodes = batch.input_ids.long()
    blocks = [_dgl_block(dgl, block, input_nodes) for block in batch.blocks]
    blocks[0].srcdata["feat"] = batch.features
    blocks[-1].dstdata["label"] = batch.labels
    return input_nodes, input_nodes[: batch.num_seeds], blocks


def _dgl_block(dgl: Any, block: "Block", input_nodes: Tensor) -> Any:
    csc = ("csc", (block.indptr, block.indices, torch.empty(0, dtype=torch.int32, device=block.indices.device)))
    made = dgl.create_block(csc, num_src_nodes=block.num_src, num_dst_nodes=block.num_dst)
    made.srcdata[dgl.NID] = input_nodes[: block.num_src]
    made.dstdata[dgl.NID] = input_nodes[: block.num_dst]
    if block.src_degrees is not None:
        made.srcdata["degree"] = block.src_degrees
    if block.src_loops is not None:
        made.srcdata["self_loops"] = block.src_loops
    for name, values in (("weight", block.edge_weights), ("draw_weight", block.draw_weights)):
        if values is not None:
            made.edata[name] = values
    return made


def to_pyg(batch: "MiniBatch") -> Any:
    """Make what `torch_geometric.loader.NeighborLoader` yields, as a `Data` that `trim_to_layer` understands.

    `x`, `edge_index` int64 [2, E] (row 0 source, row 1 target, hop by hop from the seeds outwards), `n_id`, `y` (of
    the seeds, which come first), `batch_size`, `num_sampled_nodes`, `num_sampled_edges`; `edge_weight`, `draw_weight`,
    `degree` and `self_loops` where the trace has them, see `Block`. Sums with `draw_weight` estimate those over all
    neighbours within the edges of one hop; over edges of several hops, take means.
    """
    data = require("torch_geometric.data", "pyg").Data
    hops = _hops(batch)
    frontiers = [block.num_src - block.num_dst for block in reversed(batch.blocks)]
    by_edge = {"edge_weight": [hop.weights for hop in hops], "draw_weight": [hop.draw_weights for hop in hops]}
    by_node = {"degree": batch.degrees, "self_loops": batch.blocks[0].src_loops}
    extra: dict[str, Any] = {name: values for name, values in by_node.items() if values is not None}
    for name, values in by_edge.items():
        if found := [value for value in values if value is not None]:
            extra[name] = torch.cat(found)
    return data(
        x=batch.features,
        edge_index=torch.cat([hop.edges for hop in hops], dim=1),
        y=batch.labels,
        n_id=batch.input_ids.long(),
        batch_size=batch.num_seeds,
        num_sampled_nodes=[batch.num_seeds, *frontiers],
        num_sampled_edges=[hop.edges.shape[1] for hop in hops],
        **extra,
    )


class _Hop(NamedTuple):
    """Edges [2, n] that no hop nearer to the seeds drew."""

    edges: Tensor
    weights: Tensor | None
    draw_weights: Tensor | None


def _hops(batch: "MiniBatch") -> list[_Hop]:
    """Hop by hop from the seeds outwards."""
    num_inputs = len(batch.input_ids)
    seen = np.empty(0, np.int64)
    hops = []
    for block in reversed(batch.blocks):
        source = block.indices.long()
        target = torch.repeat_interleave(torch.arange(block.num_dst, device=source.device), block.indptr.diff().long())
        keys = (target * num_inputs + source).cpu().numpy()
        fresh = torch.from_numpy(~np.isin(keys, seen)).to(source.device)
        values = (None if found is None else found[fresh] for found in (block.edge_weights, block.draw_weights))
        hops.append(_Hop(torch.stack([source[fresh], target[fresh]]), *values))
        seen = np.concatenate([seen, keys])
    return hops
