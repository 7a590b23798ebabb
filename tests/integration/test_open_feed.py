"""Loops of one's own, by `import penstock` alone: feeds of a graph, and tables of what was computed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import penstock
from penstock.storage.errors import InUse

OPTIONS: dict[str, Any] = {"fanouts": (3, 4), "batch_size": 20, "threads": 1, "host_memory": "12MiB"}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> penstock.GraphStore:
    path = tmp_path_factory.mktemp("feeds") / "graph"
    config = penstock.GenerateConfig(
        num_nodes=4000, num_features=1024, num_classes=3, avg_degree=5, train=0.1, test=0.2
    )
    return penstock.generate_graph(path, config, host_memory=64 << 20)


def tensors(batch: penstock.MiniBatch) -> list[torch.Tensor]:
    blocks = [tensor for block in batch.blocks for tensor in (block.indptr, block.indices)]
    return [batch.input_ids, batch.labels, batch.features, *blocks]


def epochs(loader: penstock.Loader, count: int) -> Iterator[list[list[torch.Tensor]]]:
    for _ in range(count):
        yield [[tensor.clone() for tensor in tensors(batch)] for batch in loader]


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"host_memory": "6MiB"}, "reuse"),
        pytest.param({"host_memory": "6MiB", "disk": "6MiB"}, "rolling", marks=pytest.mark.slow),
    ],
)
def test_batches_are_those_with_all_features_in_memory(
    graph: penstock.GraphStore, tmp_path: Path, options: dict[str, Any], mode: str
) -> None:
    with penstock.open_feed(graph.path, tmp_path / "disk", **{**OPTIONS, **options}) as loader:
        found = list(epochs(loader, 3))
        stats = loader.stats
    assert stats is not None and stats.pack_rows > 0 and stats.host_rows > 0
    assert f'"mode": "{mode}"' in (tmp_path / "disk" / "feed-train" / "plan.json").read_text()
    num_sampled = 2 if mode == "reuse" else 3
    with penstock.open_feed(
        graph, tmp_path / "memory", in_memory=True, sampled_epochs=num_sampled, **OPTIONS
    ) as loader:
        wanted = list(epochs(loader, 3))
    assert len(loader) == -(-len(graph.split_ids("train")) // 20) == len(wanted[0])
    assert not torch.equal(wanted[0][0][0], wanted[1][0][0])
    for one, other in zip(found, wanted, strict=True):
        for batch, same in zip(one, other, strict=True):
            assert all(map(torch.equal, batch, same))


def test_what_is_done_is_found_again_and_what_is_of_something_else_is_made_anew(
    graph: penstock.GraphStore, tmp_path: Path
) -> None:
    def packs(**options: Any) -> int:
        with penstock.open_feed(graph, tmp_path, **{**OPTIONS, **options}) as loader:
            next(iter(loader))
        return (tmp_path / "feed-train" / "packs" / "manifest.json").stat().st_ino

    first = packs()
    assert packs() == first
    assert packs(host_memory="64MiB", disk="1GiB") == first  # they fit
    assert packs(fanouts=(2, 2)) != first


def test_a_loop_that_is_left_ends_its_epoch(graph: penstock.GraphStore, tmp_path: Path) -> None:
    with penstock.open_feed(graph, tmp_path, epochs=3, **OPTIONS) as loader:
        for batch in loader:
            assert (batch.epoch, batch.step) == (0, 0)
            break
        items = len(loader)
        assert [(batch.epoch, batch.step) for batch in loader] == [(1, items + n) for n in range(items)]
        assert repr(loader) == f"Loader({items} mini-batches per epoch, 2 of 3 epochs begun)"
        assert len(list(loader)) == items
        with pytest.raises(ValueError, match="all epochs=3 have been fed"):
            next(iter(loader))


def test_it_works_without_a_context_and_ends_when_it_is_dropped(graph: penstock.GraphStore, tmp_path: Path) -> None:
    loader = penstock.open_feed(graph, tmp_path, **OPTIONS)
    assert len(list(loader)) == len(loader)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="this loader is closed"):
        next(iter(loader))
    loader = penstock.open_feed(graph, tmp_path, **OPTIONS)
    next(iter(loader))
    del loader
    assert next(iter(penstock.open_feed(graph, tmp_path, **OPTIONS))).step == 0  # nobody holds the folder


def test_what_cannot_be_is_said(graph: penstock.GraphStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split='tset' is none of train, valid, test, all"):
        penstock.open_feed(graph, tmp_path, split="tset", **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^both of fanouts .* and num_neighbors"):
        penstock.open_feed(graph, tmp_path, num_neighbors=[2, 2], **OPTIONS)
    with pytest.raises(ValueError, match="'much' is not a size"):
        penstock.open_feed(graph, tmp_path, **{**OPTIONS, "host_memory": "much"})
    with penstock.open_feed(graph, tmp_path, **OPTIONS), pytest.raises(InUse, match="feed-train is in use by"):
        with penstock.open_feed(graph, tmp_path, **OPTIONS):
            pass


@pytest.mark.parametrize("disk", [None, pytest.param("14MiB", marks=pytest.mark.slow)])
def test_all_nodes_are_fed_once_in_order_and_written(
    graph: penstock.GraphStore, tmp_path: Path, disk: str | None
) -> None:
    out = tmp_path / "sums.parquet"
    with penstock.open_feed(graph, tmp_path, split="all", epochs=1, disk=disk, **OPTIONS) as loader:
        parts = (
            (b.seeds, {"first": b.features[: b.num_seeds, :2], "degree": b.blocks[-1].indptr.diff()}) for b in loader
        )
        assert penstock.write_nodes(graph, out, parts) == 4000
    table = pq.read_table(out)
    assert table.schema.types == [pa.int64(), pa.list_(pa.float32(), 2), pa.int32()]
    assert table["id"].to_pylist() == list(range(4000))
    np.testing.assert_array_equal(np.array(table["first"].to_pylist(), np.float32), np.array(graph.features[:, :2]))
    np.testing.assert_array_equal(table["degree"].to_pylist(), np.minimum(np.diff(graph.indptr), 4))


def test_tables_have_the_users_ids_and_refuse_what_does_not_fit(tmp_path: Path) -> None:
    names = [f"user-{n}" for n in range(6)]
    features = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(12, np.float32)), 2)
    pq.write_table(pa.table({"id": names, "feature": features, "label": [0, 1] * 3}), tmp_path / "nodes.parquet")
    pq.write_table(pa.table({"src": names, "dst": names[::-1]}), tmp_path / "edges.parquet")
    graph = penstock.ingest_parquet(
        tmp_path / "nodes.parquet",
        tmp_path / "edges.parquet",
        tmp_path / "g",
        penstock.IngestOptions(),
        host_memory=1 << 26,
    )
    ids, out = torch.tensor([4, 1]), tmp_path / "out.parquet"
    penstock.write_nodes(
        tmp_path / "g", out, [(ids, {"x": torch.ones(2, 3, dtype=torch.bfloat16), "say": np.array(["a", "b"])})]
    )
    assert pq.read_table(out).to_pylist() == [
        {"id": str(graph.original_ids_of(np.array([node]))[0]), "x": [1.0, 1.0, 1.0], "say": text}
        for node, text in ((4, "a"), (1, "b"))
    ]
    with pytest.raises(ValueError, match="nothing to write"):
        penstock.write_nodes(graph, out, [])
    with pytest.raises(ValueError, match=r"column 'x' has shape \(2, 1, 1\)"):
        penstock.write_nodes(graph, out, [(ids, {"x": torch.ones(2, 1, 1)})])
    with pytest.raises(ValueError, match=r"got columns \['y'\], this table has \['x'\]"):
        penstock.write_nodes(graph, out, [(ids, {"x": ids}), (ids, {"y": ids})])
    with pytest.raises(ValueError, match=r"node ids 4\.\.6 are not all of the graph's 0\.\.5"):
        penstock.write_nodes(graph, out, [(ids, {"x": ids}), (torch.tensor([4, 6]), {"x": ids})])
    with pytest.raises(ValueError, match="node ids are float32"):
        penstock.write_nodes(graph, out, [(ids.float(), {"x": ids})])
    assert pq.read_metadata(out).num_rows == 2  # what was there stays
