"""Labels, splits, weights and ids at the edges of what they may be: one rule in every kind of source."""

import logging
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from penstock.storage.errors import DataError
from penstock.storage.graph import GraphStore, open_graph
from penstock.storage.ingest import IngestOptions, ingest_dgl, ingest_npy, ingest_parquet, ingest_pyg

MEMORY = 32 << 20
N = 6
SRC, DST = [5, 0, 1, 3, 4, 2], [1, 1, 1, 4, 3, 0]
Source = Callable[[Path, dict[str, Any]], GraphStore]


def _arrays(changes: dict[str, Any]) -> dict[str, Any]:
    features = np.arange(N * 3, dtype=np.float32).reshape(N, 3)
    return {"features": features, "src": np.array(SRC), "dst": np.array(DST), "labels": np.arange(N) % 3} | changes


def from_parquet(folder: Path, changes: dict[str, Any], **options: Any) -> GraphStore:
    data = _arrays(changes)
    names = {"labels": "label", "weights": "weight"}
    nodes = {"feature": pa.array(list(data["features"]))}
    edges = {}
    for name, value in data.items():
        if name in ("src", "dst", "weights"):
            edges[names.get(name, name)] = value
        elif name != "features" and value is not None:
            nodes[names.get(name, name)] = pa.array(list(value) if getattr(value, "ndim", 1) == 2 else value)
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(nodes), folder / "n.parquet")
    pq.write_table(pa.table(edges), folder / "e.parquet")
    out, chosen = folder / "out", IngestOptions(**options)
    return ingest_parquet(folder / "n.parquet", folder / "e.parquet", out, chosen, host_memory=MEMORY)


def from_npy(folder: Path, changes: dict[str, Any], **options: Any) -> GraphStore:
    folder.mkdir(exist_ok=True)
    for name, value in _arrays(changes).items():
        if value is not None:
            np.save(folder / f"{'edge_weights' if name == 'weights' else name}.npy", value)
    return ingest_npy(folder, folder / "out", IngestOptions(**options), host_memory=MEMORY)


def _tensor(value: Any) -> Any:
    return torch.from_numpy(np.array(value))


def from_pyg(folder: Path, changes: dict[str, Any], **options: Any) -> GraphStore:
    data = _arrays(changes)
    pyg = pytest.importorskip("torch_geometric.data")
    index = torch.stack([_tensor(data.pop("src")), _tensor(data.pop("dst"))])
    names = {"features": "x", "labels": "y", "weights": "edge_weight"}
    given = {names.get(name, name): _tensor(value) for name, value in data.items() if value is not None}
    return ingest_pyg(pyg.Data(edge_index=index, **given), folder, IngestOptions(**options), host_memory=MEMORY)


def from_dgl(folder: Path, changes: dict[str, Any], **options: Any) -> GraphStore:
    data = _arrays(changes)
    dgl = pytest.importorskip("dgl")
    g = dgl.graph((_tensor(data.pop("src")), _tensor(data.pop("dst"))), num_nodes=N)
    names = {"features": "feat", "labels": "label"}
    for name, value in data.items():
        if value is not None:
            (g.edata if name == "weights" else g.ndata)[names.get(name, name.removesuffix("s"))] = _tensor(value)
    return ingest_dgl(g, folder, IngestOptions(**options), host_memory=MEMORY)


EVERYWHERE = pytest.mark.parametrize("source", [from_parquet, from_npy, from_pyg, from_dgl])
WEIGHTS: list[tuple[Any, str]] = [
    (np.array([1, 1, -0.5, 1, 1, 1]), "row 2: weight -0.5 is negative"),
    (np.array([1, 1, 1, -3, 1, 1]), "row 3: weight -3 is negative"),
    (np.array([1, np.nan, 1, 1, 1, 1], np.float32), "row 1: weight nan is null or NaN"),
    (np.array([1, 1, 1, 1, np.inf, 1]), "row 4: weight inf is not finite in float32"),
    (np.array([1e300, 1, 1, 1, 1, 1]), r"row 0: weight 1e\+300 is not finite in float32"),
    (np.array([1, 1, 1, 1, 1, 1e-60]), "row 5: weight 1e-60 is 0 in float32"),
]


@EVERYWHERE
@pytest.mark.parametrize(("weights", "message"), WEIGHTS)
def test_weights_that_are_none_are_refused(tmp_path: Path, source: Source, weights: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        source(tmp_path / "in", {"weights": weights})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (pa.array([1, None, 1, 1, 1, 1]), "row 1: weight nan is null or NaN"),
        (pa.array([Decimal("1.5")] * 5 + [Decimal("-2.5")]), "row 5: weight -2.5 is negative"),
        (pa.array(["1"] * 6), "weight is of type string"),
        (pa.nulls(6), "row 0: weight nan is null or NaN"),
    ],
)
def test_weights_of_arrow_types_are_refused_by_the_same_rule(tmp_path: Path, weights: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_parquet(tmp_path / "in", {"weights": weights})


@EVERYWHERE
def test_weights_of_any_number_type_are_taken(tmp_path: Path, source: Source) -> None:
    for n, kind in enumerate((np.int64, np.uint8, np.float64, np.float32, bool)):
        weights = np.array([1, 0, 1, 1, 1, 0]).astype(kind)
        store = source(tmp_path / f"{n}", {"weights": weights})
        assert store.edge_weights is not None and sorted(store.edge_weights.tolist()) == [0, 0, 1, 1, 1, 1]


@EVERYWHERE
def test_merged_weights_that_overflow_are_refused(tmp_path: Path, source: Any) -> None:
    changes = {"src": np.array([1, 1, 0]), "dst": np.array([2, 2, 3]), "weights": np.array([3e38, 3e38, 1], np.float32)}
    with pytest.raises(
        DataError, match="edges from node row 1 to node row 2, .* add up to more than float32's largest"
    ):
        source(tmp_path / "in", changes, deduplicate=True)
    same = changes | {"src": np.array([1, 1, 1]), "dst": np.array([2, 2, 2])}
    with pytest.raises(DataError, match="edges from node row 1 to node row 2"):
        source(tmp_path / "in2", same, deduplicate=True)


LABELS: list[tuple[Any, str]] = [
    (np.array([0, 1, 5_000_000_000, 0, 1, 0]), "row 2: label 5000000000 is too high for a class.*remap_labels=true"),
    (np.array([0, 1, 2_000_000_000, 0, 1, 0]), "row 2: label 2000000000 is too high"),
    (np.array([0, 1, 3_000_000, 0, 1, 0]), "only 3 of 3,000,001 classes occur.*remap_labels=true"),
    (np.array([0, -7, 1, 0, 1, 0]), "row 1: label -7 is below -1"),
    (np.array([0, 1.5, 1, 0, 1, 0]), "row 1: label 1.5 is no whole number"),
    (np.array([0, np.inf, 1, 0, 1, 0]), "row 1: label inf is no whole number"),
    (np.array([0, 1e30, 1, 0, 1, 0]), r"row 1: label 1e\+30 is no whole number that int64 holds"),
    (np.array([[0, 1], [1, 0], [1, 2], [0, 0], [1, 1], [0, 1]]), "row 2: class 1 has label 2"),
    (np.array([[0, 1], [1, 0], [1, np.nan], [0, 0], [1, 1], [0, 1]]), "row 2: class 1 has label nan"),
]


@EVERYWHERE
@pytest.mark.parametrize(("labels", "message"), LABELS)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, source: Source, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        source(tmp_path / "in", {"labels": labels})


@pytest.mark.parametrize("source", [from_parquet, from_npy])
def test_unsigned_labels_do_not_wrap(tmp_path: Path, source: Source) -> None:
    with pytest.raises(DataError, match="row 1: label.*18446744073709551615 exceeds int64"):
        source(tmp_path / "in", {"labels": np.array([0, 2**64 - 1, 1, 0, 0, 0], np.uint64)})


@EVERYWHERE
def test_labels_of_any_number_type_are_taken(tmp_path: Path, source: Source) -> None:
    wanted = [0, 1, 1, 0, 1, 0]
    for n, kind in enumerate((np.int8, np.int32, np.float32, np.float64, bool, np.uint8)):
        store = source(tmp_path / f"{n}", {"labels": np.array(wanted).astype(kind)})
        assert store.labels.tolist() == wanted and store.meta.num_classes == 2
    column = source(tmp_path / "column", {"labels": np.array(wanted)[:, None]}) if source is not from_parquet else store
    assert column.labels.tolist() == wanted and not column.meta.multi_label


@EVERYWHERE
def test_gaps_are_said_and_closed_on_request(tmp_path: Path, source: Any, caplog: pytest.LogCaptureFixture) -> None:
    labels = np.array([10, 205, 30, 10, -1, 205])
    store = source(tmp_path / "gaps", {"labels": labels})
    assert "3 of 206 classes occur (there is no 0, 1, 2, 3, 4 ...)" in caplog.text
    assert store.meta.num_classes == 206 and store.class_values is None
    caplog.clear()
    mapped = source(tmp_path / "mapped", {"labels": labels * 10**10 // 10**10}, remap_labels=True)
    assert "classes occur" not in caplog.text
    assert mapped.labels.tolist() == [0, 2, 1, 0, -1, 2] and mapped.meta.num_classes == 3
    assert mapped.class_values == [10, 30, 205] and open_graph(mapped.path).class_values == [10, 30, 205]
    mapped.validate()


@pytest.mark.parametrize("source", [from_parquet, from_npy])
def test_labels_of_any_values_are_numbered(tmp_path: Path, source: Any) -> None:
    texts = source(tmp_path / "text", {"labels": np.array(["b", "ä", "b", "a", "", "c"])}, remap_labels=True)
    assert texts.class_values == ["", "a", "b", "c", "ä"] and texts.labels.tolist() == [2, 4, 2, 1, 0, 3]
    far = source(tmp_path / "far", {"labels": np.array([5 * 10**9, -7, 2**62 + 1, -1, 0, -7])}, remap_labels=True)
    assert far.class_values == [-7, 0, 5 * 10**9, 2**62 + 1] and far.labels.tolist() == [2, 0, 3, -1, 1, 0]
    floats = source(tmp_path / "float", {"labels": np.array([3.0, np.nan, 9, 3, 3, 3])}, remap_labels=True)
    assert floats.class_values == [3, 9] and floats.labels.tolist() == [0, -1, 1, 0, 0, 0]


def test_large_labels_with_nulls_are_numbered_exactly(tmp_path: Path) -> None:
    labels = pa.array([2**60, None, 2**60 + 1, 2**60, None, 2**60 + 1])
    store = from_parquet(tmp_path / "in", {"labels": labels}, remap_labels=True)
    assert store.class_values == [2**60, 2**60 + 1] and store.labels.tolist() == [0, -1, 1, 0, -1, 1]


def test_remapping_without_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no labels; drop it"):
        from_npy(tmp_path / "a", {"labels": None}, remap_labels=True)
    with pytest.raises(DataError, match="lists of 0 and 1.*drop remap_labels"):
        from_npy(tmp_path / "b", {"labels": np.eye(N, 3, dtype=np.int64)}, remap_labels=True)
    with pytest.raises(DataError, match="no node has a label"):
        from_npy(tmp_path / "c", {"labels": np.full(N, np.nan)}, remap_labels=True)


def _split(train: Any, valid: Any = (), test: Any = ()) -> dict[str, NDArray[np.bool_]]:
    return {
        f"{name}_mask": np.isin(np.arange(N), rows) for name, rows in (("train", train), ("val", valid), ("test", test))
    }


@EVERYWHERE
def test_hidden_labels_are_allowed_where_nothing_is_learned(
    tmp_path: Path, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    hidden = {"labels": np.array([0, 1, 0, 1, -1, -1])}
    store = source(tmp_path / "test", hidden | _split([0, 1], [2, 3], [4, 5]))
    assert "2 of 2 nodes of split test have no label and are not scored" in caplog.text
    assert store.split_ids("test").tolist() == [4, 5] and store.labels.tolist() == [0, 1, 0, 1, -1, -1]
    source(tmp_path / "valid", hidden | _split([0, 1], [3, 4]))
    assert "1 of 2 nodes of split valid have no label" in caplog.text
    with pytest.raises(DataError, match=r"node row 4 is in split 'train' and has no label \(as 1 of 3 there\)"):
        source(tmp_path / "train", hidden | _split([0, 1, 4]))


@EVERYWHERE
def test_multi_labels_may_be_hidden_for_a_whole_split(tmp_path: Path, source: Source) -> None:
    flags = np.array([[0, 1], [1, 0], [1, 1], [0, 0], [np.nan] * 2, [np.nan] * 2])
    store = source(tmp_path / "in", {"labels": flags} | _split([0, 1], [2, 3], [4, 5]))
    assert store.meta.multi_label and store.labels[4:].tolist() == [[255, 255], [255, 255]]
    with pytest.raises(DataError, match="node row 4 is in split 'test' and has no label"):
        source(tmp_path / "part", {"labels": flags} | _split([0, 1], [2], [3, 4]))


def test_multi_labels_that_are_null_are_unknown(tmp_path: Path) -> None:
    store = from_parquet(tmp_path / "in", {"labels": [None, [0, 1], [1, 0], None, [0, 0], [1, 1]]})
    assert store.labels.tolist() == [[255] * 2, [0, 1], [1, 0], [255] * 2, [0, 0], [1, 1]]


def test_lists_of_one_label_are_classes_and_strings_that_are_null_none(tmp_path: Path) -> None:
    store = from_parquet(tmp_path / "in", {"labels": [[3], None, [1], [0], [2], [0]]})
    assert store.labels.tolist() == [3, -1, 1, 0, 2, 0] and not store.meta.multi_label
    store = from_parquet(tmp_path / "null", {"labels": pa.array([None] * N, pa.string())})
    assert store.labels.tolist() == [-1] * N and store.meta.num_classes == 0


@pytest.mark.parametrize("fractions", [(0.9, 0.2, 0.1), (-0.1, 0.5, 0.5), (float("nan"), 0.2, 0.1)])
def test_fractions_that_are_none_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and add up to at most 1"):
        IngestOptions(split_fractions=fractions)


@pytest.mark.parametrize("source", [from_npy, from_pyg, from_dgl])
def test_options_without_effect_are_refused(tmp_path: Path, source: Any) -> None:
    with pytest.raises(ValueError, match="label_column, weight_column name columns of Parquet tables, this source is"):
        source(tmp_path / "in", {}, label_column="y", weight_column="w")
    with pytest.raises(ValueError, match="feature_prefix name columns of Parquet"):
        source(tmp_path / "in2", {}, feature_prefix="f")
    with pytest.raises(ValueError, match="split_seed is the seed of split_fractions"):
        source(tmp_path / "in3", {}, split_seed=3)


def test_fractions_are_drawn_among_labelled_nodes(tmp_path: Path) -> None:
    count = 4000
    labels = np.where(np.arange(count) % 4 == 0, np.arange(count) // 4 % 3, -1)
    changes = {"features": np.zeros((count, 2), np.float32), "labels": labels}
    store = from_npy(tmp_path / "in", changes, split_fractions=(0.5, 0.3, 0.2))
    parts = [store.split_ids(split) for split in ("train", "valid", "test")]
    assert all((labels[ids] >= 0).all() for ids in parts) and sum(map(len, parts)) == count // 4
    assert 400 < len(parts[0]) < 600
    with pytest.raises(DataError, match="has splits already"):
        from_npy(tmp_path / "two", {"train_ids": np.array([0])}, split_fractions=(0.5, 0.3, 0.2))


MASKS: list[Any] = [
    pa.array([1, None, 0, None, 0, None], pa.int8()),
    pa.array([1.0, None, 0.0, np.nan, 0.0, None]),
    pa.array([True, None, False, None, False, None]),
    pa.array(["true", None, "False", "", "f", "no"]),
    pa.array(["1", None, "0", "0.0", "n", None]),
    pa.array([Decimal(1), None, Decimal(0), None, None, None]),
    pa.array(["yes", None, "no", None, None, None]).dictionary_encode(),
    pa.array([1, None, 0, None, 0, None], pa.uint64()),
    pa.array([1, 0, 0, None, 0, None], pa.float16()),
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask.type))
def test_masks_of_any_type(tmp_path: Path, mask: Any) -> None:
    store = from_parquet(tmp_path / "in", {"train_mask": mask, "test_mask": pa.nulls(N)})
    assert store.split_ids("train").tolist() == [0] and store.split_ids("test").tolist() == []


@EVERYWHERE
def test_masks_of_numbers(tmp_path: Path, source: Source) -> None:
    for n, kind in enumerate((bool, np.uint8, np.int64, np.float32, np.float64)):
        mask = np.array([1, 0, 0, 1, 0, 0]).astype(kind)
        assert source(tmp_path / f"{n}", {"train_mask": mask}).split_ids("train").tolist() == [0, 3]
    with pytest.raises(DataError, match="row 1: train.*=2; a mask holds true and false"):
        source(tmp_path / "two", {"train_mask": np.array([0, 2, 0, 0, 0, 0])})
    with pytest.raises(DataError, match="val_mask and validation_mask are both there|valid_mask and val_mask are both"):
        source(tmp_path / "both", {"val_mask": mask, "valid_mask": mask, "validation_mask": mask})
    with pytest.raises(DataError, match="row 3: the node is in two splits"):
        source(tmp_path / "overlap", {"train_mask": mask, "validation_mask": np.array([0, 1, 0, 1, 0, 0])})


def test_text_that_is_no_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 2: train_mask=maybe; a mask holds true and false"):
        from_parquet(tmp_path / "in", {"train_mask": pa.array(["true", "no", "maybe", None, None, None])})
    with pytest.raises(DataError, match="train_mask is of type timestamp"):
        from_parquet(tmp_path / "in2", {"train_mask": pa.array([0] * N, pa.timestamp("s"))})


def test_empty_splits_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from_npy(tmp_path / "in", {"train_ids": np.array([0, 1])})
    assert "no node is in split valid, test; give" in caplog.text


def test_a_split_column_goes_before_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = from_parquet(
        tmp_path / "in", {"split": [" Train", "VALID", "validation", None, "none", "test"]} | _split([5])
    )
    assert [store.split_ids(split).tolist() for split in ("train", "valid", "test")] == [[0], [1, 2], [5]]
    assert "columns of the node table that are not used: train_mask, val_mask, test_mask" in caplog.text


def test_ids_of_splits_are_those_of_the_nodes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = np.array([3, 2, 1, 0, 40, 50])
    changes = {"node_ids": names, "src": np.array([3, 2]), "dst": np.array([50, 0])}
    store = from_npy(tmp_path / "in", changes | {"train_ids": np.array([3, 50, 3]), "val_ids": np.array([0])})
    assert store.original_ids_of(store.split_ids("train")).tolist() == [3, 50]
    assert store.original_ids_of(store.split_ids("valid")).tolist() == [0]
    assert "train_ids.npy lists 1 of its 3 ids again" in caplog.text
    with pytest.raises(DataError, match="train_ids.npy, row 1: id=4 is in no row"):
        from_npy(tmp_path / "row", changes | {"train_ids": np.array([3, 4])})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_ids": np.array([0.0, 1.0])}, "train_ids.npy holds float64; node ids are integers"),
        ({"train_ids": np.array([True, False, True, False, True, False])}, "a mask is named after its split"),
        ({"train_ids": np.array([[0, 1]])}, r"train_ids.npy holds int64 of shape \[n, 2\]"),
        ({"train_ids": np.array([0, N])}, "train_ids.npy, row 1: id=6 is no node"),
        ({"train_ids": np.array([0, -1])}, "train_ids.npy, row 1: id=-1 is no node"),
        (
            {"train_ids": np.array([2**64 - 1], np.uint64)},
            "train_ids.npy, row 0: id 18446744073709551615 exceeds int64",
        ),
        ({"val_ids": np.array([0]), "valid_ids": np.array([1])}, "valid_ids and val_ids are both there"),
        ({"train_ids": np.array([0]), "train_mask": np.ones(N, bool)}, "both say which nodes are in split 'train'"),
        ({"node_ids": np.array([0, 1, 2, 3, 4, 2**64 - 1], np.uint64)}, "node_ids.npy, row 5: id .* exceeds int64"),
        ({"node_ids": np.arange(N) / 2}, "node_ids.npy holds float64; node ids are integers"),
        ({"src": np.array(SRC, np.uint64) + np.uint64(2**63)}, "src.npy, row 0: id 9223372036854775813 exceeds int64"),
        ({"src": np.array(SRC)[:, None]}, r"src.npy holds int64 of shape \[n, 1\]"),
        ({"weights": np.ones((N, 2))}, "edge_weights.npy has shape .*; an edge has one weight"),
        ({"weights": np.array(["1"] * N)}, "edge_weights.npy is of type <U1; weights are numbers"),
        ({"labels": np.zeros((N, 2, 2))}, "labels.npy has shape .*; give one class per node"),
        ({"labels": np.array(0)}, "labels.npy has no rows"),
        ({"features": np.array([["a"]] * N)}, "features are of type <U1; give numbers"),
        ({"features": np.ones((N, 3), np.complex64)}, "features are of type complex64; give numbers"),
        ({"features": np.ones((N, 3)) * 1e39}, r"row 0: feature 0 is 1e\+39, not a finite float32"),
        ({"edge_index": np.array([SRC, DST])}, "edge_index.npy and src.npy or dst.npy"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_npy(tmp_path / "in", changes)
    assert not (tmp_path / "in" / "out" / "manifest.json").exists()


def test_whole_numbers_that_are_rounded_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        from_npy(tmp_path / "in", {"features": np.array([[0, 2**24], [1, 1_700_000_001]] * 3)})
    assert caplog.text.count("row 1: feature 1 is 1700000001, which float32 rounds") == 1


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_unused_arrays_are_named(tmp_path: Path, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    from_npy(tmp_path / "in", {"edge_attr": np.ones(N), "times": np.ones(N)}, feature_dtype=dtype)
    assert "that are not used: edge_attr.npy, times.npy" in caplog.text
