"""What every history table does, wherever it lies: compared with dictionaries that hold one array per run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.storage.errors import FormatError
from penstock.storage.history import HistoryConfig, HistorySet, RunTable, StaleRead, open_history
from penstock.storage.rows import RowFormat, decode_rows, encode_rows

Ints = NDArray[np.int64]
Rows = NDArray[Any]
Runs = dict[tuple[int, int], Rows]
examples = settings(max_examples=25, suppress_health_check=[HealthCheck.differing_executors])
SIZES = np.array([[0, 3, 0], [5, 2, 1], [70, 0, 0]])  # run (2, 0) needs more than a page from width 15 on
OWN = np.array([4, 8, 70])


def rounded(rows: Rows, dtype: str) -> Rows:
    """What a table of this dtype gives back."""
    if dtype != "bfloat16":
        return rows
    row_format = RowFormat(dtype="bfloat16", width=rows.shape[1])
    return decode_rows(encode_rows(rows, row_format), row_format)


def split(rows: Rows, sizes: Ints) -> list[Rows]:
    return np.split(rows, np.cumsum(sizes)[:-1])


def wide(config: HistoryConfig) -> type[np.floating[Any]]:
    return np.float64 if config.dtype == "float64" else np.float32


class HistoryContract:
    storage: Literal["auto", "memory", "mmap", "disk"]
    extra_buffers = 1.0  # memory beyond the least that disk tables need, as a share of it
    io_delay_s = 0.0

    def config(self, **options: Any) -> HistoryConfig:
        return HistoryConfig(storage=self.storage, poison=True, **options)

    @contextmanager
    def open(self, path: Path, sizes: Ints, own: Ints, width: int, **options: Any) -> Iterator[HistorySet]:
        config = self.config(**options)
        kinds = (("runs", sizes), ("messages", sizes.T), ("rows", np.diag(own)))
        needs = [HistorySet.table_bytes(kind, matrix, width, config.dtype) for kind, matrix in kinds]  # type: ignore[arg-type]
        memory = int(max(need.buffers for need in needs) * (1 + self.extra_buffers))
        if self.storage == "memory":
            memory = 2 * sum(need.memory for need in needs)
        with open_history(path, sizes, own, config=config, memory=memory, io_delay_s=self.io_delay_s) as history:
            yield history
            assert history.resident_bytes <= memory

    def rows(self, rng: np.random.Generator, count: int, width: int, config: HistoryConfig) -> Rows:
        return rng.standard_normal((count, width)).astype(wide(config))

    @examples
    @given(
        seed=st.integers(0, 2**32 - 1),
        num_chunks=st.integers(1, 5),
        period=st.integers(1, 3),
        width=st.sampled_from([1, 3, 60]),
        dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
        hints=st.booleans(),
    )
    def test_epochs_equal_dictionaries(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        seed: int,
        num_chunks: int,
        period: int,
        width: int,
        dtype: str,
        hints: bool,
    ) -> None:
        """The schedule of training, with prefetches that are right, too early, wrong or never used."""
        rng = np.random.default_rng(seed)
        sizes = rng.integers(0, 40, (num_chunks, num_chunks)) * (rng.random((num_chunks, num_chunks)) < 0.7)
        own = rng.integers(1, 50, num_chunks)
        with self.open(tmp_path_factory.mktemp("h"), sizes, own, width, dtype=dtype) as history:
            model = Model(history, rng, sizes, own, width, hints)
            for epoch in range(2 * period + 1):
                model.epoch(epoch, period)
                if (epoch + 1) % period == 0:
                    model.end_period()
        assert not list(history.path.iterdir())

    def test_versions_and_ages(self, tmp_path: Path) -> None:
        with self.open(tmp_path, SIZES, OWN, 3) as history:
            table = history.run_table("h1", 3)
            np.testing.assert_array_equal(table.versions, np.full((2, 3), -1))
            table.fill(-1)
            assert table.max_age(4) == 5 and table.mean_age(4) == 5
            for writer, version in ((0, 3), (1, 3), (2, 4)):
                table.push(writer, np.ones((int(SIZES[writer].sum()), 3), np.float32), version)
            assert table.versions.tolist() == [[3, 3, 4], [-1, -1, -1]]
            table.end_period()
            assert table.versions.tolist() == [[-1, -1, -1], [3, 3, 4]]
            assert table.max_age(5) == 2 and table.mean_age(5) == pytest.approx((11 * 2 + 70 * 1) / 81)

    def test_stale_rows_are_refused(self, tmp_path: Path) -> None:
        with self.open(tmp_path, SIZES, OWN, 3) as history:
            table, out = history.run_table("h1", 3), np.zeros((75, 3), np.float32)
            past, fresh = np.zeros(3, np.bool_), np.ones(3, np.bool_)
            with pytest.raises(StaleRead, match=r"history h1: chunk 0 wants past rows of chunk 1 .* never written"):
                table.pull(0, past, out, epoch=0, bound=9)
            table.fill(-1)
            table.pull(0, past, out, epoch=2, bound=3)
            with pytest.raises(StaleRead, match=r"chunk 0 .* chunk 1 .*3 epochs before 3, bound 3.* epoch -1, age 4;"):
                table.pull(0, past, out, epoch=3, bound=3)
            table.push(1, np.ones((8, 3), np.float32), 5)
            with pytest.raises(StaleRead, match=r"wants fresh rows of chunk 2 from epoch 5.* never written"):
                table.pull(0, fresh, out, epoch=5, bound=9)
            table.push(2, np.ones((70, 3), np.float32), 5)
            table.pull(0, fresh, out, epoch=5, bound=0)
            assert (out == 1).all()
            with pytest.raises(StaleRead, match=r"fresh rows of chunk 1 from epoch 6, .* epoch 5, age 1;"):
                table.pull(0, fresh, out, epoch=6, bound=9)
            table.pull(2, fresh, out[:1], epoch=5, bound=0)  # nothing of chunks 0 and 2 is wanted there
            table.end_period()
            with pytest.raises(StaleRead, match="fresh rows of chunk 1"):
                table.pull(0, fresh, out, epoch=5, bound=9)

    def test_misshapen_rows_are_refused(self, tmp_path: Path) -> None:
        with self.open(tmp_path, SIZES, OWN, 3) as history:
            table, store = history.run_table("h1", 3), history.row_store("x", 3)
            with pytest.raises(ValueError, match=r"h1: chunk 1 takes float32 \(8, 3\), not float32 \(7, 3\)"):
                table.push(1, np.zeros((7, 3), np.float32), 0)
            with pytest.raises(ValueError, match=r"x: chunk 1 takes float32 \(8, 3\), not float64 \(8, 3\)"):
                store.write(1, np.zeros((8, 3)))
            with pytest.raises(StaleRead, match="x: rows of chunk 1 are read before they were written"):
                store.read(1, np.zeros((8, 3), np.float32))
            with pytest.raises(ValueError, match="there is a history table h1 already"):
                history.message_table("h1", 3)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
    def test_moving_averages(self, tmp_path: Path, dtype: str) -> None:
        rng, ones = np.random.default_rng(1), np.zeros(3, np.bool_)
        with self.open(tmp_path, SIZES, OWN, 60, dtype=dtype, push="ema", ema_gamma=0.3) as history:
            table = history.run_table("h1", 60)
            real = wide(history.config)
            past = np.zeros((75, 60), real)
            for period in range(4):
                for writer in range(3):
                    if (period, writer) != (2, 1):  # chunk 1 skips a period and keeps its rows
                        rows = self.rows(rng, int(SIZES[writer].sum()), 60, history.config)
                        table.push(writer, rows, period)
                        at = slice(0, 5) if writer == 1 else slice(5, 75) if writer == 2 else slice(0, 0)
                        fresh = rounded(rows[: SIZES[writer, 0]], dtype)
                        mean = fresh * real(0.3) + past[at] * real(0.7)
                        past[at] = fresh if period == 0 else rounded(mean, dtype)
                table.end_period()
                out = np.zeros_like(past)
                table.pull(0, ones, out, epoch=period + 1, bound=2)
                np.testing.assert_array_equal(out, past)
            assert table.versions[1].tolist() == [3, 3, 3]
            rows = self.rows(rng, 70, 60, history.config)
            table.push(2, rows, 4)
            table.push(1, np.zeros((8, 60), real), 4)
            table.end_period(exact=True)
            table.pull(0, ones, out, epoch=5, bound=1)
            np.testing.assert_array_equal(out[5:], rounded(rows, dtype))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
    def test_a_dead_buffer_is_poisoned(self, tmp_path: Path, dtype: str) -> None:
        with self.open(tmp_path, SIZES, OWN, 3, dtype=dtype) as history:
            table = history.run_table("h1", 3)
            table.fill(0)
            out = np.zeros((75, 3), wide(history.config))
            table.store.read(np.ones(3, np.int64), 0, out)
            assert (out == 0).all()
            for writer in range(3):
                table.push(writer, np.ones((int(SIZES[writer].sum()), 3), out.dtype), 0)
            table.end_period()
            table.store.read(np.ones(3, np.int64), 0, out)
            assert np.isnan(out).all()
            table.pull(0, np.zeros(3, np.bool_), out, epoch=1, bound=1)
            assert (out == 1).all()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_checkpoints_come_back_bit_for_bit_wherever_they_lie(self, tmp_path: Path, dtype: str) -> None:
        rng = np.random.default_rng(2)
        with self.open(tmp_path / "a", SIZES, OWN, 60, dtype=dtype) as history:
            table, messages = history.run_table("h1", 60), history.message_table("g1", 60)
            for chunk in range(3):
                table.push(chunk, self.rows(rng, int(SIZES[chunk].sum()), 60, history.config), 7 + chunk)
            table.end_period()
            messages.push(0, self.rows(rng, 75, 60, history.config), 9)
            kept = [{name: array.copy() for name, array in each.export().items()} for each in (table, messages)]
            assert {path.suffix for path in (tmp_path / "a").iterdir()} <= {".history"}
            wanted = read_all(table)
            table.push(0, self.rows(rng, 3, 60, history.config), 10)
            table.end_period()
            table.restore(kept[0])
            np.testing.assert_array_equal(read_all(table), wanted)
        in_memory = HistoryConfig(storage="memory", dtype=dtype)  # type: ignore[arg-type]
        with open_history(tmp_path / "b", SIZES, OWN, config=in_memory, memory=1 << 20) as other:
            table, messages = other.run_table("h1", 60), other.message_table("g1", 60)
            table.restore(kept[0])
            messages.restore(kept[1])
            np.testing.assert_array_equal(read_all(table), wanted)
            assert table.versions.tolist() == [[-1, -1, -1], [7, 8, 9]] and messages.versions.tolist() == [9, -1, -1]
            again = [table.export(), messages.export()]
            for ours, theirs in zip(kept, again, strict=True):
                assert ours.keys() == theirs.keys()
                assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
            with pytest.raises(FormatError, match=r"history h1 holds .* resume with the same chunks, parts and"):
                table.restore({**kept[0], "rows": kept[0]["rows"][:-1]})


def read_all(table: RunTable) -> Rows:
    """All past rows."""
    out = [np.zeros((size, table.layout.width), table.layout.values.wide) for size in SIZES.sum(axis=0)]
    for reader, rows in enumerate(out):
        table.pull(reader, np.zeros(3, np.bool_), rows, epoch=10, bound=100)
    return np.concatenate(out)


class Model:
    """Runs one rank's epochs on two run tables, a message table and a row store, and checks every read."""

    def __init__(
        self, history: HistorySet, rng: np.random.Generator, sizes: Ints, own: Ints, width: int, hints: bool
    ) -> None:
        self.history, self.rng, self.sizes, self.own, self.width, self.hints = history, rng, sizes, own, width, hints
        self.chunks, self.dtype = len(own), history.config.dtype
        self.tables = [history.run_table(name, width) for name in ("h1", "h2")]
        self.messages, self.inputs = history.message_table("g1", width), history.row_store("x", width)
        self.fresh: list[Runs] = [{}, {}]
        zeros = {(c, d): self.zeros(int(sizes[c, d])) for c in range(self.chunks) for d in range(self.chunks)}
        self.past, self.sent, self.versions = [dict(zeros), dict(zeros)], zeros, [-1] * self.chunks
        for table in self.tables:
            table.fill(-1)

    def zeros(self, count: int) -> Rows:
        return np.zeros((count, self.width), wide(self.history.config))

    def random(self, count: int) -> Rows:
        return self.rng.standard_normal((count, self.width)).astype(wide(self.history.config))

    def epoch(self, epoch: int, period: int) -> None:
        order = [int(chunk) for chunk in self.rng.permutation(self.chunks)]
        masks = [np.isin(np.arange(self.chunks), order[:n]) for n in range(self.chunks)]
        inputs = {}
        for n, chunk in enumerate(order):
            self.hint(order, masks, n, epoch)
            for table, fresh, past in zip(self.tables, self.fresh, self.past, strict=True):
                out = self.zeros(int(self.sizes[:, chunk].sum()))
                table.pull(chunk, masks[n], out, epoch=epoch, bound=period)
                sources = [fresh if masks[n][c] else past for c in range(self.chunks)]
                wanted = [source[c, chunk] for c, source in enumerate(sources)]
                np.testing.assert_array_equal(out, np.concatenate(wanted))
                self.push(table, chunk, epoch, fresh)
            rows = self.random(int(self.own[chunk]))
            self.inputs.write(chunk, rows)
            inputs[chunk] = rows  # in full, whatever the dtype of histories
        for n, chunk in reversed(list(enumerate(order))):
            self.backward(order, n, chunk, epoch)
            out = self.zeros(int(self.own[chunk]))
            self.inputs.read(chunk, out)
            np.testing.assert_array_equal(out, inputs[chunk])

    def push(self, table: RunTable, chunk: int, epoch: int, runs: Runs) -> None:
        rows = self.random(int(self.sizes[chunk].sum()))
        if self.chunks > 1 and self.rng.random() < 0.1:  # twice: the second one counts
            table.push(chunk, rows, epoch)
            rows = self.random(len(rows))
        table.push(chunk, rows, epoch)
        for reader, run in enumerate(split(rounded(rows, self.dtype), self.sizes[chunk])):
            runs[chunk, reader] = run

    def hint(self, order: list[int], masks: list[NDArray[np.bool_]], n: int, epoch: int) -> None:
        """Prefetch for the next chunks before this one writes; some of it wrong, some of it for nobody."""
        for table in self.tables:
            for ahead in range(1, 3 if self.hints else 0):
                if n + ahead < len(order):
                    mask = masks[n + ahead] if self.rng.random() < 0.7 else self.rng.random(self.chunks) < 0.5
                    table.prefetch(order[n + ahead], mask, epoch=epoch if self.rng.random() < 0.7 else None)
            if self.hints and self.rng.random() < 0.1:
                table.prefetch(int(self.rng.integers(self.chunks)), masks[n])

    def backward(self, order: list[int], n: int, chunk: int, epoch: int) -> None:
        done = np.isin(np.arange(self.chunks), order[n:])
        if self.hints and n:
            self.messages.prefetch(order[n - 1], done, epoch=epoch if self.rng.random() < 0.7 else None)
            self.inputs.prefetch(order[n - 1])
        out = self.zeros(int(self.sizes[chunk].sum()))
        assert self.messages.pull(chunk, out).tolist() == self.versions
        np.testing.assert_array_equal(out, np.concatenate([self.sent[chunk, d] for d in range(self.chunks)]))
        rows = self.random(int(self.sizes[:, chunk].sum()))
        self.messages.push(chunk, rows, epoch)
        self.versions[chunk] = epoch
        for target, run in enumerate(split(rounded(rows, self.dtype), self.sizes[:, chunk])):
            self.sent[target, chunk] = run

    def end_period(self) -> None:
        for number, table in enumerate(self.tables):
            table.end_period()
            self.past[number], self.fresh[number] = self.fresh[number], {}


class TestMemory(HistoryContract):
    storage = "memory"


class TestMapped(HistoryContract):
    storage = "mmap"


class TestDiskWithFewBuffers(HistoryContract):
    storage, extra_buffers = "disk", 0.0


class TestDisk(HistoryContract):
    storage, extra_buffers = "disk", 4.0


class TestSlowDisk(HistoryContract):
    """Transfers end long after the next calls were made."""

    storage, extra_buffers, io_delay_s = "disk", 2.0, 0.0005


class TestMemoryAndDisk(HistoryContract):
    storage, extra_buffers = "auto", 2.0
