import gc
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.engine.feed import open_pack_feed
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.minibatch import MiniBatch
from penstock.engine.prefetch import Feed
from penstock.storage.errors import DoesNotFit, FormatError
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import read_json, write_json
from penstock.storage.npyfile import write_npy
from penstock.storage.pack import PackSetMeta, feed_memory, read_pack_index, write_pack_index, write_packset
from penstock.storage.rows import ROW_DTYPES, RowDtype
from penstock.storage.trace import Trace

Pack = Callable[..., PackSetMeta]
MEMORY = 64 << 20
STEPS = 40  # two and a half laps of sixteen items


def content(batch: MiniBatch) -> tuple[Any, ...]:
    """Everything of a batch, as bytes."""
    tensors = [batch.input_ids, batch.labels, batch.features]
    for block in batch.blocks:
        tensors += [block.indptr, block.indices]
        tensors += [t for t in (block.edge_weights, block.src_degrees) if t is not None]
    return (batch.step, batch.item, batch.epoch, batch.num_seeds, *(t.numpy().tobytes() for t in tensors))


def in_memory(graph: GraphStore, trace: Trace, row_dtype: RowDtype = "float32") -> list[tuple[Any, ...]]:
    with open_memory_feed(graph, trace, start_step=0, stop_step=STEPS, row_dtype=row_dtype) as feed:
        return [content(batch) for batch in feed]


def feed_of(packs: Path, graph: GraphStore, *, start: int = 0, stop: int = STEPS, **options: Any) -> Feed:
    return open_pack_feed(
        packs, graph, **{"start_step": start, "stop_step": stop, "host_memory": MEMORY, "threads": 2, **options}
    )


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """After the test, every thread of a feed must have ended."""
    yield
    deadline = time.monotonic() + 10
    while left := [t.name for t in threading.enumerate() if t.name in ("penstock-read", "penstock-assemble")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
@pytest.mark.parametrize(
    ("device_slots", "host_slots", "shared"),
    [(0, 0, False), (0, 60, False), (0, 60, True), (25, 0, True), (25, 60, False), (25, 400, True)],
)
def test_out_of_core_equals_in_memory(
    tiny_graph: GraphStore,
    tiny_trace: Trace,
    write_hand_packs: Pack,
    tmp_path: Path,
    row_dtype: RowDtype,
    device_slots: int,
    host_slots: int,
    shared: bool,
) -> None:
    write_hand_packs(
        tmp_path / "packs",
        tiny_graph,
        tiny_trace,
        row_dtype=row_dtype,
        device_slots=device_slots,
        host_slots=host_slots,
        shared=shared,
    )
    expected = in_memory(tiny_graph, tiny_trace, row_dtype)
    with feed_of(tmp_path / "packs", tiny_graph) as feed:
        assert [content(batch) for batch in feed] == expected
        stats = feed.stats
    assert stats.items == STEPS and (stats.host_rows > 0) == (host_slots > 0)
    assert (stats.device_rows > 0) == (device_slots > 0)
    assert sum(stats.hit_rates.values()) == pytest.approx(1)
    # A feed that starts at any step restores the tiers that steps before it would have left.
    for start in (1, 7, 15, 16, 29, 38):
        with feed_of(tmp_path / "packs", tiny_graph, start=start, stop=min(STEPS, start + 5)) as feed:
            assert [content(batch) for batch in feed] == expected[start : start + 5]


def test_a_saved_position_goes_on_exactly(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, host_slots=60)
    expected = in_memory(tiny_graph, tiny_trace)
    with feed_of(tmp_path / "packs", tiny_graph) as feed:
        for _ in range(11):
            next(feed)
        state = feed.state_dict()
    with feed_of(tmp_path / "packs", tiny_graph) as other:
        next(other)
        other.load_state_dict(state)
        assert len(other) == STEPS - 11
        assert [content(batch) for batch in other] == expected[11:]


def test_a_batch_is_valid_until_the_next_and_a_clone_longer(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, host_slots=60)
    expected = in_memory(tiny_graph, tiny_trace)
    with feed_of(tmp_path / "packs", tiny_graph) as feed:
        first = next(feed)
        time.sleep(0.1)  # the feed runs ahead as far as it can
        assert content(first) == expected[0]
        copy = first.clone()
        for batch in feed:
            last = content(batch)
            with pytest.raises(RuntimeError, match=r"taken back features of step 0: .*use batch.clone\(\)"):
                _ = first.features
    with pytest.raises(RuntimeError, match="taken back blocks"):
        _ = batch.blocks  # the feed is closed
    assert content(copy) == expected[0] and last == expected[-1] and first.step == 0
    assert not hasattr(copy, "no_such_thing")


def test_buffers_are_reused(tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, host_slots=60)
    with feed_of(tmp_path / "packs", tiny_graph) as feed:
        assert len({batch.features.data_ptr() for batch in feed}) == 2


def test_the_smallest_budget_is_named_and_works(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path
) -> None:
    meta = write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, host_slots=60)
    smallest = feed_memory(
        host_slots=60,
        row_bytes=80,
        max_extent_bytes=meta.max_extent_bytes,
        max_inputs=meta.max_inputs,
        width=20,
    )
    with pytest.raises(DoesNotFit, match=f"at least {smallest} bytes"):
        feed_of(tmp_path / "packs", tiny_graph, host_memory=smallest - 1)
    with feed_of(tmp_path / "packs", tiny_graph, host_memory=smallest) as feed:
        assert [content(batch) for batch in feed] == in_memory(tiny_graph, tiny_trace)


def test_an_extent_larger_than_the_ring_is_refused(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path, no_thread_left: None
) -> None:
    meta = write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace)
    write_packset(tmp_path / "packs", replace(meta, max_extent_bytes=4096))
    needs = feed_memory(host_slots=0, row_bytes=80, max_extent_bytes=4096, max_inputs=meta.max_inputs, width=20)
    with feed_of(tmp_path / "packs", tiny_graph, host_memory=needs) as feed:
        with pytest.raises(DoesNotFit, match="raise --host-memory"):
            next(feed)


@pytest.mark.parametrize("shared", [False, True])
def test_a_flipped_byte_surfaces_and_ends_the_feed(
    tiny_graph: GraphStore,
    tiny_trace: Trace,
    write_hand_packs: Pack,
    tmp_path: Path,
    shared: bool,
    no_thread_left: None,
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, host_slots=60, shared=shared)
    index = read_pack_index(tmp_path / "packs", 1)
    path = tmp_path / "packs" / "window-000001.pack"
    with path.open("r+b") as file:
        file.seek(index.offsets[1] + 3000)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    with feed_of(tmp_path / "packs", tiny_graph) as feed:
        with pytest.raises(FormatError, match=r"window-000001.pack: the extent of item 4 has checksum"):
            for batch in feed:
                assert batch.step < 4
        with pytest.raises(ValueError, match="closed"):
            next(feed)


def test_a_damaged_shared_segment_surfaces(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path, no_thread_left: None
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, shared=True)
    with (tmp_path / "packs" / "window-000002.pack").open("r+b") as file:
        file.write(b"damage")
    with (
        feed_of(tmp_path / "packs", tiny_graph) as feed,
        pytest.raises(FormatError, match="page 0 of the shared"),
    ):
        for batch in feed:
            assert batch.step < 6


def test_a_file_truncated_under_the_feed_surfaces(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path, no_thread_left: None
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, window_items=16)
    index = read_pack_index(tmp_path / "packs", 0)
    with feed_of(tmp_path / "packs", tiny_graph) as feed:
        next(feed)
        # The index was read; now the file loses all but the first items.
        os.truncate(tmp_path / "packs" / "window-000000.pack", index.offsets[8])
        with pytest.raises(FormatError, match="window-000000.pack: read 0 of .* the file is truncated"):
            for batch in feed:
                assert batch.step < 16 + 8
    with feed_of(tmp_path / "packs", tiny_graph) as feed, pytest.raises(FormatError, match="000000.json does not"):
        next(feed)


def test_a_missing_window_surfaces(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path, no_thread_left: None
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace)
    (tmp_path / "packs" / "window-000002.json").unlink()
    with feed_of(tmp_path / "packs", tiny_graph) as feed, pytest.raises(FormatError, match="window-000002.json"):
        for batch in feed:
            assert batch.step < 6


def test_packs_with_impossible_codes_are_refused(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path
) -> None:
    """A packer's bug, with right checksums: the kernels would read anywhere."""
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, host_slots=60)
    path = tmp_path / "packs" / "packset.json"
    value = read_json(path)
    value["meta"]["host_slots"] = 20
    write_json(path, value)
    for window in range(6):
        residents = tmp_path / "packs" / f"window-{window:06d}.residents.npy"
        entry = write_npy(residents, np.load(residents)[:20])
        index = read_pack_index(tmp_path / "packs", window)
        write_pack_index(tmp_path / "packs", replace(index, residents_xxh3=entry.xxh3))
    with (
        feed_of(tmp_path / "packs", tiny_graph) as feed,
        pytest.raises((FormatError, ValueError), match="names row|slot"),
    ):
        list(feed)


def test_packs_of_another_graph_are_refused(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace)
    path = tmp_path / "packs" / "packset.json"
    value = read_json(path)
    value["meta"]["graph"] = "0" * 16
    write_json(path, value)
    with pytest.raises(FormatError, match="another graph"):
        feed_of(tmp_path / "packs", tiny_graph)


def test_a_consumer_that_leaves_early_stops_all_threads(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path, no_thread_left: None
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, host_slots=60)
    with feed_of(tmp_path / "packs", tiny_graph, stop=10**9) as feed:
        for batch in feed:
            if batch.step == 3:
                break
    assert not {"penstock-read", "penstock-assemble"} & {t.name for t in threading.enumerate()}


def test_a_forgotten_feed_stops_its_threads(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path, no_thread_left: None
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, host_slots=60)
    feed = feed_of(tmp_path / "packs", tiny_graph, stop=10**9)
    next(feed)
    assert "penstock-read" in {t.name for t in threading.enumerate()}
    del feed
    gc.collect()


def test_rolling_windows_are_awaited_and_deleted_behind(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path, no_thread_left: None
) -> None:
    write_hand_packs(tmp_path / "all", tiny_graph, tiny_trace, host_slots=60, mode="rolling")
    shutil.copytree(tmp_path / "all", tmp_path / "packs", ignore=shutil.ignore_patterns("window-*"))
    expected = in_memory(tiny_graph, tiny_trace)
    made = 0

    def produce() -> None:
        """Stands for the other process: every look at it finds one more window."""
        nonlocal made
        if made < 6:
            for path in sorted((tmp_path / "all").glob(f"window-{made:06d}.*"), key=lambda p: p.suffix == ".json"):
                shutil.copy(path, tmp_path / "packs")
            made += 1

    with feed_of(tmp_path / "packs", tiny_graph, stop=16, producer_check=produce, delete_behind=True) as feed:
        for batch in feed:
            assert content(batch) == expected[batch.step]
            left = {int(path.name[7:13]) for path in (tmp_path / "packs").glob("window-*")}
            assert min(left) == batch.step // 3
    assert made == 6


def test_released_windows_go_and_no_others(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, host_slots=60, mode="rolling")
    expected = in_memory(tiny_graph, tiny_trace)
    options: dict[str, Any] = {"stop": 16, "delete_behind": True, "auto_release": False}
    with feed_of(tmp_path / "packs", tiny_graph, **options) as feed:
        for _ in range(11):
            next(feed)
        feed.release(7)
    assert sorted(path.name for path in (tmp_path / "packs").glob("*.json"))[2:] == [
        f"window-{window:06d}.json" for window in range(2, 6)
    ]
    with feed_of(tmp_path / "packs", tiny_graph, start=7, **options) as feed:
        assert [content(batch) for batch in feed] == expected[7:16]


def test_a_dead_producer_surfaces(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path, no_thread_left: None
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, mode="rolling")
    (tmp_path / "packs" / "window-000003.json").unlink()

    def check() -> None:
        raise RuntimeError("the process that makes windows ended with exit code 9")

    with feed_of(tmp_path / "packs", tiny_graph, stop=16, producer_check=check) as feed:
        with pytest.raises(RuntimeError, match="exit code 9"):
            for batch in feed:
                assert batch.step < 9


def test_closing_while_a_window_is_awaited_does_not_hang(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path, no_thread_left: None
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, mode="rolling")
    (tmp_path / "packs" / "window-000001.json").unlink()
    with feed_of(tmp_path / "packs", tiny_graph, stop=16, producer_check=lambda: None) as feed:
        for _ in range(3):
            next(feed)


def test_steps_must_be_a_range(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path
) -> None:
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace)
    with pytest.raises(ValueError, match="5..4 are no range"):
        feed_of(tmp_path / "packs", tiny_graph, start=5, stop=4)
    assert list(feed_of(tmp_path / "packs", tiny_graph, start=5, stop=5)) == []


@pytest.mark.gpu
def test_the_cuda_feed_gives_the_same_batches(
    tiny_graph: GraphStore, tiny_trace: Trace, write_hand_packs: Pack, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    expected = in_memory(tiny_graph, tiny_trace)
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, device_slots=25, host_slots=60)
    with feed_of(tmp_path / "packs", tiny_graph, device="cuda") as feed:
        assert [content(batch.to("cpu").clone()) for batch in feed] == expected
    with open_memory_feed(tiny_graph, tiny_trace, start_step=0, stop_step=STEPS, device="cuda") as memory:
        assert [content(batch.to("cpu").clone()) for batch in memory] == expected
