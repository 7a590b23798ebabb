"""What a GPU would see of the feed, as a recorder sees it on the CPU: streams, events, and who uses memory when."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.engine import feed
from penstock.engine.buffers import BatchBuffer, pinned_bytes
from penstock.engine.device_tier import DeviceTier
from penstock.engine.memory_feed import MemorySource, open_memory_feed
from penstock.engine.trainstate import seed_step
from penstock.storage.directio import page_up
from penstock.storage.graph import GraphStore
from penstock.storage.trace import Trace


class Log(list[tuple[Any, ...]]):
    """What happened, in order, and the stream that is current."""

    current = "consumer"


class Event:
    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name = log, name

    def record(self, stream: Any) -> None:
        self.log.append(("record", self.name, stream))

    def synchronize(self) -> None:
        self.log.append(("synchronize", self.name))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Let feeds believe that they have a GPU, and note what they ask of it."""
    found, consumer = Log(), SimpleNamespace(wait_event=lambda event: found.append(("wait", event.name)))

    @contextmanager
    def stream(which: Any) -> Iterator[None]:
        found.current, before = which, found.current
        yield
        found.current = before

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: consumer)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, s: found.append(("uses", tensor.data_ptr(), s is consumer))
    )
    return found


def test_rows_on_the_device_are_cleared_on_the_stream_that_fills_them(
    log: Log, tiny_graph: GraphStore, tiny_trace: Trace, tmp_path: Path, write_hand_packs: Any, monkeypatch: Any
) -> None:
    made: list[Any] = []

    class Noted(DeviceTier):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(("made", log.current))

        def fill(self, slots: Any, rows: Any) -> None:
            super().fill(slots, rows)
            made.append(("filled", log.current))

    monkeypatch.setattr(feed, "DeviceTier", Noted)
    monkeypatch.setattr(feed, "side_stream", lambda device: SimpleNamespace(record_event=lambda: Event(log, "copied")))
    write_hand_packs(tmp_path / "packs", tiny_graph, tiny_trace, device_slots=30)
    with feed.open_pack_feed(
        tmp_path / "packs", tiny_graph, start_step=0, stop_step=1, host_memory=1 << 26, threads=1
    ) as batches:
        next(batches)
    assert [name for name, _ in made][:2] == ["made", "filled"]
    assert len({id(stream) for _, stream in made}) == 1 and made[0][1] != "consumer"


def with_events(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give memory feeds an event behind every batch, and their buffers one behind what the consumer queued."""
    numbers = iter(range(1000))
    monkeypatch.setattr(MemorySource, "ready_event", lambda self: Event(log, f"copies {next(numbers)}"))

    def mark(self: BatchBuffer) -> None:
        self._consumed = Event(log, f"consumed {id(self)}")  # type: ignore[assignment]

    monkeypatch.setattr(BatchBuffer, "mark_consumed", mark)


def test_the_allocator_is_told_who_reads_a_batch(
    log: Log, tiny_graph: GraphStore, tiny_trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_events(log, monkeypatch)
    with open_memory_feed(tiny_graph, tiny_trace, start_step=0, stop_step=1) as batches:
        batch = next(batches)
        waits = [n for n, entry in enumerate(log) if entry[0] == "wait"]
        used = {entry[1] for n, entry in enumerate(log) if entry[0] == "uses" and entry[2] and n > waits[0]}
        tensors = [batch.features, batch.labels, batch.input_ids]
        tensors += [t for b in batch.blocks for t in (b.indptr, b.indices, b.src_degrees) if t is not None]
        assert {tensor.data_ptr() for tensor in tensors} <= used


def test_a_feed_that_goes_on_elsewhere_waits_for_what_is_under_way(
    log: Log, tiny_graph: GraphStore, tiny_trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_events(log, monkeypatch)
    with open_memory_feed(tiny_graph, tiny_trace, start_step=0, stop_step=6) as batches:
        next(batches)
        assert batches._held is not None
        held = f"consumed {id(batches._held.buffer)}"
        del log[:]
        batches.load_state_dict({"step": 0})
        assert [entry for entry in log if entry[0] == "synchronize" and entry[1].startswith("copies")]
        next(batches)
        next(batches)
        assert ("synchronize", held) in log  # before the buffer was filled again


def test_waiting_for_the_device_is_no_stall_of_the_feed(
    tiny_graph: GraphStore, tiny_trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Busy:
        def synchronize(self) -> None:
            time.sleep(0.05)

    monkeypatch.setattr(BatchBuffer, "mark_consumed", lambda self: setattr(self, "_consumed", Busy()))
    with open_memory_feed(tiny_graph, tiny_trace, start_step=0, stop_step=8) as batches:
        began = time.perf_counter()
        assert sum(1 for _ in batches) == 8
        elapsed, stats = time.perf_counter() - began, batches.stats
    # six of the eight batches wait for a buffer; whatever else takes time is on one side or the other
    assert stats.device_s >= 0.2 and stats.stall_s + stats.device_s <= elapsed + 1e-3
    assert batches.device_s == stats.device_s


def test_pinned_memory_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pages, no powers of two; unlocked with the last view."""
    calls: list[tuple[Any, ...]] = []

    def lock(at: int, num_bytes: int, flags: int) -> int:
        calls.append(("lock", at, num_bytes))
        return 0

    cuda = SimpleNamespace(
        cudaHostRegister=lock,
        cudaHostUnregister=lambda at: calls.append(("unlock", at)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    buffer = BatchBuffer(1000, 33, torch.device("cuda"))
    rows = buffer.host_rows(1000)
    sizes = {entry[2] for entry in calls if entry[0] == "lock"}
    assert page_up(1000 * 33 * 4) in sizes and max(sizes) == page_up(1000 * 33 * 4)
    rows[:] = 1.0
    lent = pinned_bytes(5000)
    view, at = lent[10:20], lent.ctypes.data
    del lent
    assert ("unlock", at) not in calls
    view[:] = 7
    del view
    assert ("unlock", at) in calls


def test_a_step_seeds_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    current = [torch.device("cuda:0")]

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        current.append(which)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda value: seen.append((current[-1], value)))
    seed_step(1, 2, torch.device("cuda:3"))
    assert seen == [(torch.device("cuda:3"), torch.initial_seed())]
