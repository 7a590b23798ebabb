"""Tables of rows that chunks leave for each other, with the epoch in which each chunk wrote them.

Histories as in GNNAutoScale (Fey et al., ICML 2021, section 3) and GNNPipe (Chen et al., arXiv 2308.10087, section 5),
but laid out for their readers: a writer copies its rows into one run per reader, so that a reader finds its whole halo
in one place. Two buffers take turns. Chunks write `fresh`; what the last history period left is `past`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.storage.errors import FormatError
from penstock.storage.history.layout import RunLayout
from penstock.storage.history.store import RunStore
from penstock.storage.history.values import POISON

Bools = NDArray[np.bool_]
Versions = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]
NEVER = -1  # the version of a run that nobody wrote; also the epoch of what is done before epoch 0


class StaleRead(RuntimeError):
    """A row is older than its reader allows, or nobody wrote it: a wrong schedule, or too low a bound."""


class RunTable:
    """Rows of one layer boundary of one rank: what each chunk wrote, for the halos of the others.

    Not safe for several threads. `versions` [2, K] has the epoch in which every writer wrote its rows of `fresh`
    (row 0) and of `past` (row 1). `gamma` below 1 makes past rows a moving average of fresh ones.
    """

    def __init__(self, name: str, store: RunStore, *, gamma: float = 1.0, poison: bool = False) -> None:
        self.name, self.store, self._gamma, self._poison = name, store, gamma, poison
        self._fresh, self._past = 0, 1  # buffers
        self._versions = np.full((2, self.layout.num_chunks), NEVER, np.int64)
        self._written = np.zeros((2, self.layout.num_chunks), np.bool_)

    @property
    def layout(self) -> RunLayout:
        """Shapes of what is pushed and pulled."""
        return self.store.layout

    @property
    def versions(self) -> Versions:
        """A copy of the versions [2, K]."""
        return self._versions.copy()

    def push(self, writer: int, rows: NDArray[Any], version: int, which: NDArray[np.int64] | None = None) -> None:
        """Write the rows [num_sends(writer), width], grouped by reader, into `fresh`.

        With `which` int64 [num_sends(writer)], those of `rows` [any, width], C-contiguous, that it names.
        """
        num_rows, width = self.layout.send_shape(writer)
        what = f"{self.name}: chunk {writer}"
        if which is not None:
            if len(which) != num_rows:
                raise ValueError(f"{what} takes {num_rows} rows, not the {len(which)} that are chosen")
            num_rows = len(rows)
        self.layout.values.check_rows(rows, (num_rows, width), what)
        self.store.write(self._fresh, writer, rows, which)
        self._versions[0, writer], self._written[0, writer] = version, True

    def pull(self, reader: int, is_fresh: Bools, out: NDArray[Any], *, epoch: int, bound: int) -> None:
        """Fill `out` [num_halo(reader), width] by writer, from `fresh` where `is_fresh` [K], else from `past`.

        StaleRead, before anything is read, unless fresh rows are of this epoch and past ones at most `bound` older.
        """
        self.layout.values.check_rows(out, self.layout.halo_shape(reader), f"{self.name}: chunk {reader}")
        self._check_ages(reader, is_fresh, epoch, bound)
        self.store.read(self._buffers(is_fresh), reader, out)

    def prefetch(self, reader: int, is_fresh: Bools, *, epoch: int | None = None) -> None:
        """Start reading what `pull` of the same arguments will want; never changes what that returns.

        With `epoch`, runs that their writers have yet to write in it are not read but kept when they are pushed.
        """
        pending = is_fresh & (self._versions[0] != epoch) if epoch is not None else np.zeros_like(is_fresh)
        self.store.prefetch(self._buffers(is_fresh), reader, pending)

    def end_period(self, *, exact: bool = False) -> None:
        """Let fresh rows become past ones; `exact` rows replace them whatever the push mode.

        With a moving average, writers that wrote nothing keep their past rows, and first rows replace nothing.
        """
        self.store.forget()
        if exact or self._gamma == 1:
            self._fresh, self._past = self._past, self._fresh
            self._versions[1], self._written[1] = self._versions[0], self._written[0]
        else:
            fresh, past = self._written
            shares = np.where(fresh, np.where(past, self._gamma, 1.0), 0.0)
            self.store.blend(self._fresh, self._past, shares)
            self._versions[1] = np.where(fresh, self._versions[0], self._versions[1])
            self._written[1] |= fresh
        self._versions[0], self._written[0] = NEVER, False
        if self._poison:
            self.store.fill(self._fresh, POISON)

    def fill(self, version: int) -> None:
        """Make all past rows zeros of this version: a cold start."""
        self.store.forget()
        self.store.fill(self._past, 0)
        self._versions[1], self._written[1] = version, True

    def max_age(self, epoch: int) -> int:
        """Age in epochs of the oldest past row; 0 where there are no rows."""
        used = self.layout.sizes.any(axis=1)
        return int((epoch - self._versions[1][used]).max(initial=0))

    def mean_age(self, epoch: int) -> float:
        """Mean age in epochs of past rows; 0 where there are none."""
        rows = self.layout.sizes.sum(axis=1)
        return float((rows * (epoch - self._versions[1])).sum() / max(1, int(rows.sum())))

    def export(self) -> Arrays:
        """The past rows as they are stored, and their versions, for a checkpoint; use it before the next `push`.

        Bytes do not depend on where the table lies. Tables on disk are copied to a temporary file, not into memory.
        """
        return _export(self.store, self._past, self._versions[1], self._written[1])

    def restore(self, arrays: Arrays) -> None:
        """Put past rows back, bit for bit. FormatError where they are those of another table."""
        self.store.forget()
        self._versions[1], self._written[1] = _restore(self.name, self.store, self._past, arrays)

    def _buffers(self, is_fresh: Bools) -> Versions:
        return np.where(is_fresh, self._fresh, self._past)

    def _check_ages(self, reader: int, is_fresh: Bools, epoch: int, bound: int) -> None:
        fresh, past = self._versions
        bad_fresh = is_fresh & ((fresh != epoch) | ~self._written[0])
        bad_past = ~is_fresh & ((epoch - past > bound) | ~self._written[1])
        bad = (bad_fresh | bad_past) & (self.layout.sizes[:, reader] > 0)
        if not bad.any():
            return
        writer = int(np.argmax(bad))
        row, wanted = (0, f"epoch {epoch}") if is_fresh[writer] else (1, f"at most {bound} epochs before {epoch}")
        version = int(self._versions[row, writer])
        age = f"of epoch {version}, age {epoch - version}" if self._written[row, writer] else "never written"
        raise StaleRead(
            f"history {self.name}: chunk {reader} wants {('fresh', 'past')[row]} rows of chunk {writer} from {wanted}, "
            f"bound {bound}, but they are {age}; raise the bound (history_period), refresh, or fix the schedule"
        )


class MessageTable:
    """Gradients that each chunk computed for its halo, addressed to the chunks that own those rows.

    The runs of a `RunTable`, turned round, in one buffer: what a source has not sent in this epoch is last epoch's.
    """

    def __init__(self, name: str, store: RunStore) -> None:
        self.name, self.store = name, store
        self._versions = np.full(self.layout.num_chunks, NEVER, np.int64)
        self._written = np.zeros(self.layout.num_chunks, np.bool_)

    @property
    def layout(self) -> RunLayout:
        """Shapes of what is pushed and pulled; writers are sources here, and readers targets."""
        return self.store.layout

    @property
    def versions(self) -> Versions:
        """A copy of the sources' versions [K]."""
        return self._versions.copy()

    def push(self, source: int, rows: NDArray[Any], version: int) -> None:
        """Write the rows [num_halo(source), width], grouped by target."""
        self.layout.values.check_rows(rows, self.layout.send_shape(source), f"{self.name}: chunk {source}")
        self.store.write(0, source, rows)
        self._versions[source], self._written[source] = version, True

    def view(self, target: int) -> NDArray[Any] | None:
        """What `pull` gives, without a copy, until the next `push`; None where it cannot be had."""
        return self.store.view(self._buffers(self._written), target)

    def pull(self, target: int, out: NDArray[Any]) -> Versions:
        """Fill `out` [num_sends(target), width] by source; zeros where a source never sent. Returns versions [K]."""
        self.layout.values.check_rows(out, self.layout.halo_shape(target), f"{self.name}: chunk {target}")
        self.store.read(self._buffers(self._written), target, out)
        return self.versions

    def prefetch(self, target: int, is_fresh: Bools | None = None, *, epoch: int | None = None) -> None:
        """Start reading for `pull`; sources `is_fresh` [K] that have yet to send in `epoch` are kept when they do."""
        pending = np.zeros_like(self._written)
        if is_fresh is not None and epoch is not None:
            pending = is_fresh & (self._versions != epoch)
        self.store.prefetch(self._buffers(self._written | pending), target, pending)

    def export(self) -> Arrays:
        """See `RunTable.export`."""
        return _export(self.store, 0, self._versions, self._written)

    def restore(self, arrays: Arrays) -> None:
        """See `RunTable.restore`."""
        self.store.forget()
        self._versions, self._written = _restore(self.name, self.store, 0, arrays)

    def _buffers(self, readable: Bools) -> Versions:
        return np.where(readable, 0, -1)


class RowStore:
    """Own rows of every chunk: the input of a stage, which backward reads again."""

    def __init__(self, name: str, store: RunStore) -> None:
        self.name, self.store = name, store
        self._written = np.zeros(store.layout.num_chunks, np.bool_)

    def write(self, chunk: int, rows: NDArray[Any]) -> None:
        """Store the rows [num_own(chunk), width]."""
        layout = self.store.layout
        layout.values.check_rows(rows, layout.send_shape(chunk), f"{self.name}: chunk {chunk}")
        self.store.write(0, chunk, rows)
        self._written[chunk] = True

    def read(self, chunk: int, out: NDArray[Any]) -> None:
        """Copy a chunk's rows to `out` [num_own(chunk), width]. StaleRead where nobody wrote them."""
        layout = self.store.layout
        layout.values.check_rows(out, layout.halo_shape(chunk), f"{self.name}: chunk {chunk}")
        if not self._written[chunk]:
            raise StaleRead(f"{self.name}: rows of chunk {chunk} are read before they were written; fix the schedule")
        self.store.read(np.zeros(layout.num_chunks, np.int64), chunk, out)

    def prefetch(self, chunk: int) -> None:
        """Start reading a chunk's rows."""
        num_chunks = self.store.layout.num_chunks
        self.store.prefetch(np.zeros(num_chunks, np.int64), chunk, np.zeros(num_chunks, np.bool_))


def _export(store: RunStore, buffer: int, versions: Versions, written: Bools) -> Arrays:
    rows = store.snapshot(buffer).reshape(-1, max(1, store.layout.width))
    return {"rows": rows, "versions": versions.copy(), "written": written.copy()}


def _restore(name: str, store: RunStore, buffer: int, arrays: Arrays) -> tuple[Versions, Bools]:
    layout = store.layout
    rows, wanted = arrays["rows"], (int(layout.sizes.sum()), layout.width)
    if rows.shape != wanted or rows.dtype != layout.values.array_dtype or len(arrays["versions"]) != layout.num_chunks:
        raise FormatError(
            f"history {name} holds {layout.values.array_dtype} {wanted} of {layout.num_chunks} chunks, the checkpoint "
            f"{rows.dtype} {rows.shape} of {len(arrays['versions'])}; resume with the same chunks, parts and "
            "history_dtype, or from a light checkpoint"
        )
    store.restore(buffer, rows.reshape(-1))
    return arrays["versions"].astype(np.int64), arrays["written"].astype(np.bool_)
