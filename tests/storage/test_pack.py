"""The pack format: what is written is read back, what is damaged is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.storage.directio import PAGE
from penstock.storage.errors import FormatError
from penstock.storage.manifest import read_json, write_json
from penstock.storage.pack import (
    ExtentHead,
    PackIndex,
    PackSetMeta,
    decode_extent,
    decode_extent_head,
    encode_extent_head,
    feed_memory,
    has_window,
    is_complete,
    layout_extent,
    open_packset,
    publish_packset,
    read_pack_index,
    trace_digest,
    write_pack_index,
    write_packset,
)
from penstock.storage.trace import Trace, window_name

SIZES = ("payload_bytes", "num_inputs", "num_admits", "num_runs", "num_shared", "num_rows")
META = PackSetMeta(
    graph="g",
    trace="t",
    mode="reuse",
    policy="belady",
    row_dtype="int8",
    width=6,
    num_nodes=9,
    device_slots=1,
    host_slots=2,
    window_items=4,
    items_per_epoch=5,
    num_items=10,
    max_extent_bytes=PAGE,
    max_inputs=7,
)
INDEX = PackIndex(
    window=2,
    first_item=8,
    offsets=(0, PAGE),
    bytes=(PAGE, PAGE),
    max_inputs=7,
    xxh3=("a", "b"),
    shared_bytes=0,
    residents_xxh3="",
)


def make_head(**sizes: int) -> ExtentHead:
    return layout_extent(item=3, row_bytes=12, **{name: sizes.get(name, 0) for name in SIZES})


@given(st.fixed_dictionaries({name: st.integers(0, 3000) for name in SIZES}))
def test_sections_follow_each_other_without_overlap(sizes: dict[str, int]) -> None:
    head = make_head(**sizes)
    ends = [192, head.payload_offset + head.payload_bytes, head.source_offset + 4 * head.num_inputs]
    ends += [head.admit_offset + 8 * head.num_admits, head.runs_offset + 16 * head.num_runs]
    ends += [head.shared_offset + 8 * head.num_shared, head.rows_offset + 12 * head.num_rows]
    starts = [head.payload_offset, head.source_offset, head.admit_offset, head.runs_offset, head.shared_offset]
    starts += [head.rows_offset, head.extent_bytes]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))
    assert all(start % 64 == 0 for start in starts) and head.extent_bytes % PAGE == 0
    assert head.extent_bytes - ends[-1] < PAGE


def test_heads_survive_the_way_to_bytes() -> None:
    head, extent = make_head(num_rows=500, payload_bytes=99), np.zeros(3 * PAGE, np.uint8)
    encode_extent_head(head, extent)
    assert decode_extent_head(extent) == head
    assert bytes(extent[:8]) == b"PENKTEXT"  # little-endian, whatever the machine


@pytest.mark.parametrize("damage", ["magic", "version", "cut", "short"])
def test_damaged_heads_are_refused(damage: str) -> None:
    extent = np.zeros(2 * PAGE, np.uint8)
    encode_extent_head(make_head(num_rows=500), extent)
    if damage in ("magic", "version"):
        extent.view("<i8")[0 if damage == "magic" else 1] += 1
    with pytest.raises(FormatError, match="cut" if damage == "cut" else "no pack extent"):
        decode_extent_head(extent[: {"cut": PAGE, "short": 100}.get(damage, len(extent))])


def test_extents_are_views_of_their_bytes(tiny_trace: Trace) -> None:
    payload = tiny_trace.window(0).payload(1)
    inputs = len(tiny_trace.window(0).item(1).input_ids)
    head = make_head(payload_bytes=len(payload), num_inputs=inputs, num_admits=2, num_runs=1, num_shared=3, num_rows=5)
    extent = np.zeros(head.extent_bytes, np.uint8)
    encode_extent_head(head, extent)
    extent[head.payload_offset :][: len(payload)] = payload
    sections: dict[int, Any] = {
        head.source_offset: np.arange(inputs, dtype="<i4"),
        head.admit_offset: np.array([4, 2, 1, 0], "<i4"),
        head.runs_offset: np.array([7, 2], "<i8"),
        head.shared_offset: np.array([0, 12, 4000], "<i8"),
        head.rows_offset: np.arange(60, dtype=np.uint8),
    }
    for offset, values in sections.items():
        extent[offset : offset + values.nbytes] = values.view(np.uint8)
    found = decode_extent(extent)
    assert found.head == head and found.item.index == tiny_trace.window(0).item(1).index
    assert np.array_equal(found.source, sections[head.source_offset])
    assert (found.admit_rows.tolist(), found.admit_slots.tolist()) == ([4, 2], [1, 0])
    assert (found.shared_runs.tolist(), found.shared_offsets.tolist()) == ([[7, 2]], [0, 12, 4000])
    assert np.array_equal(found.rows, np.arange(60).reshape(5, 12))
    assert found.rows.base is not None and np.shares_memory(found.rows, extent)


def test_pack_sets_are_complete_when_published(tmp_path: Path) -> None:
    write_packset(tmp_path, META)
    assert open_packset(tmp_path) == META and not is_complete(tmp_path)
    assert (META.num_windows, META.row_format.row_bytes) == (3, 10)
    publish_packset(tmp_path, META)
    assert not is_complete(tmp_path)
    for window in range(3):
        (tmp_path / window_name(window, "pack")).write_bytes(bytes(2 * PAGE))
        write_pack_index(tmp_path, replace(INDEX, window=window))
    assert is_complete(tmp_path)
    (tmp_path / window_name(1, "json")).unlink()
    assert not is_complete(tmp_path)


@pytest.mark.parametrize("change", [{"version": 1}, {"format": "penstock/trace"}, {"meta": {"graph": "g"}}])
def test_foreign_pack_sets_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_packset(tmp_path, META)
    path = tmp_path / "packset.json"
    write_json(path, read_json(path) | change)
    with pytest.raises(FormatError, match="run the command that packs .* again: it packs anew"):
        open_packset(tmp_path)


def test_a_window_is_there_when_its_index_is(tmp_path: Path) -> None:
    (tmp_path / window_name(2, "pack")).write_bytes(bytes(2 * PAGE))
    assert not has_window(tmp_path, 2)
    write_pack_index(tmp_path, INDEX)
    assert has_window(tmp_path, 2) and read_pack_index(tmp_path, 2) == INDEX
    (tmp_path / window_name(2, "pack")).write_bytes(bytes(PAGE))
    with pytest.raises(FormatError, match="8192"):
        read_pack_index(tmp_path, 2)


def test_the_digest_of_a_trace_follows_its_settings(tiny_trace: Trace) -> None:
    meta = tiny_trace.meta
    assert trace_digest(meta) == trace_digest(replace(meta))
    assert trace_digest(meta) != trace_digest(replace(meta, seed=meta.seed + 1))


def test_a_feed_needs_its_tier_two_extents_and_two_batches() -> None:
    assert feed_memory(host_slots=3, row_bytes=10, max_extent_bytes=100, max_inputs=7, width=2) == 30 + 200 + 112
