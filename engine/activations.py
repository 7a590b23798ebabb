"""How much memory a training step takes beside weights and batch, found on a small item of the same proportions.

What a step allocates is proportional to the rows and edges of its blocks, so a step on a fraction of them, whose live
tensors are counted as they come and go, tells what a whole one takes, for any model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from penstock.engine.blockcache import BlockCache
from penstock.engine.livebytes import LiveBytes
from penstock.engine.metrics import node_loss
from penstock.engine.minibatch import Block

_SAMPLE_ROWS = 1 << 13  # of the largest block: some milliseconds
BlockSizes = tuple[int, int, int]  # sources, destinations, edges


def _blocks(sizes: Sequence[BlockSizes], scale: float, num_weights: int) -> list[Block]:
    """Blocks of these sizes, scaled down, with edges that start anywhere."""
    nodes = [max(1, round(scale * count)) for count in (sizes[0][0], *(num_dst for _, num_dst, _ in sizes))]
    generator, blocks = torch.Generator().manual_seed(0), []
    for (_, _, num_edges), num_src, num_dst in zip(sizes, nodes, nodes[1:], strict=False):
        count, num_src = max(1, round(scale * num_edges)), max(num_src, num_dst)
        indptr = (torch.arange(num_dst + 1) * count // num_dst).to(torch.int32)
        indices = torch.randint(num_src, (count,), generator=generator, dtype=torch.int32)
        blocks.append(
            Block(
                num_src=num_src,
                num_dst=num_dst,
                indptr=indptr,
                indices=indices,
                edge_weights=torch.ones(count) if num_weights > 0 else None,
                draw_weights=torch.ones(count) if num_weights > 1 else None,
                src_degrees=torch.ones(num_src, dtype=torch.int32),
                cache=BlockCache(),
            )
        )
    return blocks


def _peak(
    model: nn.Module, blocks: list[Block], num_features: int, num_classes: int, *, multi_label: bool, train: bool
) -> int:
    """The most that one step holds, gradients of weights included."""
    features = torch.randn(blocks[0].num_src, num_features, generator=torch.Generator().manual_seed(0))
    seeds = blocks[-1].num_dst
    labels = torch.zeros(seeds, num_classes) if multi_label else torch.zeros(seeds, dtype=torch.int64)
    structure = [tensor for block in blocks for tensor in (block.indptr, block.indices, block.edge_weights)]
    structure += [tensor for block in blocks for tensor in (block.draw_weights, block.src_degrees)]
    known = [features, labels, *model.parameters(), *model.buffers(), *(t for t in structure if t is not None)]
    live = LiveBytes(known)
    try:
        with torch.random.fork_rng([]), live, torch.set_grad_enabled(train):
            loss = node_loss(model(blocks, features), labels)
            if train:
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
    finally:
        model.zero_grad(set_to_none=True)
    return live.peak


def step_bytes(
    model: nn.Module,
    sizes: Sequence[BlockSizes],
    num_features: int,
    num_classes: int,
    *,
    multi_label: bool,
    train: bool,
    num_weights: int = 0,
) -> int:
    """Bytes that forward and, where `train`, backward pass hold at most, on blocks of these sizes, input side first.

    Neither weights, their gradients nor the batch count: what does not grow with the blocks is left out. Edges carry
    `num_weights` values: none, their own weight, and what each counts where they are drawn by it. The model is on the
    CPU; its mode and buffers are as before, its gradients are gone.
    """
    full = min(1.0, _SAMPLE_ROWS / max(1, max(count for size in sizes for count in size)))
    was_training, buffers = model.training, [buffer.clone() for buffer in model.buffers()]
    options: dict[str, Any] = {"multi_label": multi_label, "train": train}
    model.train(train)
    try:
        whole, half = (
            _peak(model, _blocks(sizes, scale, num_weights), num_features, num_classes, **options)
            for scale in (full, full / 2)
        )
    finally:
        model.train(was_training)
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return int(2 * max(0, whole - half) / full)
