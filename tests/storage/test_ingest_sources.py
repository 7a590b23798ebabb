"""NumPy and OGB folders, DGL and PyG objects: all give the store that the same graph in memory gives."""

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from penstock.storage.errors import DataError
from penstock.storage.graph import GraphStore
from penstock.storage.ingest import IngestOptions, ingest_dgl, ingest_npy, ingest_ogb, ingest_pyg
from penstock.storage.ingest.columns import ArrayColumn, CsvColumn, NpzColumn
from penstock.storage.ingest.source import Column

MEMORY = 32 << 20
N, E, F = 90, 400, 5


def graph() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(8)
    return {
        "features": rng.random((N, F), np.float32),
        "edge_index": rng.integers(0, N, (2, E)),
        "labels": rng.integers(0, 4, N),
        "edge_weights": rng.random(E, np.float32),
        "train_ids": np.arange(0, 40),
        "val_ids": np.arange(40, 60)[::-1],
        "test_ids": np.arange(60, 80),
    }


def check(store: GraphStore, data: dict[str, NDArray[Any]], *, weights: bool = True, splits: bool = True) -> None:
    store.validate()
    src, dst = data["edge_index"]
    order = np.lexsort((src, dst))  # stable, as ours
    np.testing.assert_array_equal(store.indices, src[order])
    np.testing.assert_array_equal(store.indptr, np.searchsorted(dst[order], np.arange(N + 1)))
    np.testing.assert_allclose(store.features, data["features"], rtol=1e-6)
    np.testing.assert_array_equal(store.labels, data["labels"])
    assert (store.edge_weights is not None) == weights
    if store.edge_weights is not None:
        np.testing.assert_allclose(store.edge_weights, data["edge_weights"][order], rtol=1e-6)
    if splits:
        for split, name in (("train", "train_ids"), ("valid", "val_ids"), ("test", "test_ids")):
            np.testing.assert_array_equal(store.split_ids(split), np.sort(data[name]))  # type: ignore[arg-type]


def save(folder: Path, data: dict[str, NDArray[Any]]) -> Path:
    folder.mkdir()
    for name, array in data.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def test_numpy_folder(tmp_path: Path) -> None:
    data = graph()
    store = ingest_npy(save(tmp_path / "in", data), tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    check(store, data)
    ends = {"src": data["edge_index"][0].astype(np.uint16), "dst": np.asfortranarray(data["edge_index"][1])}
    split = {k: v for k, v in data.items() if k != "edge_index"} | ends
    split["features"] = np.asfortranarray(data["features"])
    check(ingest_npy(save(tmp_path / "two", split), tmp_path / "o2", IngestOptions(), host_memory=MEMORY), data)


def test_numpy_folder_with_sparse_ids(tmp_path: Path) -> None:
    data = graph()
    names = np.random.default_rng(1).permutation(N) * 11 + 3
    mapped = data | {"node_ids": names, "edge_index": names[data["edge_index"]]}
    mapped |= {split: names[data[split]] for split in ("train_ids", "val_ids", "test_ids")}
    store = ingest_npy(save(tmp_path / "in", mapped), tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    check(store, data)
    np.testing.assert_array_equal(store.original_ids(0, N), names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edge_index": np.array([[0, 1], [1, N]])}, r"row 1: dst=90 is no node; ids go from 0 to 89"),
        ({"edge_index": np.array([0, 1])}, r"shape \(2,\), wanted \(2, E\)"),
        ({"edge_index": np.zeros((2, 3))}, r"holds float64; node ids are integers"),
        ({"features": np.zeros(N)}, r"wanted nodes by features"),
        ({"labels": np.zeros(N - 1)}, r"labels.npy has 89 rows, the features have 90"),
        ({"edge_weights": np.zeros(3)}, r"edge_weights.npy has 3 rows"),
        ({"train_ids": np.array([0, N])}, r"train_ids.npy, row 1: id=90 is no node"),
        ({"test_ids": np.array([80, 3])}, r"test_ids.npy, row 1: node 3 is in two splits"),
        ({"features": np.full((N, F), np.nan)}, r"features.npy, row 0: feature 0 is null or NaN"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = graph() | change
    if "edge_index" in change:
        del data["edge_weights"]
    folder = save(tmp_path / "in", data)
    with pytest.raises(DataError, match=message):
        ingest_npy(folder, tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_missing_damaged_and_pickled_arrays_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", graph())
    (folder / "labels.npy").write_bytes((folder / "labels.npy").read_bytes()[:-8])
    with pytest.raises(DataError, match="labels.npy cannot be read as .npy"):
        ingest_npy(folder, tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    np.save(folder / "labels.npy", np.array([{}] * N, dtype=object))
    with pytest.raises(DataError, match="labels.npy cannot be read as .npy"):
        ingest_npy(folder, tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    (folder / "features.npy").unlink()
    with pytest.raises(DataError, match="features.npy is missing; the folder has"):
        ingest_npy(folder, tmp_path / "out", IngestOptions(), host_memory=MEMORY)


def _csv(path: Path, rows: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        np.savetxt(file, rows, fmt="%d" if rows.dtype.kind == "i" else "%.9g", delimiter=",")


def _splits(folder: Path, data: dict[str, NDArray[Any]]) -> None:
    for split, name in (("train", "train_ids"), ("valid", "val_ids"), ("test", "test_ids")):
        _csv(folder / "split" / "time" / f"{split}.csv.gz", data[name])


def ogb_csv(folder: Path, data: dict[str, NDArray[Any]]) -> Path:
    _csv(folder / "raw" / "edge.csv.gz", data["edge_index"].T)
    _csv(folder / "raw" / "node-feat.csv.gz", data["features"])
    _csv(folder / "raw" / "node-label.csv.gz", data["labels"])
    _csv(folder / "raw" / "num-node-list.csv.gz", np.array([N]))
    _csv(folder / "raw" / "num-edge-list.csv.gz", np.array([E]))
    _splits(folder, data)
    return folder


def test_ogb_folder_of_csv(tmp_path: Path) -> None:
    data = graph()
    out = tmp_path / "out"
    store = ingest_ogb(ogb_csv(tmp_path / "in", data), out, IngestOptions(), host_memory=MEMORY)
    check(store, data, weights=False)


def test_ogb_folder_of_npz(tmp_path: Path) -> None:
    data = graph()
    (tmp_path / "in" / "raw").mkdir(parents=True)
    np.savez_compressed(tmp_path / "in" / "raw" / "data.npz", node_feat=data["features"], edge_index=data["edge_index"])
    labels = data["labels"].astype(np.float32)[:, None].copy()
    labels[85] = np.nan  # as papers100M has outside its splits
    np.savez(tmp_path / "in" / "raw" / "node-label.npz", node_label=labels)
    _splits(tmp_path / "in", data)
    store = ingest_ogb(tmp_path / "in", tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    wanted = data["labels"].copy()
    wanted[85] = -1
    check(store, data | {"labels": wanted}, weights=False)


def test_ogb_multi_label(tmp_path: Path) -> None:
    flags = np.random.default_rng(2).integers(0, 2, (N, 7))
    folder = ogb_csv(tmp_path / "in", graph() | {"labels": flags})
    store = ingest_ogb(folder, tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    assert store.meta.multi_label and store.meta.num_classes == 7
    np.testing.assert_array_equal(store.labels, flags)


def test_damaged_ogb_folders_are_refused(tmp_path: Path) -> None:
    folder = ogb_csv(tmp_path / "in", graph())
    with pytest.raises(DataError, match="neither data.npz nor edge.csv.gz"):
        ingest_ogb(folder / "raw", tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    _csv(folder / "raw" / "num-node-list.csv.gz", np.array([N + 1]))
    with pytest.raises(DataError, match="node-feat.csv.gz has 90 rows, wanted 91"):
        ingest_ogb(folder, tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    _csv(folder / "raw" / "num-node-list.csv.gz", np.array([N, N]))
    with pytest.raises(DataError, match="lists 2 graphs"):
        ingest_ogb(folder, tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    with gzip.open(folder / "raw" / "edge.csv.gz", "wt") as file:
        file.write("0,1\n5,x\n")
    _csv(folder / "raw" / "num-node-list.csv.gz", np.array([N]))
    with pytest.raises(DataError, match="edge.csv.gz"):
        ingest_ogb(folder, tmp_path / "out", IngestOptions(), host_memory=MEMORY)


def test_columns_come_in_the_rows_asked_for(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 10**9, (5000, 3))
    _csv(tmp_path / "v.csv.gz", values)
    np.savez_compressed(tmp_path / "v.npz", v=values, t=values.T.copy(), f=values.T)
    columns: list[tuple[Column, NDArray[Any]]] = [
        (ArrayColumn("v", values), values),
        (CsvColumn(tmp_path / "v.csv.gz", np.int64, 5000), values),
        (CsvColumn(tmp_path / "v.csv.gz", np.int64, 5000, pick=1), values[:, 1]),
        (NpzColumn(tmp_path / "v.npz", "v"), values),
        (NpzColumn(tmp_path / "v.npz", "t", 2), values[:, 2]),
    ]
    for column, wanted in columns:
        for rows in (1, 999, 5000, 6000) if isinstance(column, ArrayColumn) else (999, 6000):
            parts = list(column.chunks(rows))
            assert [len(part) for part in parts[:-1]] == [rows] * (len(parts) - 1)
            np.testing.assert_array_equal(np.concatenate(parts), wanted)
        assert column.shape == wanted.shape
    with pytest.raises(DataError, match="Fortran order"):
        NpzColumn(tmp_path / "v.npz", "f")


def _masks(data: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    masks = {}
    for name, ids in (("train_mask", "train_ids"), ("val_mask", "val_ids"), ("test_mask", "test_ids")):
        masks[name] = torch.zeros(N, dtype=torch.bool)
        masks[name][torch.from_numpy(data[ids].copy())] = True
    return masks


def test_dgl_graph(tmp_path: Path) -> None:
    dgl = pytest.importorskip("dgl")
    data = graph()
    g = dgl.graph(tuple(torch.from_numpy(data["edge_index"])), num_nodes=N)
    g.ndata.update({"feat": torch.from_numpy(data["features"]), "label": torch.from_numpy(data["labels"])})
    g.ndata.update(_masks(data))
    g.edata["weight"] = torch.from_numpy(data["edge_weights"])
    check(ingest_dgl(g, tmp_path / "out", IngestOptions(), host_memory=MEMORY), data)
    again = ingest_dgl(g, tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    g.ndata["feat"][3, 3] = 9.0
    with pytest.raises(ValueError, match=r"something else: dgl ndata\['feat'\] has other content"):
        ingest_dgl(g, again.path, IngestOptions(), host_memory=MEMORY)
    del g.ndata["feat"]
    with pytest.raises(DataError, match=r"no ndata\['feat'\]; it has \['label'"):
        ingest_dgl(g, tmp_path / "o", IngestOptions(), host_memory=MEMORY)
    hetero = dgl.heterograph({("a", "to", "b"): ([0], [0])})
    with pytest.raises(DataError, match="is heterogeneous: node types .*to_homogeneous"):
        ingest_dgl(hetero, tmp_path / "o", IngestOptions(), host_memory=MEMORY)


def test_dgl_options_agree_with_dgl(tmp_path: Path) -> None:
    dgl = pytest.importorskip("dgl")
    data = graph()
    g = dgl.graph(tuple(torch.from_numpy(data["edge_index"])), num_nodes=N)
    g.ndata["feat"] = torch.from_numpy(data["features"])
    store = ingest_dgl(g, tmp_path / "out", IngestOptions(undirected=True), host_memory=MEMORY)
    src, dst = dgl.to_bidirected(dgl.graph(g.edges(), num_nodes=N)).edges()
    order = np.lexsort((src.numpy(), dst.numpy()))
    np.testing.assert_array_equal(store.indices, src.numpy()[order])


def test_pyg_data(tmp_path: Path) -> None:
    pyg = pytest.importorskip("torch_geometric.data")
    data = graph()
    item = pyg.Data(
        x=torch.from_numpy(data["features"]),
        edge_index=torch.from_numpy(data["edge_index"]),
        y=torch.from_numpy(data["labels"]),
        edge_weight=torch.from_numpy(data["edge_weights"]),
        **_masks(data),
    )
    check(ingest_pyg(item, tmp_path / "out", IngestOptions(), host_memory=MEMORY), data)
    item.x = item.x.bfloat16()
    halved = ingest_pyg(item, tmp_path / "o2", IngestOptions(feature_dtype="bfloat16"), host_memory=MEMORY)
    assert halved.features.dtype == np.uint16
    item.train_mask = torch.zeros(N, 10, dtype=torch.bool)
    with pytest.raises(DataError, match=r"shape \(90, 10\); choose one split"):
        ingest_pyg(item, tmp_path / "o3", IngestOptions(), host_memory=MEMORY)
    with pytest.raises(DataError, match="no x and no edge_index"):
        ingest_pyg(pyg.Data(), tmp_path / "o4", IngestOptions(), host_memory=MEMORY)


def _pyg(**changes: Any) -> Any:
    """A PyG `Data` of the graph, with attributes changed, or dropped where None."""
    pyg, data = pytest.importorskip("torch_geometric.data"), graph()
    given: dict[str, Any] = {
        "x": torch.from_numpy(data["features"]),
        "edge_index": torch.from_numpy(data["edge_index"]),
        "y": torch.from_numpy(data["labels"]),
    }
    return pyg.Data(**{name: value for name, value in (given | changes).items() if value is not None})


def _index() -> torch.Tensor:
    return torch.from_numpy(graph()["edge_index"])


PYG: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: {"edge_index": _index().t()}, r"edge_index has shape \(400, 2\), wanted \(2, E\): transpose it"),
    (lambda: {"edge_index": _index()[:, :3].t()}, r"edge_index has shape \(3, 2\)"),
    (lambda: {"edge_index": _index().float()}, r"edge_index\[0\] holds float32; node ids are integers"),
    (lambda: {"edge_index": _index().flatten()}, r"edge_index has shape \(800,\)"),
    (lambda: {"edge_index": _index() + 1}, "is no node; ids go from 0 to 89"),
    (lambda: {"x": torch.eye(N).to_sparse()}, r"x is a sparse tensor .*; give pyg x.to_dense\(\)"),
    (lambda: {"x": torch.zeros(N)}, "x has shape .*wanted nodes by features"),
    (lambda: {"x": torch.zeros(N, 2, dtype=torch.complex64)}, "features are of type complex64"),
    (lambda: {"y": torch.zeros(1)}, "y has 1 rows, the features have 90"),
    (lambda: {"y": torch.tensor(3)}, "y has no rows"),
    (lambda: {"y": torch.zeros(N, 2, 2)}, "y has shape"),
    (lambda: {"y": torch.rand(N)}, "row 0: label 0.* is no whole number"),
    (lambda: {"edge_weight": torch.ones(3)}, "edge_weight has 3 rows"),
    (lambda: {"edge_weight": torch.ones(E, 2)}, r"edge_weight has shape \(400, 2\); an edge has one weight"),
    (lambda: {"edge_weight": -torch.ones(E)}, "row 0: weight -1.0 is negative"),
    (lambda: {"train_mask": torch.ones(N, 10, dtype=torch.bool)}, r"shape \(90, 10\); choose one split"),
    (lambda: {"train_mask": torch.ones(4, dtype=torch.bool)}, "train_mask has 4 rows"),
    (lambda: {"edge_index": None, "adj_t": 1}, "no edge_index; it has .*'adj_t'.*to_edge_index"),
]


@pytest.mark.parametrize(("changes", "message"), PYG)
def test_pyg_data_of_other_shapes_is_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ingest_pyg(_pyg(**changes()), tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_pyg_data_may_hold_columns_views_and_arrays(tmp_path: Path) -> None:
    data = graph()
    item = _pyg(
        x=torch.from_numpy(data["features"]).clone().requires_grad_(),
        y=torch.from_numpy(data["labels"])[:, None],
        edge_weight=torch.from_numpy(data["edge_weights"])[:, None],
        train_mask=torch.from_numpy(np.isin(np.arange(N), data["train_ids"]))[:, None],
        validation_mask=np.isin(np.arange(N), data["val_ids"]).astype(np.float64),
        test_mask=np.isin(np.arange(N), data["test_ids"]).astype(np.int8),
    )
    check(ingest_pyg(item, tmp_path / "out", IngestOptions(), host_memory=MEMORY), data)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_the_remedy_for_adj_t_works(tmp_path: Path) -> None:
    utils = pytest.importorskip("torch_geometric.utils")
    data = graph()
    pairs = np.unique(data["edge_index"].T, axis=0).T  # a sparse matrix holds an edge once
    src, dst = torch.from_numpy(pairs.copy())
    item = _pyg(edge_index=None, adj_t=torch.sparse_coo_tensor(torch.stack([dst, src]), torch.ones(len(src)), (N, N)))
    with pytest.raises(
        DataError, match=r"data.edge_index = torch_geometric.utils.to_edge_index\(data.adj_t\)"
    ) as caught:
        ingest_pyg(item, tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    item.adj_t = item.adj_t.coalesce()
    remedy = str(caught.value).split("give data.edge_index = torch_geometric.utils.")[1]
    item.edge_index = eval(f"utils.{remedy}", {"utils": utils, "data": item})
    check(
        ingest_pyg(item, tmp_path / "out", IngestOptions(), host_memory=MEMORY),
        data | {"edge_index": pairs},
        weights=False,
        splits=False,
    )


def test_what_objects_have_beside_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    item = _pyg(edge_attr=torch.ones(E, 3), pos=torch.ones(N, 2), time=torch.zeros(E))
    ingest_pyg(item, tmp_path / "pyg", IngestOptions(), host_memory=MEMORY)
    assert "attributes of the PyG data that are not used: edge_attr, pos, time" in caplog.text
    dgl = pytest.importorskip("dgl")
    g = dgl.graph(tuple(_index()), num_nodes=N)
    g.ndata.update({"feat": torch.zeros(N, 2), "year": torch.zeros(N)})
    g.edata["h"] = torch.zeros(E)
    ingest_dgl(g, tmp_path / "dgl", IngestOptions(), host_memory=MEMORY)
    assert "ndata of the DGL graph that are not used: year" in caplog.text
    assert "edata of the DGL graph that are not used: h" in caplog.text
    g.edata.update({"w": torch.ones(E), "weight": torch.ones(E)})
    with pytest.raises(DataError, match="both mean the weight; keep one"):
        ingest_dgl(g, tmp_path / "dgl2", IngestOptions(), host_memory=MEMORY)


def test_heterogeneous_graphs_are_refused_as_such(tmp_path: Path) -> None:
    pyg, dgl = pytest.importorskip("torch_geometric.data"), pytest.importorskip("dgl")
    hetero = pyg.HeteroData()
    hetero["a"].x = torch.zeros(2, 2)
    hetero["a", "to", "a"].edge_index = torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(DataError, match=r"PyG data is heterogeneous: node types \['a'\]"):
        ingest_pyg(hetero, tmp_path / "o", IngestOptions(), host_memory=MEMORY)
    two = dgl.heterograph({("a", "to", "a"): ([0], [0]), ("a", "of", "a"): ([0], [0])})
    with pytest.raises(DataError, match=r"DGL graph is heterogeneous: node types \['a'\], edge types \['of', 'to'\]"):
        ingest_dgl(two, tmp_path / "o", IngestOptions(), host_memory=MEMORY)
    for name in ("num-node-dict.csv.gz", "triplet-type-list.csv.gz", "relations", "edge_index_dict.npz"):
        (tmp_path / "ogbn_mag" / name / "raw" / name).mkdir(parents=True)
        with pytest.raises(DataError, match="is heterogeneous"):
            ingest_ogb(tmp_path / "ogbn_mag" / name, tmp_path / "o", IngestOptions(), host_memory=MEMORY)


def _pairs(store: GraphStore) -> list[tuple[int, int]]:
    dst = np.repeat(np.arange(store.num_nodes), np.diff(store.indptr))
    return sorted(zip(store.indices.tolist(), dst.tolist(), strict=True))


def test_ogb_adds_the_reverse_edges_that_its_loader_adds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = graph()
    src, dst = data["edge_index"].tolist()
    wanted = sorted([*zip(src, dst, strict=True), *zip(dst, src, strict=True)])  # as OGB: loops and duplicates stay
    for name, adds in (("ogbn_products", True), ("products", True), ("ogbn-proteins", True), ("ogbn_arxiv", False)):
        folder = ogb_csv(tmp_path / name, data)
        store = ingest_ogb(folder, tmp_path / f"{name}.out", IngestOptions(), host_memory=MEMORY)
        assert _pairs(store) == (wanted if adds else sorted(zip(src, dst, strict=True)))
    assert "add_inverse_edge" not in caplog.text
    merged = ingest_ogb(tmp_path / "products", tmp_path / "merged", IngestOptions(undirected=True), host_memory=MEMORY)
    assert _pairs(merged) == sorted(set(wanted))
    own = ingest_ogb(ogb_csv(tmp_path / "mine", data), tmp_path / "own.out", IngestOptions(), host_memory=MEMORY)
    assert own.num_edges == E and "give --set undirected=true" in caplog.text
    (tmp_path / "master.csv").write_text(",ogbn-mine,ogbn-other\nadd_inverse_edge,True,False\n")
    said = ingest_ogb(tmp_path / "mine", tmp_path / "said.out", IngestOptions(), host_memory=MEMORY)
    assert _pairs(said) == wanted


def test_ogb_splits_that_are_pickled_are_refused_with_a_remedy(tmp_path: Path) -> None:
    data = graph()
    folder = ogb_csv(tmp_path / "in", data)
    scheme = folder / "split" / "time"
    for path in scheme.iterdir():
        path.unlink()
    splits = {"train": data["train_ids"], "valid": torch.from_numpy(data["val_ids"].copy()), "test": data["test_ids"]}
    torch.save(splits, scheme / "split_dict.pt")
    with pytest.raises(DataError, match="split_dict.pt is a pickle, which is not read") as caught:
        ingest_ogb(folder, tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    remedy = str(caught.value).split("python -c ")[1].strip('"')
    subprocess.run([sys.executable, "-c", remedy], check=True)
    check(ingest_ogb(folder, tmp_path / "out", IngestOptions(), host_memory=MEMORY), data, weights=False)


def test_odd_ogb_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = graph()
    folder = ogb_csv(tmp_path / "in", data | {"test_ids": np.array([], np.int64)})
    _csv(folder / "raw" / "edge-feat.csv.gz", np.ones((E, 2)))
    _csv(folder / "raw" / "node_year.csv.gz", np.ones((N, 1)))
    store = ingest_ogb(folder, tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    assert len(store.split_ids("test")) == 0 and "no node is in split test" in caplog.text
    assert "that are not used: edge-feat.csv.gz, node_year.csv.gz" in caplog.text
    (folder / "raw" / "node-feat.csv.gz").unlink()  # as of ogbn-proteins
    with pytest.raises(DataError, match="node-feat.csv.gz is missing; .* has "):
        ingest_ogb(folder, tmp_path / "o2", IngestOptions(), host_memory=MEMORY)
    (tmp_path / "npz" / "raw").mkdir(parents=True)
    for changes, message in (
        ({"edge_index": data["edge_index"].T.copy()}, r"edge_index has shape \(400, 2\), wanted \(2, E\)"),
        ({"node_feat": np.array(None)}, "node_feat cannot be read .*holds objects"),
        ({"node_feat": np.asfortranarray(data["features"])}, "Fortran order; save numpy.ascontiguousarray"),
    ):
        arrays: dict[str, Any] = {"node_feat": data["features"], "edge_index": data["edge_index"]} | changes
        np.savez(tmp_path / "npz" / "raw" / "data.npz", **arrays)
        with pytest.raises(DataError, match=message):
            ingest_ogb(tmp_path / "npz", tmp_path / "o3", IngestOptions(), host_memory=MEMORY)
    np.savez(tmp_path / "npz" / "raw" / "data.npz", edge_feat=np.ones(E), **{**arrays, "node_feat": data["features"]})
    store = ingest_ogb(tmp_path / "npz", tmp_path / "o4", IngestOptions(), host_memory=MEMORY)
    assert "edge_feat is not used" in caplog.text and store.meta.num_classes == 0
