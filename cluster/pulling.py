"""A replica's end of the feeders: ask for windows ahead, pull what is built, check it, and feed from it.

Each feeder has a lane: a thread with a connection of its own, which takes the lowest windows that nobody has, keeps as
many in flight as the feeder builds at a time and one more, and pulls those that are done as far as the local disk
allows. A lane whose feeder is lost, damages what it sends or is far slower than the others ends, and its windows go to
the other lanes; any feeder builds the same bytes, so nothing depends on who does it. Nothing here imports Ray.
"""

import logging
import os
import shutil
import statistics
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.cluster.feeder import MAX_ROWS_BYTES
from penstock.cluster.lane import Lane, Pace
from penstock.engine.feed import open_pack_feed
from penstock.engine.prefetch import Feed
from penstock.sampler.neighbors import SampleConfig
from penstock.sampler.plan import PlanConfig
from penstock.sampler.rolling import clear_windows
from penstock.sampler.windowtask import WindowJob, check_kept
from penstock.storage.budget import Budgets, format_bytes
from penstock.storage.deal import Deal
from penstock.storage.errors import DataError, DoesNotFit, FormatError
from penstock.storage.graph import GraphStore, Split
from penstock.storage.npyfile import write_npy
from penstock.storage.pack import write_packset
from penstock.storage.rows import RowFormat
from penstock.storage.trace import window_name
from penstock.storage.transfer import Address, Refused, connect

logger = logging.getLogger(__name__)

_KINDS: dict[str, type[Exception]] = {"DoesNotFit": DoesNotFit, "DataError": DataError, "FormatError": FormatError}
_CHECK_GAP_S = 0.5  # calls of `check` closer than that belong to one wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A feeder that is used no more, and why."""

    address: Address
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PullStats:
    """What a puller did: `queue_bytes` and `windows_waiting` are now, `remade` windows were asked for again."""

    feeders: int
    queue_bytes: int
    windows_waiting: int
    pulled_bytes: int
    pulled_windows: int
    remade: int
    stall_s: float
    disk_high_water: int


class Puller:
    """Keeps the folder `packs` filled with windows first <= w < stop; made by `open_puller`. Owns its lock.

    `check`, `set_feeders` and `stats` may be called from any thread.
    """

    def __init__(
        self, job: WindowJob, packs: Path, windows: range, token: bytes, pace: Pace, *, disk_bytes: int
    ) -> None:
        self.job, self.packs, self.token, self.pace = job, packs, token, pace
        self._disk_bytes = disk_bytes
        self._changed = threading.Condition()
        self._windows = windows
        self._lowest = windows.start  # the first window that is neither here nor was
        self._taken: dict[int, Lane] = {}
        self._local: dict[int, int] = {}  # bytes of windows that are here, or are being pulled
        self._here: set[int] = set()
        self._failures: dict[int, int] = {}
        self._lanes: dict[Address, Lane] = {}
        self._dropped: set[Address] = set()
        self._error: Exception | None = None
        self._stopped = False
        self._times: list[float] = []
        self._moved = self._checked = time.monotonic()
        self._pulled_bytes = self._pulled_windows = self._remade = self._high_water = 0
        self._largest, self._stall_s = job.window_bytes, 0.0
        self.faults: list[Fault] = []

    def set_feeders(self, addresses: Sequence[Address]) -> None:
        """Use these feeders from now on: new ones are asked, others are left. One that was dropped stays so."""
        with self._changed:
            wanted = {(host, port) for host, port in addresses}
            for address in [address for address in self._lanes if address not in wanted]:
                self._end(self._lanes[address])
            for address in sorted(wanted - set(self._lanes) - self._dropped):
                if not self._stopped:
                    self._lanes[address] = Lane(self, address)
                    self._moved = time.monotonic()
            self._changed.notify_all()

    @property
    def addresses(self) -> list[Address]:
        """Feeders that are in use."""
        with self._changed:
            return list(self._lanes)

    def claim(self, lane: Lane, held: Collection[int], depth: int) -> list[int]:
        """Give a lane the lowest windows that nobody has, so that with those it holds it has `depth`.

        A window that another lane lost goes first: later ones, here and at feeders, may have to wait for it.
        """
        with self._changed:
            free: list[int] = []
            for window in range(self._lowest, self._windows.stop):
                if len(free) + len(held) >= depth and (free or window >= min(held)):
                    break
                if window not in self._taken and window not in self._local:
                    free.append(window)
                    self._taken[window] = lane
            return free

    def give_back(self, lane: Lane, window: int, *, remake: bool) -> None:
        """A lane does not get a window after all."""
        with self._changed:
            if self._taken.get(window) is lane:
                del self._taken[window]
                self._remade += remake
            self._changed.notify_all()

    def admit(self, lane: Lane, window: int, num_bytes: int) -> bool:
        """Reserve local disk for a lane's window, if those before it that are yet to come have room too.

        DoesNotFit where the first of them will never have.
        """
        with self._changed:
            self._forget_used()
            self._largest = max(self._largest, num_bytes)
            missing = sum(1 for w in range(self._lowest, window) if w not in self._local)
            while self._used() + num_bytes + missing * self._largest > self._disk_bytes:
                if missing or any(w < window for w in self._local):
                    return False  # the consumer makes room, or the first goes first
                if not self._local:
                    raise DoesNotFit(
                        f"window {window} takes {num_bytes} bytes, --disk {format_bytes(self._disk_bytes)} does not "
                        f"hold it; use --disk {num_bytes + self._fixed_bytes()} or more"
                    )
                if not self._here:
                    return False  # a later one is on its way: it goes when it is here
                self._delete(max(self._here))  # nobody reads it before this one is there
            if self._taken.get(window) is not lane:
                return False
            self._local[window] = num_bytes
            self._high_water = max(self._high_water, self._used())
            return True

    def _fixed_bytes(self) -> int:
        return 8 * len(self.job.residents)

    def _used(self) -> int:
        return self._fixed_bytes() + sum(self._local.values())

    def _delete(self, window: int) -> None:
        for suffix in ("json", "pack", "residents.npy"):
            (self.packs / window_name(window, suffix)).unlink(missing_ok=True)
        self._here.discard(window)
        del self._local[window]
        self._remade += 1

    def _forget_used(self) -> None:
        """Notice windows that the consumer deleted."""
        for window in [w for w in self._here if not (self.packs / window_name(w, "pack")).exists()]:
            self._here.discard(window)
            del self._local[window]

    def publish(self, lane: Lane, window: int, index: bytes, pulled: Path, seconds: float) -> None:
        """A window is here, complete and checked, in the file `pulled`."""
        with self._changed:
            os.replace(pulled, self.packs / window_name(window, "pack"))
            # all windows start alike, so their residents are one file with many names
            os.link(self.packs / "residents.npy", self.packs / window_name(window, "residents.npy"))
            temporary = self.packs / "index.tmp"
            temporary.write_bytes(index)
            os.replace(temporary, self.packs / window_name(window, "json"))
            self._here.add(window)
            if self._taken.get(window) is lane:
                del self._taken[window]
            while self._lowest in self._here:
                self._lowest += 1
            self._pulled_bytes += self._local[window]
            self._pulled_windows += 1
            self._times.append(seconds)
            self._moved = time.monotonic()
            self._changed.notify_all()

    def abandon(self, window: int, pulled: Path) -> None:
        """A window that was admitted did not come."""
        with self._changed:
            pulled.unlink(missing_ok=True)
            del self._local[window]
            self._changed.notify_all()

    def failed(self, lane: Lane, window: int, kind: str, message: str) -> None:
        """A feeder could not build a window; what a second one cannot build either is the run's fault."""
        with self._changed:
            self._failures[window] = self._failures.get(window, 0) + 1
            if self._failures[window] >= min(2, len(self._lanes)):
                where = f"{lane.address[0]}:{lane.address[1]}"
                self._fail(_KINDS.get(kind, RuntimeError)(f"feeder {where} could not build window {window}: {message}"))
        self.give_back(lane, window, remake=True)

    def fail(self, error: Exception) -> None:
        """Make `check` raise."""
        with self._changed:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._changed.notify_all()

    def patience(self) -> float | None:
        """How long a window may take while others do better; None where there are no others, or nothing to compare."""
        with self._changed:
            if len(self._lanes) < 2 or not self._times:
                return None
            return max(self.pace.slow_s, self.pace.slow_factor * statistics.median(self._times))

    def lost(self, lane: Lane, cause: str) -> None:
        """A lane ends by itself: its windows go to the others."""
        with self._changed:
            if self._lanes.get(lane.address) is lane:
                self.faults.append(Fault(address=lane.address, cause=cause))
                self._dropped.add(lane.address)
                logger.warning("feeder %s:%d is used no more: %s", *lane.address, cause)
                self._end(lane)

    def _end(self, lane: Lane) -> None:
        self._lanes.pop(lane.address, None)
        lane.stop()
        for window in [w for w, owner in self._taken.items() if owner is lane]:
            del self._taken[window]
            self._remade += 1
        self._changed.notify_all()

    def pause(self, seconds: float) -> None:
        """Wait for anything to change."""
        with self._changed:
            self._changed.wait(seconds)

    def check(self) -> None:
        """Called by a consumer that waits: raises what went wrong, also where no feeder came for too long."""
        now = time.monotonic()
        with self._changed:
            waited = now - self._checked
            self._checked = now
            if waited < _CHECK_GAP_S:
                self._stall_s += waited
            else:
                self._moved = max(self._moved, now)  # a consumer that was busy was not waiting
            if self._error is not None:
                raise self._error
            if now - self._moved > self.pace.timeout_s:
                faults = "; ".join(f"{f.address[0]}:{f.address[1]} ({f.cause})" for f in self.faults) or "none"
                in_use = ", ".join(f"{host}:{port}" for host, port in self._lanes)
                what = f"feeders {in_use} gave no window" if in_use else "no feeder is left"
                raise RuntimeError(
                    f"{what} for {self.pace.timeout_s:.0f} s, window {self._lowest} is awaited; lost feeders: "
                    f"{faults}; look at their nodes, add feeders or raise cluster.timeout_s, then resume the run"
                )

    def stats(self) -> PullStats:
        """Numbers so far."""
        with self._changed:
            self._forget_used()
            return PullStats(
                feeders=len(self._lanes),
                queue_bytes=sum(self._local[window] for window in self._here),
                windows_waiting=len(self._here),
                pulled_bytes=self._pulled_bytes,
                pulled_windows=self._pulled_windows,
                remade=self._remade,
                stall_s=self._stall_s,
                disk_high_water=self._high_water,
            )

    def close(self) -> None:
        """End all lanes."""
        with self._changed:
            self._stopped = True
            lanes = list(self._lanes.values())
            for lane in lanes:
                self._end(lane)
        for lane in lanes:
            lane.join()


class PulledRows:
    """Rows from any feeder that is in use; a `storage.table.RowSource`."""

    def __init__(self, puller: Puller) -> None:
        self._puller, self.fingerprint = puller, puller.job.meta.graph

    @contextmanager
    def open_rows(self, row_format: RowFormat) -> Iterator["_Rows"]:
        """See `RowSource`."""
        assert row_format == self._puller.job.meta.row_format, (row_format, self._puller.job.meta)
        yield _Rows(self._puller, row_format.row_bytes)


class _Rows:
    def __init__(self, puller: Puller, row_bytes: int) -> None:
        self._puller, self._row_bytes = puller, row_bytes
        self.bytes_read = 0

    def gather(self, ids: NDArray[Any], out: NDArray[np.uint8]) -> None:
        """See `table.Rows`; asks one feeder after the other until `check` ends it."""
        most = max(1, MAX_ROWS_BYTES // self._row_bytes)
        for lo in range(0, len(ids), most):
            wanted = np.ascontiguousarray(ids[lo : lo + most], "<i8")
            data = self._ask(wanted.tobytes(), len(wanted) * self._row_bytes)
            out[lo : lo + most] = np.frombuffer(data, np.uint8).reshape(len(wanted), self._row_bytes)
            self.bytes_read += len(data)

    def _ask(self, ids: bytes, num_bytes: int) -> bytes:
        puller = self._puller
        while True:
            for address in puller.addresses:
                try:
                    with connect(address, puller.token, timeout_s=puller.pace.answer_s) as client:
                        client.ask({"op": "open", "job": puller.job.to_json()}, kept_bytes(puller.job))
                        data = client.ask({"op": "rows"}, ids, limit=num_bytes)[1]
                    if len(data) == num_bytes:
                        return data
                except (OSError, Refused, FormatError) as error:
                    logger.info("no rows from feeder %s:%d: %s", *address, error)
            puller.check()
            puller.pause(0.05)


def kept_bytes(job: WindowJob) -> bytes:
    """The payload that goes with a job."""
    return job.kept.astype("<i8").tobytes()


def describe_job(addresses: Sequence[Address], token: bytes, request: dict[str, Any], *, pace: Pace) -> WindowJob:
    """Let the first feeder that can set a job up; raises what is wrong with the request, RuntimeError where none can.

    A feeder that cannot be reached may be about to be replaced, but that is the caller's to know.
    """
    causes = []
    for address in addresses:
        try:
            with connect(address, token, timeout_s=pace.answer_s) as client:
                client.set_timeout(pace.timeout_s)
                head, kept = client.ask({"op": "describe", "request": request})
            job = WindowJob.from_json(head["job"], np.frombuffer(kept, "<i8").astype(np.int64))
            check_kept(job)
            return job
        except Refused as error:
            if error.kind in ("DoesNotFit", "DataError", "ValueError"):
                kinds = _KINDS | {"ValueError": ValueError}
                raise kinds[error.kind](f"feeder {address[0]}:{address[1]}: {error}") from error
            causes.append(f"{address[0]}:{address[1]} ({error})")
        except (OSError, FormatError) as error:
            causes.append(f"{address[0]}:{address[1]} ({error})")
    found = "; ".join(causes) or "there is none"
    raise RuntimeError(f"no feeder can set windows up: {found}; look at their nodes, then resume the run")


@contextmanager
def open_puller(
    addresses: Sequence[Address],
    token: bytes,
    *,
    sample: SampleConfig,
    plan: PlanConfig,
    budgets: Budgets,
    packs: Path,
    start_step: int,
    stop_step: int,
    split: Split = "train",
    shuffle: bool = True,
    deal: Deal | None = None,
    shares: int = 1,
    pace: Pace | None = None,
) -> Iterator[Puller]:
    """Pull the windows of steps start_step <= s < stop_step into the folder `packs`, which is deleted at the end.

    `budgets` are this replica's, its disk for windows here. `shares` is how many pullers use the same feeders at a
    time: each may fill that part of their disks. Raises DoesNotFit, DataError or ValueError where it cannot be done so.
    """
    pace = pace or Pace()
    request = {
        "sample": sample.model_dump(mode="json"),
        "plan": plan.model_dump(mode="json"),
        "budgets": asdict(budgets),
        "start_step": start_step,
        "stop_step": stop_step,
        "split": split,
        "shuffle": shuffle,
        "deal": None if deal is None else asdict(deal),
        "shares": shares,
    }
    job = describe_job(addresses, token, request, pace=pace)
    clear_windows(packs)
    try:
        write_packset(packs, job.meta)
        write_npy(packs / "residents.npy", job.residents)
        size = job.meta.window_items
        windows = range(start_step // size, max(start_step // size + 1, -(-stop_step // size)))
        puller = Puller(job, packs, windows, token, pace, disk_bytes=budgets.disk_bytes)
        try:
            puller.set_feeders(addresses)
            yield puller
        finally:
            puller.close()
    finally:
        shutil.rmtree(packs, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledFeed:
    """A feed, and what fills it."""

    feed: Feed
    puller: Puller


@contextmanager
def open_pulled_feed(
    addresses: Sequence[Address],
    token: bytes,
    *,
    sample: SampleConfig,
    plan: PlanConfig,
    budgets: Budgets,
    packs: Path,
    start_step: int,
    stop_step: int,
    split: Split = "train",
    shuffle: bool = True,
    deal: Deal | None = None,
    shares: int = 1,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    pace: Pace | None = None,
    graph: GraphStore | None = None,
    auto_release: bool = True,
) -> Iterator[PulledFeed]:
    """Feed steps start_step <= s < stop_step of a replica from feeders; see `open_puller` and `open_pack_feed`.

    Batches are those of every other feed, bit for bit. Without a `graph` the tiers are filled by the feeders.
    """
    with (
        open_puller(
            addresses,
            token,
            sample=sample,
            plan=plan,
            budgets=budgets,
            packs=packs,
            start_step=start_step,
            stop_step=stop_step,
            split=split,
            shuffle=shuffle,
            deal=deal,
            shares=shares,
            pace=pace,
        ) as puller,
        open_pack_feed(
            packs,
            PulledRows(puller) if graph is None else graph,
            start_step=start_step,
            stop_step=stop_step,
            host_memory=budgets.host_bytes,
            device=device,
            threads=threads,
            producer_check=puller.check,
            delete_behind=True,
            auto_release=auto_release,
        ) as feed,
    ):
        yield PulledFeed(feed=feed, puller=puller)
