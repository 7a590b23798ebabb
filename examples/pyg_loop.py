"""Train an unmodified model of PyG out of core, score it on the test split, and write embeddings of all nodes.

The features take 41 MB, and the feed gets 20 MiB: what does not fit is read from packs.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn import functional
from torch_geometric.nn import GraphSAGE

import penstock

SAMPLING: dict[str, Any] = {"num_neighbors": [10, 5], "batch_size": 32, "host_memory": "20MiB"}


@torch.no_grad()
def outputs(
    model: GraphSAGE, graph: penstock.GraphStore, folder: Path, split: Any
) -> Iterator[tuple[Any, torch.Tensor]]:
    """The batches of a split, and the model's outputs for their seeds."""
    model.eval()
    with penstock.open_feed(graph, folder, split=split, epochs=1, **SAMPLING) as loader:
        for data in map(penstock.MiniBatch.to_pyg, loader):
            yield data, model(data.x, data.edge_index)[: data.batch_size]


def main(folder: Path) -> None:
    """Generate a graph, train, and print the loss per epoch, the accuracy and what was written."""
    torch.manual_seed(0)
    config = penstock.GenerateConfig(num_nodes=20_000, num_features=512)
    graph = penstock.generate_graph(folder / "graph", config, host_memory="256MiB")
    model = GraphSAGE(graph.num_features, 64, num_layers=2, out_channels=graph.num_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    with penstock.open_feed(graph, folder / "feeds", **SAMPLING) as loader:
        for epoch in range(8):
            for data in map(penstock.MiniBatch.to_pyg, loader):
                loss = functional.cross_entropy(model(data.x, data.edge_index)[: data.batch_size], data.y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            print(f"epoch {epoch} loss {loss.item():.3f}")
    scored = outputs(model, graph, folder / "feeds", "test")
    right = sum(int((scores.argmax(dim=1) == data.y).sum()) for data, scores in scored)
    print(f"test accuracy {right / graph.num_seeds('test'):.3f}")
    parts = (
        (data.n_id[: data.batch_size], {"scores": scores})
        for data, scores in outputs(model, graph, folder / "feeds", "all")
    )
    print(penstock.write_nodes(graph, folder / "scores.parquet", parts), "nodes written")


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        main(Path(name))
