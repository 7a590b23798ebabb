"""A deep model of your own: an encoder, layers that each keep part of what they get, and a head.

Such a model trains on samples, as here, and on the whole graph chunk by chunk, because its parts can be run one by one:

    penstock train DATASET --run-dir RUN --fanouts 5,5,5,5 --set model.kind=custom \
        --set model.module=deep_custom_model:DeepNet

`layers` are called `(block, x)`, x with a row per source of the block. Dropout is `NodeDropout`, called `(block, x)`
too: what a node loses then does not depend on how the graph is cut. `LayeredModel` makes `forward` of the parts.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from penstock.engine.aggregate import aggregate_mean
from penstock.engine.dropout import NodeDropout
from penstock.engine.layered import LayeredModel
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.minibatch import Block
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.generate import GenerateConfig, generate_graph

MEMORY = 256 << 20


class HighwayConv(nn.Module):
    """gate * what the neighbours say + (1 - gate) * what the node has; a gate per node, learned."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.norm = NodeDropout(dropout), nn.LayerNorm(width)
        self.linear, self.gate = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, block: Block, x: Tensor) -> Tensor:
        """A row per destination; the first sources of a block are its destinations."""
        own = x[: block.num_dst]
        neighbours = aggregate_mean(block, self.dropout(block, self.norm(x)))
        return torch.lerp(own, torch.relu(self.linear(neighbours)), self.gate(own).sigmoid())


class DeepNet(LayeredModel):
    """As many layers as you like; on samples, as many as there are fanouts."""

    def __init__(
        self, num_features: int, num_classes: int, num_layers: int = 4, width: int = 64, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.encoder = nn.Linear(num_features, width)
        self.layers = nn.ModuleList(HighwayConv(width, dropout) for _ in range(num_layers))
        self.head = nn.Linear(width, num_classes)


def main(folder: Path) -> None:
    """Generate a graph, sample it four hops deep, train, and print the loss per epoch."""
    torch.manual_seed(0)
    graph = generate_graph(folder / "graph", GenerateConfig(num_nodes=5000, num_features=32), host_memory=MEMORY)
    config = SampleConfig(fanouts=(2, 2, 2, 3), batch_size=100)
    trace = sample_trace(graph, folder / "trace", config, num_epochs=8, host_memory=MEMORY, threads=2)
    model = DeepNet(graph.meta.num_features, graph.meta.num_classes)
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
