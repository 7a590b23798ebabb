"""Payloads, windows and manifests of traces: round trips, golden bytes, damage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.storage.errors import DataError, FormatError
from penstock.storage.items import BlockArrays, Item, decode_item, encode_item, payload_bytes
from penstock.storage.manifest import read_json, write_json
from penstock.storage.trace import (
    TraceMeta,
    TraceWindow,
    has_window,
    open_trace,
    publish_trace,
    read_window_index,
    verify_whole_window,
)
from penstock.storage.trace_writer import (
    TraceWindowWriter,
    begin_trace,
    read_trace_head,
)

OLD = Path(__file__).parent / "golden" / "trace_v1"
GOLDEN = OLD.with_name("trace_v2")
META = TraceMeta(
    graph="00ff",
    num_nodes=100,
    seed=3,
    fanouts=(2, -1),
    method="uniform",
    replace=False,
    weighted=False,
    batch_size=2,
    split="train",
    num_epochs=1,
    items_per_epoch=3,
    window_items=2,
    degrees=True,
)


def _item(
    index: int,
    *,
    wide: bool = False,
    classes: int = 0,
    degrees: bool = True,
    weights: bool = True,
    loops: bool = False,
    draws: bool = False,
) -> Item:
    """An item of two layers, 2 seeds, 3 and 5 sources, that is the same every time."""

    def block(num_src: int, num_dst: int, counts: list[int]) -> BlockArrays:
        indptr = np.cumsum([0, *counts]).astype(np.int32)
        indices = (np.arange(indptr[-1]) % num_src).astype(np.int32)
        edge_weights = (indices + 0.5).astype(np.float32) if weights else None
        values = {"edge_weights": edge_weights, "draw_weights": indices.astype(np.float32) if draws else None}
        return BlockArrays(num_src=num_src, num_dst=num_dst, indptr=indptr, indices=indices, **values)

    labels = np.array([2, -1], np.int32)
    return Item(
        index=index,
        epoch=0,
        num_seeds=2,
        input_ids=np.array([7, 3, 99, 0, 50], np.int64 if wide else np.int32),
        labels=np.eye(2, classes, dtype=np.uint8) if classes else labels,
        degrees=np.arange(5, dtype=np.int32) if degrees else None,
        blocks=(block(5, 3, [2, 0, 3]), block(3, 2, [1, 1])),
        loops=np.array([0, 2, 0, 0, 1], np.int32) if loops else None,
    )


def _encoded(item: Item) -> NDArray[np.uint8]:
    out = np.full(payload_bytes(item) + 100, 0xAA, np.uint8)
    size = encode_item(item, out)
    assert size == payload_bytes(item) and (out[size:] == 0xAA).all()
    return out[:size]


def _assert_equal(a: Item, b: Item) -> None:
    assert (a.index, a.epoch, a.num_seeds, len(a.blocks)) == (b.index, b.epoch, b.num_seeds, len(b.blocks))
    pairs: list[tuple[Any, Any]] = [(a.input_ids, b.input_ids), (a.labels, b.labels), (a.degrees, b.degrees)]
    pairs.append((a.loops, b.loops))
    for x, y in zip(a.blocks, b.blocks, strict=True):
        assert (x.num_src, x.num_dst) == (y.num_src, y.num_dst)
        pairs += [(x.indptr, y.indptr), (x.indices, y.indices), (x.edge_weights, y.edge_weights)]
        pairs.append((x.draw_weights, y.draw_weights))
    for mine, theirs in pairs:
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)


@settings(max_examples=40, deadline=None)
@given(
    index=st.integers(0, 2**40),
    wide=st.booleans(),
    classes=st.integers(0, 70),
    degrees=st.booleans(),
    weights=st.booleans(),
    loops=st.booleans(),
    draws=st.booleans(),
)
def test_items_survive_the_round_trip(
    index: int, wide: bool, classes: int, degrees: bool, weights: bool, loops: bool, draws: bool
) -> None:
    item = _item(index, wide=wide, classes=classes, degrees=degrees, weights=weights, loops=loops, draws=draws)
    payload = _encoded(item)
    assert len(payload) % 64 == 0
    assert payload[8:16].view("<i8")[0] == (2 if loops or draws else 1)  # releases that know neither refuse them
    found = decode_item(payload)
    _assert_equal(found, item)
    assert np.shares_memory(found.input_ids, payload)
    np.testing.assert_array_equal(found.seeds, [7, 3])


def test_an_item_without_edges_or_neighbours() -> None:
    block = BlockArrays(num_src=1, num_dst=1, indptr=np.zeros(2, np.int32), indices=np.zeros(0, np.int32))
    labels, ids = np.zeros(1, np.int32), np.zeros(1, np.int32)
    item = Item(index=0, epoch=0, num_seeds=1, input_ids=ids, labels=labels, degrees=None, blocks=(block,))
    _assert_equal(decode_item(_encoded(item)), item)


def test_damaged_payloads_are_refused() -> None:
    payload = _encoded(_item(0))
    with pytest.raises(FormatError, match="is cut"):
        decode_item(payload[:-64])
    with pytest.raises(FormatError, match="no item payload"):
        decode_item(payload[:8])
    for byte in (0, 8):  # the magic, the version
        damaged = payload.copy()
        damaged[byte] ^= 1
        with pytest.raises(FormatError, match="no item payload"):
            decode_item(damaged)


def _write(folder: Path) -> None:
    begin_trace(folder, META)
    for window in range(META.num_windows):
        with TraceWindowWriter(folder, META, window) as writer:
            for index in range(*META.window_range(window)):
                writer.append(_encoded(_item(index)))
    publish_trace(folder, META)


@pytest.mark.parametrize("folder", [OLD, GOLDEN], ids=lambda folder: folder.name)
def test_traces_of_every_version_are_read_forever(folder: Path) -> None:
    trace = open_trace(folder)
    assert trace.meta == read_trace_head(folder) == META
    items = list(trace.items())
    assert len(items) == 3
    for index, item in enumerate(items):
        _assert_equal(item, _item(index))
    for window in range(2):
        verify_whole_window(folder, read_window_index(folder, window))


def test_the_writer_writes_the_golden_bytes(tmp_path: Path) -> None:
    _write(tmp_path / "t")
    assert {p.name: p.read_bytes() for p in (tmp_path / "t").iterdir()} == {
        p.name: p.read_bytes() for p in GOLDEN.iterdir()
    }


def test_payloads_start_on_pages(tmp_path: Path) -> None:
    _write(tmp_path / "t")
    index = read_window_index(tmp_path / "t", 0)
    assert index.offsets == (0, 4096) and index.num_inputs == (5, 5) and index.num_edges == (7, 7)
    window = TraceWindow(tmp_path / "t", index)
    assert len(window) == 2 and window.items[1].index == 1


def test_an_error_leaves_no_window(tmp_path: Path) -> None:
    begin_trace(tmp_path / "t", META)
    with pytest.raises(RuntimeError, match="sampling failed"), TraceWindowWriter(tmp_path / "t", META, 0) as writer:
        writer.append(_encoded(_item(0)))
        raise RuntimeError("sampling failed")
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["trace.json"]
    assert not has_window(tmp_path / "t", 0)
    with pytest.raises(FormatError, match="does not exist"):
        read_window_index(tmp_path / "t", 0)


def test_damaged_windows_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "t")
    index, path = read_window_index(tmp_path / "t", 0), tmp_path / "t" / "window-000000.trace"
    data = bytearray(path.read_bytes())
    data[4200] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="has another checksum; the disk damaged it: run the same command again"):
        open_trace(tmp_path / "t").window(0).payload(1)
    assert not has_window(tmp_path / "t", 0) and has_window(tmp_path / "t", 1)
    _write(tmp_path / "t")
    path.write_bytes(data)
    with pytest.raises(FormatError, match="checksum"):
        verify_whole_window(tmp_path / "t", index)
    _write(tmp_path / "t")
    path.write_bytes(data[:4096])
    with pytest.raises(FormatError, match="truncated"):
        read_window_index(tmp_path / "t", 0)
    (tmp_path / "t" / "window-000001.json").write_text('{"window": 1}')
    with pytest.raises(FormatError, match="malformed"):
        read_window_index(tmp_path / "t", 1)


def test_a_begun_trace_keeps_its_settings(tmp_path: Path) -> None:
    assert read_trace_head(tmp_path / "t") is None
    begin_trace(tmp_path / "t", META)
    begin_trace(tmp_path / "t", META)
    with pytest.raises(DataError, match=r"batch_size \(there 2, now 9\), shuffle \(there True, now False\)"):
        begin_trace(tmp_path / "t", replace(META, batch_size=9, shuffle=False))
    with pytest.raises(FormatError, match="not complete"):
        open_trace(tmp_path / "t")
    (tmp_path / "t" / "trace.json").write_text('{"format": "penstock/trace", "version": 1, "meta": {"fanouts": []}}')
    with pytest.raises(FormatError, match="malformed"):
        read_trace_head(tmp_path / "t")
    (tmp_path / "t" / "trace.json").write_text('{"format": "penstock/trace", "version": 3, "meta": {}}')
    with pytest.raises(FormatError, match="version 3"):
        read_trace_head(tmp_path / "t")


def test_manifests_with_other_keys_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "t")
    path = tmp_path / "t" / "manifest.json"
    value = read_json(path)
    value["meta"]["spilt"] = value["meta"].pop("split")
    write_json(path, value)
    with pytest.raises(FormatError, match="malformed"):
        open_trace(tmp_path / "t")
