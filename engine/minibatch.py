"""What a trainer gets per step: blocks, features, labels and ids of one item, as torch tensors.

Letters: B seeds, M input nodes, E edges of a block, F features, C classes of a multi-label task.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from penstock.engine.adapters import to_dgl, to_pyg
from penstock.engine.blockcache import BlockCache
from penstock.engine.dropout import Draws

_Held = TypeVar("_Held", "Block", "MiniBatch")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """One bipartite layer in CSC; destinations are the first `num_dst` of the `num_src` sources.

    `indptr` int32 [num_dst+1], `indices` int32 [E] in [0, num_src), `edge_weights` float32 [E] or None;
    `draw_weights` float32 [E], of neighbours drawn by weight, are what each counts: sums with them estimate the sums
    with `edge_weights` over all neighbours;
    `src_degrees` int32 [num_src] are in-degrees in the whole graph, None where the trace did not record them;
    `src_loops` int32 [num_src] of these are edges from the node to itself, None where only the block's own edges are.
    `draws` says from what dropout draws, None for torch's generator; `cache` keeps what is derived from the structure.
    """

    num_src: int
    num_dst: int
    indptr: Tensor
    indices: Tensor
    edge_weights: Tensor | None = None
    draw_weights: Tensor | None = None
    src_degrees: Tensor | None = None
    src_loops: Tensor | None = None
    draws: Draws | None = None
    cache: BlockCache | None = None

    def __repr__(self) -> str:
        weights = ", with weights" if self.edge_weights is not None else ""
        return f"Block({self.num_src:,} sources, {self.num_dst:,} destinations, {self.num_edges:,} edges{weights})"

    @property
    def num_edges(self) -> int:
        """E."""
        return len(self.indices)

    @property
    def dst_degrees(self) -> Tensor | None:
        """In-degrees int32 [num_dst] of the destinations in the whole graph, or None."""
        return None if self.src_degrees is None else self.src_degrees[: self.num_dst]

    def to(self, device: torch.device | str) -> "Block":
        """Move every tensor; no copy where they are there already. What was cached is made again there."""
        return self._map(lambda tensor: _move(tensor, device))

    def clone(self) -> "Block":
        """Copy every tensor."""
        return self._map(torch.clone)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Block":
        moved = _map_tensors(self, function)
        draws = self.draws and replace(self.draws, src_ids=function(self.draws.src_ids))
        stays = self.cache is None or moved.indptr is self.indptr
        return replace(moved, draws=draws, cache=self.cache if stays else BlockCache())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MiniBatch:
    """One item with its features. From a feed, its tensors are views of reused buffers: valid until the next `next()`,
    or the feed's end; asked for later, they raise RuntimeError. `clone()` makes a batch that lasts.

    `input_ids` int32 or int64 [M], the seeds first; `labels` int64 [B] (-1 unknown) or float32 [B, C];
    `blocks[0]` is the input side; `features` float32 [M, F], row n of node `input_ids[n]`.
    """

    step: int
    item: int
    epoch: int
    num_seeds: int
    input_ids: Tensor
    labels: Tensor
    blocks: tuple[Block, ...]
    features: Tensor

    def __repr__(self) -> str:
        shape = " x ".join(f"{size:,}" for size in self.features.shape)
        return f"MiniBatch(step {self.step:,}: {self.num_seeds:,} seeds, features {shape}, {list(self.blocks)})"

    @property
    def seeds(self) -> Tensor:
        """Node ids int64 [B] that the item computes outputs for."""
        return self.input_ids[: self.num_seeds].long()

    @property
    def degrees(self) -> Tensor | None:
        """In-degrees int32 [M] of the input nodes in the whole graph, or None where the trace did not record them."""
        return self.blocks[0].src_degrees

    def to(self, device: torch.device | str) -> "MiniBatch":
        """Move every tensor; no copy where they are there already."""
        blocks = tuple(block.to(device) for block in self.blocks)
        return replace(_map_tensors(self, lambda tensor: _move(tensor, device)), blocks=blocks)

    def clone(self) -> "MiniBatch":
        """Copy every tensor, so that the batch outlives the feed's next step."""
        return replace(_map_tensors(self, torch.clone), blocks=tuple(block.clone() for block in self.blocks))

    def expire(self) -> None:
        """Forget all tensors: their memory is about to be another batch's."""
        for name in _LENT:
            object.__delattr__(self, name)

    if not TYPE_CHECKING:  # a checker that sees it takes any name for one of ours

        def __getattr__(self, name: str) -> Any:
            """Called for what `expire` took."""
            if name not in _LENT:
                raise AttributeError(f"a MiniBatch has no attribute {name!r}")
            raise RuntimeError(
                f"the feed has taken back {name} of step {self.step}: a batch is valid until the next one is asked for "
                "or the feed is closed; use batch.clone() to keep it longer"
            )

    def record_stream(self, stream: Any) -> None:
        """Tell CUDA's allocator that a stream reads all tensors: else their memory is reused before it has."""
        _map_tensors(self, lambda tensor: _record(tensor, stream))
        for block in self.blocks:
            _map_tensors(block, lambda tensor: _record(tensor, stream))

    def to_dgl(self) -> tuple[Tensor, Tensor, list[Any]]:
        """As DGL's loader yields it: input nodes, output nodes, blocks.

        `blocks[0].srcdata["feat"]` and `blocks[-1].dstdata["label"]` are set, `dgl.NID` on both sides of every block.
        """
        return to_dgl(self)

    def to_pyg(self) -> Any:
        """As PyG's `NeighborLoader` yields it, a `Data`.

        `x`, `edge_index` int64 [2, E], `n_id`, `y` (of the seeds, which come first), `batch_size`, `num_sampled_nodes`
        and `num_sampled_edges` for `trim_to_layer`; `edge_weight` where the graph has weights.
        """
        return to_pyg(self)


_LENT = ("input_ids", "labels", "blocks", "features")


def _move(tensor: Tensor, device: torch.device | str) -> Tensor:
    # Towards the host, torch would return before the bytes are there.
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def _record(tensor: Tensor, stream: Any) -> Tensor:
    tensor.record_stream(stream)
    return tensor


def _map_tensors(value: _Held, function: Callable[[Tensor], Tensor]) -> _Held:
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    changed: dict[str, Any] = {name: function(held) for name, held in found.items() if isinstance(held, Tensor)}
    return replace(value, **changed)
