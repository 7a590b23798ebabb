"""Train layers of DGL: a block of ours is a message flow graph of theirs, without a copy."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dgl
import torch
from torch import Tensor, nn

from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.minibatch import Block
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.generate import GenerateConfig, generate_graph

MEMORY = 256 << 20


def as_dgl_block(block: Block) -> Any:
    """Share a block's arrays with DGL; `MiniBatch.to_dgl()` does all blocks of a batch, with ids and features."""
    csc = ("csc", (block.indptr, block.indices, torch.empty(0, dtype=torch.int32)))
    return dgl.create_block(csc, num_src_nodes=block.num_src, num_dst_nodes=block.num_dst)


class DglNet(nn.Module):
    """Two of DGL's SAGE layers."""

    def __init__(self, num_features: int, num_classes: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [dgl.nn.SAGEConv(num_features, hidden, "mean"), dgl.nn.SAGEConv(hidden, num_classes, "mean")]
        )

    def layer_forward(self, layer: int, block: Block, x: Tensor) -> Tensor:
        """One layer with all that belongs to it; exact evaluation calls this."""
        x = self.layers[layer](as_dgl_block(block), (x, x[: block.num_dst]))
        return torch.relu(x) if layer == 0 else x

    def forward(self, blocks: Sequence[Block], x: Tensor) -> Tensor:
        """Scores of the seeds."""
        for layer, block in enumerate(blocks):
            x = self.layer_forward(layer, block, x)
        return x


def main(folder: Path) -> None:
    """Generate a graph, sample it, train, and print the loss per epoch."""
    torch.manual_seed(0)
    graph = generate_graph(folder / "graph", GenerateConfig(num_nodes=5000, num_features=32), host_memory=MEMORY)
    config = SampleConfig(fanouts=(5, 10), batch_size=100)
    trace = sample_trace(graph, folder / "trace", config, num_epochs=8, host_memory=MEMORY, threads=2)
    model = DglNet(graph.meta.num_features, graph.meta.num_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with open_memory_feed(graph, trace, start_step=0, stop_step=trace.meta.num_items) as feed:
        for batch in feed:
            loss = nn.functional.cross_entropy(model(batch.blocks, batch.features), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (batch.step + 1) % trace.meta.items_per_epoch == 0:
                print(f"epoch {batch.epoch} loss {loss.item():.3f}")


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        main(Path(name))
