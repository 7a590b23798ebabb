"""Train an unmodified model of DGL out of core, score it on the test split, and write embeddings of all nodes.

The features take 41 MB, and the feed gets 20 MiB: what does not fit is read from packs.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dgl
import torch
from torch import Tensor, nn
from torch.nn import functional

import penstock

SAMPLING: dict[str, Any] = {"fanouts": [5, 10], "batch_size": 32, "host_memory": "20MiB"}


class SAGE(nn.Module):
    """As in DGL's examples."""

    def __init__(self, num_features: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [dgl.nn.SAGEConv(num_features, hidden, "mean"), dgl.nn.SAGEConv(hidden, num_classes, "mean")]
        )

    def forward(self, blocks: list[Any], x: Tensor) -> Tensor:
        """Scores of the seeds."""
        return self.layers[1](blocks[1], torch.relu(self.layers[0](blocks[0], x)))


@torch.no_grad()
def outputs(
    model: SAGE, graph: penstock.GraphStore, folder: Path, split: Any
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids, labels and outputs of the nodes of a split."""
    model.eval()
    with penstock.open_feed(graph, folder, split=split, epochs=1, **SAMPLING) as loader:
        for _, seeds, blocks in map(penstock.MiniBatch.to_dgl, loader):
            yield seeds, blocks[-1].dstdata["label"], model(blocks, blocks[0].srcdata["feat"])


def main(folder: Path) -> None:
    """Generate a graph, train, and print the loss per epoch, the accuracy and what was written."""
    torch.manual_seed(0)
    config = penstock.GenerateConfig(num_nodes=20_000, num_features=512)
    graph = penstock.generate_graph(folder / "graph", config, host_memory="256MiB")
    model = SAGE(graph.num_features, 64, graph.num_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    with penstock.open_feed(graph, folder / "feeds", **SAMPLING) as loader:
        for epoch in range(8):
            for _, _, blocks in map(penstock.MiniBatch.to_dgl, loader):
                loss = functional.cross_entropy(model(blocks, blocks[0].srcdata["feat"]), blocks[-1].dstdata["label"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            print(f"epoch {epoch} loss {loss.item():.3f}")
    right = sum(
        int((scores.argmax(dim=1) == labels).sum())
        for _, labels, scores in outputs(model, graph, folder / "feeds", "test")
    )
    print(f"test accuracy {right / graph.num_seeds('test'):.3f}")
    parts = ((seeds, {"scores": scores}) for seeds, _, scores in outputs(model, graph, folder / "feeds", "all"))
    print(penstock.write_nodes(graph, folder / "scores.parquet", parts), "nodes written")


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        main(Path(name))
