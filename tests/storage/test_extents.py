from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from penstock.storage.errors import DoesNotFit, FormatError
from penstock.storage.extents import (
    ExtentStream,
    PackWindow,
    Slot,
    delete_windows,
    holders_before,
    item_of,
    verify_extent,
    wait_for_window,
)
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import read_json, write_json
from penstock.storage.pack import PackSetMeta, open_packset, read_pack_index
from penstock.storage.rows import decode_rows
from penstock.storage.tiers import place_rows
from penstock.storage.trace import Trace

Pack = Callable[..., PackSetMeta]


@pytest.mark.parametrize("shared", [False, True])
def test_a_stream_yields_each_extent_with_its_rows(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path, shared: bool
) -> None:
    meta = write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, shared=shared)
    items = list(tiny_trace.items())
    slots = [Slot(meta.max_extent_bytes, limit=meta.max_extent_bytes) for _ in range(2)]
    stream = ExtentStream(tmp_path / "packs", meta, range(14, 34), slots)
    some_shared = 0
    for step in range(14, 34):
        loaded = stream.get()
        extent = verify_extent(loaded)
        assert (loaded.step, loaded.item) == (step, step % 16)
        place = place_rows(loaded.slot.buffer, extent, meta.row_format)
        private = place.rows_at + np.arange(place.num_private) * 20
        starts = np.concatenate([private, place.shared_at])
        rows = place.words[starts[:, None] + np.arange(20)].view(np.float32)
        np.testing.assert_array_equal(rows[extent.source], tiny_graph.features[items[step % 16].input_ids])
        some_shared += extent.head.num_shared
        stream.release(loaded.slot)
    assert (some_shared > 0) == shared and stream.bytes_read > 0
    stream.close()


def test_a_slot_grows_to_its_limit_only() -> None:
    slot = Slot(4096, limit=3 * 4096)
    slot.buffer[:] = 9
    slot.reserve(2 * 4096, keep=4096)
    assert len(slot.buffer) == 8192 and (slot.buffer[:4096] == 9).all()
    with pytest.raises(DoesNotFit, match="an extent takes 20480 bytes"):
        slot.reserve(5 * 4096)


def test_items_of_steps() -> None:
    meta = open_meta(mode="reuse")
    assert [item_of(meta, step) for step in (0, 15, 16, 33)] == [0, 15, 0, 1]
    assert item_of(open_meta(mode="rolling"), 33) == 33


def open_meta(mode: str) -> PackSetMeta:
    return PackSetMeta(
        graph="",
        trace="",
        mode=mode,  # type: ignore[arg-type]
        policy="",
        row_dtype="float32",
        width=1,
        num_nodes=1,
        device_slots=0,
        host_slots=0,
        window_items=3,
        items_per_epoch=8,
        num_items=16,
        max_extent_bytes=0,
        max_inputs=0,
    )


def test_holders_are_replayed_within_the_window(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path
) -> None:
    """The hand packer keeps, after item n, the smallest ids of item n that are not on the device."""
    meta = write_hand_packs(
        tmp_path / "packs", tiny_graph, tiny_trace, host_slots=30, device_slots=10, shared=True, window_items=6
    )
    items = list(tiny_trace.items())
    with PackWindow(tmp_path / "packs", read_pack_index(tmp_path / "packs", 1)) as window:
        assert window.residents()[:10].tolist() == list(range(10))
        for item in range(6, 12):
            held = holders_before(window, item, 10, Slot(meta.max_extent_bytes, limit=meta.max_extent_bytes))
            ids = np.sort(items[item - 1].input_ids)
            assert set(ids[ids >= 10][:30].tolist()) <= set(held.tolist())
        with pytest.raises(FormatError, match="holds items 6..11, not 12"):
            window.load(12, 12, Slot(4096, limit=4096))


def test_an_extent_that_claims_another_item_is_refused(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path
) -> None:
    meta = write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace)
    path = tmp_path / "packs" / "window-000001.json"
    write_json(path, read_json(path) | {"first_item": 2})
    with PackWindow(tmp_path / "packs", read_pack_index(tmp_path / "packs", 1)) as window:
        loaded = window.load(2, 2, Slot(meta.max_extent_bytes, limit=meta.max_extent_bytes))
        with pytest.raises(FormatError, match="extent of item 2 says it is item 3"):
            verify_extent(loaded)


def test_a_missing_window_is_an_error_where_nobody_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="window-000004.json does not exist"):
        wait_for_window(tmp_path, 4, None, lambda: False)


def test_windows_behind_are_deleted_whole(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, mode="rolling")
    delete_windows(tmp_path / "packs", 4)
    left = {path.name for path in (tmp_path / "packs").iterdir() if path.name.startswith("window")}
    assert left == {f"window-{n:06d}.{suffix}" for n in (4, 5) for suffix in ("json", "pack", "residents.npy")}
    assert open_packset(tmp_path / "packs").mode == "rolling"


def test_packed_rows_are_the_encoded_ones(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path
) -> None:
    meta = write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, row_dtype="int8")
    with PackWindow(tmp_path / "packs", read_pack_index(tmp_path / "packs", 0)) as window:
        extent = verify_extent(window.load(0, 0, Slot(meta.max_extent_bytes, limit=meta.max_extent_bytes)))
    ids = np.sort(extent.item.input_ids)
    decoded = decode_rows(extent.rows, meta.row_format)
    scale = np.abs(tiny_graph.features[ids]).max(axis=1, keepdims=True) / 127
    assert (np.abs(decoded - tiny_graph.features[ids]) <= scale * 0.51).all()
