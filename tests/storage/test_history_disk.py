"""What only tables in files do: placement by budget, prefetches that save reads, and failures."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.storage.directio import PAGE, DirectFile, aligned_buffer
from penstock.storage.errors import DoesNotFit, FormatError
from penstock.storage.history import HistoryConfig, HistorySet, RunTable, open_history
from penstock.storage.history.transfers import Buffers, IoThreads

K, WIDTH = 4, 256
SIZES = np.array([[0, 5, 9, 2], [4, 0, 3, 0], [7, 1, 0, 8], [6, 2, 5, 0]])  # rows of 1 KiB, so runs of 1 to 3 pages
OWN = np.array([9, 5, 8, 6])
PAGES = -(-SIZES // 4)
NEEDS = HistorySet.table_bytes("runs", SIZES, WIDTH, "float32")
PAST, FRESH = np.zeros(K, np.bool_), np.ones(K, np.bool_)


@contextmanager
def opened(
    path: Path,
    memory: int,
    storage: Literal["auto", "memory", "mmap", "disk"] = "disk",
    *,
    sizes: NDArray[Any] = SIZES,
    io_delay_s: float = 0.0,
) -> Iterator[HistorySet]:
    config = HistoryConfig(storage=storage, poison=True)
    with open_history(path, sizes, OWN, config=config, memory=memory, io_delay_s=io_delay_s) as history:
        yield history


def push(table: RunTable, writer: int, value: float, version: int) -> None:
    table.push(writer, np.full(table.layout.send_shape(writer), value, np.float32), version)


def pull(table: RunTable, reader: int, is_fresh: NDArray[np.bool_], epoch: int) -> NDArray[np.float32]:
    """The value of every writer's run; NaN where it has no rows."""
    out = np.zeros(table.layout.halo_shape(reader), np.float32)
    table.pull(reader, is_fresh, out, epoch=epoch, bound=1)
    values, sizes = np.full(len(is_fresh), np.nan, np.float32), table.layout.sizes[:, reader]
    for writer, run in enumerate(np.split(out, np.cumsum(sizes)[:-1])):
        if len(run):
            values[writer] = run[0, 0]
            assert (run == run[0, 0]).all()
    return values


def test_sizes_are_predicted(tmp_path: Path) -> None:
    assert NEEDS.memory == 2 * SIZES.sum() * 1024
    assert NEEDS.disk == 2 * PAGES.sum() * PAGE
    assert NEEDS.buffers == 2 * max(PAGES.sum(axis=0).max(), PAGES.sum(axis=1).max()) * PAGE
    with opened(tmp_path, NEEDS.memory, "memory") as history:
        history.run_table("h1", WIDTH)
        assert (history.resident_bytes, history.disk_bytes) == (NEEDS.memory, 0)
    with opened(tmp_path, 0, "mmap") as history:
        history.run_table("h1", WIDTH)
        assert (history.resident_bytes, history.disk_bytes) == (0, NEEDS.memory)
    with opened(tmp_path, NEEDS.buffers) as history:
        push(history.run_table("h1", WIDTH), 0, 1, 0)
        assert 0 < history.resident_bytes <= NEEDS.buffers and history.disk_bytes == NEEDS.disk
        assert (tmp_path / "h1.history").stat().st_size == NEEDS.disk


def test_auto_fills_memory_in_the_order_of_asking(tmp_path: Path) -> None:
    with opened(tmp_path, 2 * NEEDS.memory + NEEDS.buffers, "auto") as history:
        tables = [history.run_table(f"h{number}", WIDTH) for number in range(4)]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["h2.history", "h3.history"]
        assert history.disk_bytes == 2 * NEEDS.disk
        for number, table in enumerate(tables):
            for chunk in range(K):
                push(table, chunk, number, 0)
        for number, table in enumerate(tables):
            np.testing.assert_array_equal(pull(table, 1, FRESH, 0), [number, np.nan, number, number])
        assert history.resident_bytes <= history.memory
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("storage", ["auto", "disk", "memory"])
def test_too_little_memory_names_what_would_do(tmp_path: Path, storage: Literal["auto", "disk", "memory"]) -> None:
    with opened(tmp_path / "a", 4 * PAGE, storage) as history:
        with pytest.raises(DoesNotFit, match="raise the host budget") as caught:
            history.run_table("h1", WIDTH)
    assert caught.value.host_bytes == (NEEDS.memory if storage == "memory" else NEEDS.buffers)
    assert not (tmp_path / "a").exists()
    with opened(tmp_path / "a", caught.value.host_bytes, storage) as history:
        table = history.run_table("h1", WIDTH)
        for chunk in range(K):
            push(table, chunk, chunk, 0)
        assert pull(table, 0, FRESH, 0)[1:].tolist() == [1, 2, 3]


def test_reads_and_writes_are_whole_pages_and_are_counted(tmp_path: Path) -> None:
    with opened(tmp_path, NEEDS.buffers) as history:
        table = history.run_table("h1", WIDTH)
        for chunk in range(K):
            push(table, chunk, chunk, 0)
        history.flush()
        assert history.written_bytes == PAGES.sum() * PAGE and history.read_bytes == 0
        pull(table, 2, FRESH, 0)
        assert history.read_bytes == PAGES[:, 2].sum() * PAGE
        assert history.stall_s > 0


@pytest.mark.parametrize("io_delay_s", [0.0, 0.01])
def test_what_was_prefetched_is_not_read_again(tmp_path: Path, io_delay_s: float) -> None:
    with opened(tmp_path, 3 * NEEDS.buffers, io_delay_s=io_delay_s) as history:
        table = history.run_table("h1", WIDTH)
        for chunk in range(K):
            push(table, chunk, chunk, 0)
        table.end_period()
        push(table, 0, 10, 1)
        history.flush()  # six writes hold six buffers, and a prefetch does not wait for one
        table.prefetch(2, np.array([True, False, False, True]), epoch=1)  # chunk 3 is still to write
        read = history.read_bytes
        assert read == PAGES[[0, 1], 2].sum() * PAGE
        push(table, 3, 13, 1)
        wanted = [10.0, 1.0, np.nan, 13.0]
        np.testing.assert_array_equal(pull(table, 2, np.array([True, False, False, True]), 1), wanted)
        assert history.read_bytes == read
        # without the epoch, the run is read, found to be old, and read again
        table.prefetch(2, np.array([True, False, False, True]))
        push(table, 3, 14, 1)
        wanted[3] = 14.0
        np.testing.assert_array_equal(pull(table, 2, np.array([True, False, False, True]), 1), wanted)
        assert history.read_bytes == 2 * read + 2 * PAGES[3, 2] * PAGE


def test_messages_that_are_due_are_kept_when_they_come(tmp_path: Path) -> None:
    with opened(tmp_path, 3 * NEEDS.buffers) as history:
        table = history.message_table("g1", WIDTH)
        out = np.zeros(table.layout.halo_shape(0), np.float32)
        table.prefetch(0, FRESH, epoch=4)
        for source in range(1, K):
            table.push(source, np.full(table.layout.send_shape(source), source, np.float32), 4)
        assert table.pull(0, out).tolist() == [-1, 4, 4, 4]
        assert history.read_bytes == 0
        np.testing.assert_array_equal(out[:, 0], np.repeat(np.arange(K), SIZES[0]))


def test_prefetches_nobody_reads_hold_no_buffers_in_the_next_period(tmp_path: Path) -> None:
    with opened(tmp_path, 2 * NEEDS.buffers) as history:
        table = history.run_table("h1", WIDTH)
        table.fill(0)
        for _ in range(3):
            for reader in range(K):
                table.prefetch(reader, PAST)
            for chunk in range(K):
                push(table, chunk, chunk, 0)
            table.end_period()
        history.flush()
        table.prefetch(3, PAST)
        read = history.read_bytes
        assert pull(table, 3, PAST, 1)[2] == 2
        assert history.read_bytes == read
        assert history.resident_bytes <= history.memory


def test_a_prefetch_that_is_replaced_may_end_late(tmp_path: Path) -> None:
    with opened(tmp_path, 3 * NEEDS.buffers, io_delay_s=0.02) as history:
        table = history.run_table("h1", WIDTH)
        table.fill(0)
        table.prefetch(0, PAST)
        table.prefetch(0, FRESH, epoch=1)
        for chunk in range(K):
            push(table, chunk, 5, 1)
        history.flush()
        np.testing.assert_array_equal(pull(table, 0, FRESH, 1), [np.nan, 5, 5, 5])


def test_transfer_buffers_grow_with_the_widest_table(tmp_path: Path) -> None:
    wide = HistorySet.table_bytes("runs", SIZES, 3 * WIDTH, "float32").buffers
    with opened(tmp_path, wide) as history:
        narrow = history.run_table("h1", WIDTH)
        narrow.fill(0)
        for reader in range(K):
            narrow.prefetch(reader, PAST)
        table = history.run_table("h2", 3 * WIDTH)
        for chunk in range(K):
            push(table, chunk, chunk, 1)
            push(narrow, chunk, 7, 1)
        np.testing.assert_array_equal(pull(table, 0, FRESH, 1), [np.nan, 1, 2, 3])
        np.testing.assert_array_equal(pull(narrow, 0, FRESH, 1), [np.nan, 7, 7, 7])
        assert history.resident_bytes <= history.memory


def test_large_runs_move_in_pieces(tmp_path: Path) -> None:
    sizes = np.array([[0, 3001], [3500, 0]])  # 3 MiB and more
    rng = np.random.default_rng(0)
    with open_history(tmp_path, sizes, OWN[:2], config=HistoryConfig(storage="disk"), memory=16 << 20) as history:
        table = history.run_table("h1", WIDTH)
        rows = rng.standard_normal((3001, WIDTH), np.float32)
        table.push(0, rows, 0)
        table.push(1, rng.standard_normal((3500, WIDTH), np.float32), 0)
        out = np.zeros_like(rows)
        table.pull(1, np.ones(2, np.bool_), out, epoch=0, bound=0)
        np.testing.assert_array_equal(out, rows)


@pytest.mark.parametrize("storage", ["disk", "mmap"])
def test_a_full_disk_is_found_at_the_start(small_disk: Path, storage: Literal["disk", "mmap"]) -> None:
    sizes = np.array([[0, 9000], [9000, 0]])  # 36 MiB in two buffers
    with pytest.raises(DoesNotFit, match=r"the history h1.history needs 35.2 MiB at .* free space"):
        with open_history(
            small_disk / "h", sizes, OWN[:2], config=HistoryConfig(storage=storage), memory=64 << 20
        ) as history:
            history.row_store("x", WIDTH)
            history.run_table("h1", WIDTH)
    assert not (small_disk / "h").exists()


@pytest.mark.parametrize("storage", ["disk", "mmap"])
@pytest.mark.parametrize("damage", ["cut", "deleted"])
def test_damaged_files_are_refused(tmp_path: Path, storage: Literal["disk", "mmap"], damage: str) -> None:
    with opened(tmp_path, NEEDS.buffers, storage) as history:
        table = history.run_table("h1", WIDTH)
        table.fill(0)
        history.flush()
        path = tmp_path / "h1.history"
        if damage == "cut":
            os.truncate(path, path.stat().st_size - 1)
        else:
            path.unlink()
        message = r"h1.history has \d+ bytes of \d+: something else cut or deleted it .* from the last checkpoint"
        with pytest.raises(FormatError, match=message):
            pull(table, 0, PAST, 0)
        with pytest.raises(FormatError, match=message):
            push(table, 0, 1, 0)
        with pytest.raises(FormatError, match=message):
            table.export()


def test_an_io_error_is_raised_by_the_next_calls(tmp_path: Path) -> None:
    with opened(tmp_path, NEEDS.buffers) as history:
        table = history.run_table("h1", WIDTH)
        table.fill(0)
        table.store.file.close()  # type: ignore[attr-defined]
        push(table, 0, 1, 0)
        for _ in range(2):
            with pytest.raises(OSError, match="Bad file descriptor"):
                history.flush()
            with pytest.raises(OSError, match="Bad file descriptor"):
                push(table, 0, 1, 0)
            with pytest.raises(OSError, match="Bad file descriptor"):
                pull(table, 0, PAST, 0)


def test_a_flush_waits_for_what_follows_a_transfer(tmp_path: Path) -> None:
    """A prefetch takes a buffer only if there is one: after a flush, all are back."""
    transferred, followed = Event(), Event()

    def follow() -> None:
        transferred.set()
        time.sleep(0.05)
        followed.set()

    with DirectFile(tmp_path / "x", "write") as file, IoThreads() as io:
        io.submit(file, [(0, aligned_buffer(PAGE))], is_write=True, then=follow)
        assert transferred.wait(60)
        io.flush()
        assert followed.is_set()


def test_a_checkpoint_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with opened(tmp_path, NEEDS.buffers) as history:
        table = history.run_table("h1", WIDTH)
        push(table, 0, 1, 0)
        history.flush()
        table.store.file.close()  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="Bad file descriptor"):
            table.export()
    assert not list(tmp_path.iterdir())


def test_a_table_without_rows_lies_on_disk_too(tmp_path: Path) -> None:
    with opened(tmp_path, 0, sizes=np.zeros((1, 1), np.int64)) as history:
        table = history.run_table("h1", WIDTH)
        table.fill(0)
        push(table, 0, 1, 0)
        table.end_period()
        assert table.versions.tolist() == [[-1], [0]]
        assert len(pull(table, 0, PAST[:1], 0)) == 1 and history.written_bytes == 0


class Silent(IoThreads):
    """Threads that end at once, without an error."""

    def _run(self) -> None:
        return


def test_a_thread_that_ends_without_a_word_is_noticed(tmp_path: Path) -> None:
    with Silent() as io, DirectFile(tmp_path / "x", "write") as file:
        job = io.submit(file, [(0, aligned_buffer(PAGE))], is_write=True)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="I/O thread penstock-history-0 ended without a word"):
                io.wait(job)


def test_tables_are_not_used_after_their_set(tmp_path: Path) -> None:
    with opened(tmp_path, NEEDS.buffers) as history:
        table = history.run_table("h1", WIDTH)
        push(table, 0, 1, 0)
    with pytest.raises(RuntimeError, match="used after they were closed"):
        push(table, 0, 1, 0)


def test_what_a_killed_run_left_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    for name in ("h1.history", "h9.history", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    with opened(tmp_path, 0, "mmap") as history:
        history.run_table("h1", WIDTH).fill(0)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["h1.history", "notes.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_returned_buffers_are_poisoned_and_reused() -> None:
    with IoThreads() as io:
        buffers = Buffers(io=io, poison=True)
        buffers.fit(3 * PAGE, 10 * PAGE)
        first = buffers.take()
        first[:] = 0
        ahead = buffers.take_for_prefetch()
        assert ahead is not None
        assert buffers.take_for_prefetch() is None  # the last two are for calls that must go on
        buffers.give(ahead, prefetched=True)
        buffers.give(first)
        again = buffers.take()
        assert again.ctypes.data == first.ctypes.data
        for dtype in (np.float32, np.float64):
            assert np.isnan(again.view(dtype)).all()
        assert len({buffers.take().ctypes.data for _ in range(2)} | {again.ctypes.data}) == 3
        assert buffers.num_bytes == 9 * PAGE
