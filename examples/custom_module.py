"""Train your own module: it gets the blocks of an item and the features of its input nodes.

Here neighbours are mixed by a learned gate between their mean and their maximum. On a dataset of yours:

    penstock train DATASET --run-dir RUN --set model.kind=custom --set model.module=custom_module:GatedNet
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from penstock.engine.aggregate import aggregate_max, aggregate_mean
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.minibatch import Block
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.generate import GenerateConfig, generate_graph

MEMORY = 256 << 20


class GatedConv(nn.Module):
    """gate * mean + (1 - gate) * max of the neighbours, beside the node itself."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(in_features))
        self.linear = nn.Linear(2 * in_features, out_features)

    def forward(self, block: Block, x: Tensor) -> Tensor:
        """x has a row per source of the block, the result one per destination."""
        neighbours = torch.lerp(aggregate_max(block, x), aggregate_mean(block, x), self.gate.sigmoid())
        return self.linear(torch.cat([x[: block.num_dst], neighbours], dim=1))


class GatedNet(nn.Module):
    """Two layers; `layer_forward` lets `penstock infer` and exact evaluation go layer by layer."""

    def __init__(self, num_features: int, num_classes: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList([GatedConv(num_features, hidden), GatedConv(hidden, num_classes)])

    def layer_forward(self, layer: int, block: Block, x: Tensor) -> Tensor:
        """One layer with all that belongs to it."""
        x = self.layers[layer](block, x)
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
    model = GatedNet(graph.meta.num_features, graph.meta.num_classes)
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
