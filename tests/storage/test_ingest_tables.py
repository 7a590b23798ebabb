"""Tables as other tools write them: partitions, hidden entries, Delta logs, and every Arrow encoding of a column."""

import json
import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.storage.errors import DataError
from penstock.storage.graph import GraphStore
from penstock.storage.ingest import IngestOptions, ingest_parquet

N = 6
FEATURES = np.arange(N * 4, dtype=np.float32).reshape(N, 4)
EDGES = {"src": [5, 0, 0, 3], "dst": [1, 1, 2, 4]}


def node_table(**columns: Any) -> pa.Table:
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(FEATURES.reshape(-1)), 4)
    given = {"id": list(range(N)), "feature": fixed, "label": [0, 1, 2] * 2, "split": ["train", "valid", "test"] * 2}
    return pa.table({name: value for name, value in (given | columns).items() if value is not None})


def run(folder: Path, nodes: Any = None, edges: Any = None, **options: Any) -> GraphStore:
    """Ingest tables, or the folders that are there already."""
    folder.mkdir(exist_ok=True)
    for name, table in (("n.parquet", nodes), ("e.parquet", edges)):
        if table is not None:
            pq.write_table(table, folder / name)
    if edges is None and not (folder / "e.parquet").exists():
        pq.write_table(pa.table(EDGES), folder / "e.parquet")
    chosen = IngestOptions(**options)
    return ingest_parquet(folder / "n.parquet", folder / "e.parquet", folder / "out", chosen, host_memory=32 << 20)


def _variable(kind: pa.DataType) -> pa.Array:
    return pa.array(FEATURES.tolist(), kind)


def _tensor() -> pa.Array:
    storage = pa.FixedSizeListArray.from_arrays(pa.array(FEATURES.reshape(-1)), 4)
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [2, 2]), storage)


FEATURE_KINDS: dict[str, pa.Array] = {
    "list": _variable(pa.list_(pa.float64())),
    "large list": _variable(pa.large_list(pa.float32())),
    "half": _variable(pa.list_(pa.float16())),
    "whole": _variable(pa.list_(pa.int64())),
    "bytes": _variable(pa.large_list(pa.uint8())),
    "fixed": _variable(pa.list_(pa.float64(), 4)),
    "tensor": _tensor(),
    "decimal": pa.array([[Decimal(int(v)) for v in row] for row in FEATURES], pa.list_(pa.decimal128(9, 2))),
    "decimal of 256 bits": pa.array(
        [[Decimal(int(v)) for v in row] for row in FEATURES], pa.list_(pa.decimal256(50, 3))
    ),
    "list view": _variable(pa.list_view(pa.float32())),
    "large list view": _variable(pa.large_list_view(pa.float32())),
    "dictionary in a list": pa.ListArray.from_arrays(
        pa.array(range(0, 25, 4), pa.int32()), pa.array(FEATURES.reshape(-1)).dictionary_encode()
    ),
}


@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_features_of_any_list_type(tmp_path: Path, kind: str) -> None:
    store = run(tmp_path, node_table(feature=FEATURE_KINDS[kind]))
    np.testing.assert_array_equal(store.features, FEATURES)


@pytest.mark.parametrize(
    "kind",
    [pa.float16(), pa.float64(), pa.int32(), pa.uint64(), pa.decimal128(8, 2), pa.dictionary(pa.int8(), pa.float32())],
    ids=str,
)
def test_feature_columns_of_any_number_type(tmp_path: Path, kind: pa.DataType) -> None:
    values = [Decimal(n) if pa.types.is_decimal(kind) else n for n in range(N)]
    column = (
        pa.array(values, kind.value_type).dictionary_encode()
        if pa.types.is_dictionary(kind)
        else pa.array(values, kind)
    )
    table = node_table(feature=None, f0=column, f1=pa.array([True, False] * 3))
    store = run(tmp_path, table, feature_prefix="f")
    np.testing.assert_array_equal(store.features, np.stack([np.arange(N), [1, 0] * 3], 1))


ID_KINDS: dict[str, tuple[pa.Array, list[Any]]] = {
    "strings": (pa.array(list("abcdef")), list("abcdef")),
    "large strings": (pa.array(list("abcdef"), pa.large_string()), list("abcdef")),
    "string view": (pa.array(list("abcdef"), pa.string_view()), list("abcdef")),
    "binary": (pa.array([b"a", b"b", b"c", b"d", b"e", b"f"]), list("abcdef")),
    "binary view": (pa.array([b"a", b"b", b"c", b"d", b"e", b"f"], pa.binary_view()), list("abcdef")),
    "dictionary of strings": (pa.array(list("abcdef")).dictionary_encode(), list("abcdef")),
    "dictionary of numbers": (pa.array([9, 8, 7, 6, 5, 4]).dictionary_encode(), [9, 8, 7, 6, 5, 4]),
    "uint64": (pa.array([9, 8, 7, 6, 5, 2**63 - 1], pa.uint64()), [9, 8, 7, 6, 5, 2**63 - 1]),
    "decimal": (pa.array([Decimal(n) for n in (9, 8, 7, 6, 5, 4)], pa.decimal128(20, 0)), [9, 8, 7, 6, 5, 4]),
    "negative": (pa.array([-9, 8, -7, 6, 5, 4], pa.int16()), [-9, 8, -7, 6, 5, 4]),
}


@pytest.mark.parametrize("kind", ID_KINDS)
def test_ids_of_any_type(tmp_path: Path, kind: str) -> None:
    ids, wanted = ID_KINDS[kind]
    plain = ids.cast(pa.string()) if "view" in kind else ids
    ends = {name: plain.take(pa.array(rows)).cast(ids.type) for name, rows in EDGES.items()}
    store = run(tmp_path, node_table(id=ids), pa.table(ends))
    assert list(store.original_ids(0, N)) == wanted
    assert store.indices.tolist() == [0, 5, 0, 3]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": pa.array([0, 1, 2, 3, 4, 2**63], pa.uint64())}, "row 5: id=9223372036854775808 exceeds int64"),
        ({"id": pa.array([Decimal(10) ** 19] * N, pa.decimal128(20, 0))}, "row 0: id=10000000000000000000 exceeds"),
        ({"id": pa.array([0.0, 1, 2, 3, 4, 5])}, "id is of type double; node ids are integers or strings: cast"),
        ({"id": pa.array(["a", None, "c", "d", "e", "f"])}, "row 1: id is null"),
        ({"id": pa.array(["a", None, "c", "d", "e", "f"]).dictionary_encode()}, "row 1: id is null"),
        ({"id": pa.nulls(N)}, "row 0: id is null"),
        ({"id": pa.array([b"\xff"] * N)}, "id holds bytes that are no UTF-8"),
        ({"id": pa.array([True, False] * 3)}, "id is of type bool"),
        ({"id": pa.array(range(N), pa.timestamp("us"))}, r"id is of type timestamp\[us\]"),
        ({"feature": [None, *FEATURES[1:].tolist()]}, "row 0: feature is null"),
        ({"feature": [[], *FEATURES[1:].tolist()]}, "row 0: feature has 0 values, others have 4"),
        ({"feature": [*FEATURES[:3].tolist(), None, *FEATURES[4:].tolist()]}, "row 3: feature is null"),
        ({"feature": [*FEATURES[:3].tolist(), [1.0], *FEATURES[4:].tolist()]}, "row 3: feature has 1 values, others"),
        ({"feature": pa.nulls(N)}, "row 0: feature is null"),
        ({"feature": pa.array([None] * N, pa.list_(pa.float32()))}, "row 0: feature is null"),
        ({"feature": pa.array([[]] * N, pa.list_(pa.float32()))}, "row 0: feature has 0 values"),
        ({"feature": [[[1.0]]] * N}, "feature holds lists of list"),
        ({"feature": pa.array([[0]] * N, pa.list_(pa.timestamp("s")))}, "feature holds lists of timestamp"),
        ({"feature": pa.array([0] * N, pa.date32())}, "feature column 'feature' is of type date32"),
        ({"feature": ["x"] * N}, "feature column 'feature' is of type string"),
        ({"label": pa.array([0] * N, pa.timestamp("s"))}, "label is of type timestamp"),
        ({"label": pa.array([[], None] * 3, pa.list_(pa.int8()))}, "every list of label is null or empty"),
        (
            {"split": pa.array([0, 1, 2] * 2)},
            "split is of type int64; give train, .* called train_mask, valid_mask and test_mask",
        ),
        ({"split": ["train", "dev"] * 3}, "row 1: split='dev'; give train, valid, test or none"),
    ],
)
def test_columns_that_cannot_be_read_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(tmp_path, node_table(**columns))


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_splits_of_any_string_type(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(["train", None, "val", "test", "none", "train"])
    column = values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind)
    store = run(tmp_path, node_table(split=column))
    assert [store.split_ids(split).tolist() for split in ("train", "valid", "test")] == [[0, 5], [2], [3]]


def test_parts_may_order_columns_and_type_them_otherwise(tmp_path: Path) -> None:
    """Each part as a writer that looks at its own rows would type it: null throughout, narrower, in another order."""
    table = node_table(label=[2, 1, None, None, None, None], split=["train", "test", None, None, None, None])
    (tmp_path / "n.parquet").mkdir(parents=True)
    first = table.slice(0, 2).set_column(2, "label", pa.array([2, 1], pa.int8()))
    middle = table.slice(2, 2)
    for name in ("label", "split"):
        middle = middle.set_column(middle.schema.get_field_index(name), name, pa.nulls(2))
    middle = middle.set_column(1, "feature", _variable(pa.large_list(pa.float64())).slice(2, 2))
    last = table.slice(4, 2).set_column(2, "label", pa.array([None, np.nan], pa.float64())).select([3, 2, 1, 0])
    empty = pa.table({name: pa.nulls(0) for name in table.column_names})
    for n, part in enumerate((empty, middle, first, last)):
        pq.write_table(part, tmp_path / "n.parquet" / f"part-{n}.parquet")
    store = run(tmp_path)
    assert store.original_ids(0, N).tolist() == [2, 3, 0, 1, 4, 5]
    assert store.labels.tolist() == [-1, -1, 2, 1, -1, -1] and store.split_ids("train").tolist() == [2]
    np.testing.assert_array_equal(store.features, FEATURES[[2, 3, 0, 1, 4, 5]])


def test_parts_of_the_edge_table_may_be_empty(tmp_path: Path) -> None:
    (tmp_path / "e.parquet").mkdir(parents=True)
    pq.write_table(pa.table({"src": pa.nulls(0), "dst": pa.nulls(0)}), tmp_path / "e.parquet" / "0.parquet")
    pq.write_table(pa.table(EDGES), tmp_path / "e.parquet" / "1.parquet")
    names = pa.array(list("abcdef"))
    ends = {name: names.take(pa.array(rows)) for name, rows in EDGES.items()}
    assert run(tmp_path, node_table()).num_edges == 4
    pq.write_table(pa.table(ends), tmp_path / "e.parquet" / "1.parquet")
    (tmp_path / "text").mkdir()
    pq.write_table(node_table(id=names), tmp_path / "n.parquet")
    store = ingest_parquet(
        tmp_path / "n.parquet", tmp_path / "e.parquet", tmp_path / "text", IngestOptions(), host_memory=32 << 20
    )
    assert store.num_edges == 4


def test_parts_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    (tmp_path / "n.parquet").mkdir(parents=True)
    pq.write_table(node_table(), tmp_path / "n.parquet" / "0.parquet")
    pq.write_table(node_table(label=["a"] * N, id=list(range(N, 2 * N))), tmp_path / "n.parquet" / "1.parquet")
    with pytest.raises(DataError, match="1.parquet: column 'label' is of type string here and int64 in a file before"):
        run(tmp_path)
    pq.write_table(node_table(split=None), tmp_path / "n.parquet" / "1.parquet")
    with pytest.raises(DataError, match="1.parquet has columns"):
        run(tmp_path)
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["src", "src"])
    with pytest.raises(DataError, match="has two columns 'src'"):
        run(tmp_path / "x", node_table(), twice)


def test_partitions_are_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = node_table(split=["train", "valid", "test", "train", None, "valid"], day=["2026-01-01"] * N)
    pq.write_to_dataset(table, tmp_path / "n.parquet", partition_cols=["split", "day"])
    edges = pa.table(EDGES | {"weight": [1, 2, 2, 1]})
    pq.write_to_dataset(edges, tmp_path / "e.parquet", partition_cols=["weight"])
    store = run(tmp_path)
    ids = {split: store.original_ids_of(store.split_ids(split)).tolist() for split in ("train", "valid", "test")}
    assert {split: sorted(found) for split, found in ids.items()} == {"train": [0, 3], "valid": [1, 5], "test": [2]}
    assert store.edge_weights is not None and sorted(store.edge_weights.tolist()) == [1, 1, 2, 2]
    assert "columns of the node table that are not used: day" in caplog.text


def test_partitions_may_hold_labels_ids_and_odd_characters(tmp_path: Path) -> None:
    table = node_table(label=["a b", "c/d", "e=f"] * 2)
    pq.write_to_dataset(table, tmp_path / "n.parquet", partition_cols=["label"])
    store = run(tmp_path, remap_labels=True)
    assert store.class_values == ["a b", "c/d", "e=f"]
    whole = node_table(label=[0, 1, 2] * 2)
    pq.write_to_dataset(whole, tmp_path / "w" / "n.parquet", partition_cols=["label", "id"])
    store = run(tmp_path / "w")
    found = dict(zip(store.original_ids(0, N).tolist(), store.labels.tolist(), strict=True))
    assert found == {n: n % 3 for n in range(N)}


def test_files_of_different_partitions_are_refused(tmp_path: Path) -> None:
    for folder in ("split=train", "day=1"):
        (tmp_path / "n.parquet" / folder).mkdir(parents=True)
        pq.write_table(node_table(split=None), tmp_path / "n.parquet" / folder / "0.parquet")
    with pytest.raises(DataError, match="partitioned differently"):
        run(tmp_path)


def test_hidden_entries_are_no_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "n.parquet"
    (folder / "_temporary" / "0").mkdir(parents=True)
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "deep").mkdir()
    pq.write_table(node_table().slice(0, 4), folder / "part-0.snappy.parquet")
    pq.write_table(node_table().slice(4), folder / "deep" / "part-1")  # without a suffix, as some jobs write
    stray = node_table(id=list(range(100, 100 + N)))
    for name in ("_temporary/0/part-9.parquet", ".ipynb_checkpoints/a.parquet", "_metadata", "._part-0.parquet"):
        pq.write_table(stray, folder / name)
    for name in ("_SUCCESS", ".part-0.snappy.parquet.crc", "_metadata.crc", "notes.txt"):
        (folder / name).write_text("")
    store = run(tmp_path)
    assert store.num_nodes == N and store.meta.original_ids == "int64"
    assert "has _temporary: a job" in caplog.text and "no Parquet are not read: ['notes.txt']" in caplog.text


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(parents=True)
    pq.write_table(node_table(), tmp_path / "elsewhere" / "0.parquet")
    (tmp_path / "n.parquet").mkdir()
    (tmp_path / "n.parquet" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "n.parquet")
    assert run(tmp_path).num_nodes == N


def _commit(folder: Path, version: int, *actions: dict[str, Any]) -> None:
    log = folder / "_delta_log"
    log.mkdir(parents=True, exist_ok=True)
    (log / f"{version:020d}.json").write_text("\n".join(json.dumps(action) for action in actions))


def _delta(folder: Path) -> None:
    folder.mkdir(parents=True)
    pq.write_table(node_table(), folder / "a.parquet")
    _commit(folder, 0, {"metaData": {"configuration": {}}}, {"add": {"path": "a.parquet"}})


def test_delta_tables_without_stale_files_are_read(tmp_path: Path) -> None:
    _delta(tmp_path / "n.parquet")
    assert run(tmp_path).num_nodes == N


def test_stale_files_of_table_formats_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "n.parquet"
    _delta(folder)
    pq.write_table(node_table(id=list(range(N, 2 * N))), folder / "b.parquet")
    with pytest.raises(
        DataError, match="1 of 2 files of the node table are no longer in its newest version, b.parquet"
    ):
        run(tmp_path)
    _commit(folder, 1, {"remove": {"path": "a.parquet"}}, {"add": {"path": "b.parquet"}})
    with pytest.raises(DataError, match=r"no longer in its newest version, a.parquet .*write.parquet.* VACUUM"):
        run(tmp_path)
    (folder / "a.parquet").unlink()  # what VACUUM does
    assert run(tmp_path, edges=pa.table({"src": [N], "dst": [N]})).original_ids(0, 1).tolist() == [N]
    _commit(folder, 2, {"add": {"path": "b.parquet", "deletionVector": {"storageType": "u"}}})
    with pytest.raises(DataError, match="deletion vectors"):
        run(tmp_path)
    (folder / "_delta_log" / f"{0:020d}.json").unlink()
    with pytest.raises(DataError, match="does not begin at version 0"):
        run(tmp_path)
    for n, marker in enumerate((".hoodie", "_spark_metadata", "metadata")):
        place = tmp_path / f"{n}" / "n.parquet"
        (place / marker).mkdir(parents=True)
        (place / "metadata" / "v1.metadata.json").write_text("{}") if marker == "metadata" else None
        pq.write_table(node_table(), place / "0.parquet")
        with pytest.raises(DataError, match="keeps files that are no longer in it; write its current rows"):
            run(tmp_path / f"{n}")


def test_unused_columns_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edges = pa.table(EDGES | {"edge_attr": [[1.0]] * 4, "etype": ["buys"] * 4, "time": [0] * 4})
    with caplog.at_level(logging.WARNING):
        run(tmp_path, node_table(type=["user"] * N, **{f"x{n}": [0] * N for n in range(30)}), edges)
    assert caplog.text.count("columns of the edge table that are not used: edge_attr, etype, time") == 1
    assert "not used: type, x0, x1" in caplog.text and "and 11 more" in caplog.text


def test_ids_and_labels_under_other_names_are_missed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Columns that were not found are named with the option that finds them, not by what follows from their lack."""
    nodes = pa.table({"key": list("abcdef"), "feature": [[1.0]] * N, "class": [0, 1] * 3})
    edges = pa.table({"src": ["a", "b"], "dst": ["c", "d"]})
    message = r"no column 'id', .* src and dst of the edge table hold strings; name .* --set id_column=.*'key'"
    with pytest.raises(DataError, match=message):
        run(tmp_path, nodes, edges)
    run(tmp_path / "named", nodes, edges, id_column="key")
    assert "the node table has no column 'label'; name yours with --set label_column=" in caplog.text
    caplog.clear()
    run(tmp_path / "labelled", nodes, edges, id_column="key", label_column="class")
    assert "no node has a label" not in caplog.text
