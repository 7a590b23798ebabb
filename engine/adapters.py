"""Mini-batches as DGL and PyG users know them; both libraries are imported on first use only.

DGL's message flow graphs are our blocks, so they convert without a copy. PyG has one graph per batch that all layers
share; what our layers sampled is united into it, each edge once, at the hop that first drew it. Where a layer takes all
neighbours the two are the same; where it samples, a PyG layer sees for a seed what every hop drew for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

    `blocks[0].srcdata["feat"]` and `blocks[-1].dstdata["label"]` are set, `dgl.NID` on both sides of every block,
    `srcdata["degree"]` and `edata["weight"]` where the trace has them. Structure is int32; node ids are int64.
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
    if block.edge_weights is not None:
        made.edata["weight"] = block.edge_weights
    return made


def to_pyg(batch: "MiniBatch") -> Any:
    """Make what `torch_geometric.loader.NeighborLoader` yields, as a `Data` that `trim_to_layer` understands.

    `x`, `edge_index` int64 [2, E] (row 0 source, row 1 target, hop by hop from the seeds outwards), `n_id`, `y` (of
    the seeds, which come first), `batch_size`, `num_sampled_nodes`, `num_sampled_edges`; `edge_weight` and `degree`
    where the trace has them.
    """
    data = require("torch_geometric.data", "pyg").Data
    hops = _hops(batch)
    weights = [weight for _, weight in hops if weight is not None]
    frontiers = [block.num_src - block.num_dst for block in reversed(batch.blocks)]
    extra: dict[str, Any] = {"edge_weight": torch.cat(weights)} if weights else {}
    if batch.degrees is not None:
        extra["degree"] = batch.degrees
    return data(
        x=batch.features,
        edge_index=torch.cat([edges for edges, _ in hops], dim=1),
        y=batch.labels,
        n_id=batch.input_ids.long(),
        batch_size=batch.num_seeds,
        num_sampled_nodes=[batch.num_seeds, *frontiers],
        num_sampled_edges=[edges.shape[1] for edges, _ in hops],
        **extra,
    )


def _hops(batch: "MiniBatch") -> list[tuple[Tensor, Tensor | None]]:
    """Per hop from the seeds outwards, the edges [2, n] that no earlier hop drew, and their weights."""
    num_inputs = len(batch.input_ids)
    seen = np.empty(0, np.int64)
    hops = []
    for block in reversed(batch.blocks):
        source = block.indices.long()
        target = torch.repeat_interleave(torch.arange(block.num_dst, device=source.device), block.indptr.diff().long())
        keys = (target * num_inputs + source).cpu().numpy()
        fresh = torch.from_numpy(~np.isin(keys, seen)).to(source.device)
        weights = None if block.edge_weights is None else block.edge_weights[fresh]
        hops.append((torch.stack([source[fresh], target[fresh]]), weights))
        seen = np.concatenate([seen, keys])
    return hops
