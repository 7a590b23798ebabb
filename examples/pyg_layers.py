"""Train layers of PyG: its convolutions take a pair of source and destination rows, and the edges between them."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch_geometric.nn import SAGEConv

from penstock.engine.aggregate import edge_destinations
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.minibatch import Block
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.generate import GenerateConfig, generate_graph

MEMORY = 256 << 20


def as_edge_index(block: Block) -> Tensor:
    """Edges int64 [2, E]: source and destination; `MiniBatch.to_pyg()` makes one graph of all blocks instead."""
    return torch.stack([block.indices.long(), edge_destinations(block)])


class PygNet(nn.Module):
    """Two of PyG's SAGE layers."""

    def __init__(self, num_features: int, num_classes: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList([SAGEConv(num_features, hidden), SAGEConv(hidden, num_classes)])

    def layer_forward(self, layer: int, block: Block, x: Tensor) -> Tensor:
        """One layer with all that belongs to it; exact evaluation calls this."""
        x = self.layers[layer]((x, x[: block.num_dst]), as_edge_index(block))
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
    model = PygNet(graph.meta.num_features, graph.meta.num_classes)
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
