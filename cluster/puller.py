"""A replica's end of the feeders: ask for windows ahead, pull what is built, check it, and feed from it.

Each feeder has a lane: a thread with a connection of its own, which takes the lowest windows that nobody has, keeps as
many in flight as the feeder builds at a time and one more, and pulls those that are done as far as the local disk
allows. A lane whose feeder is lost, damages what it sends or is far slower than the others ends, and its windows go to
the other lanes; any feeder builds the same bytes, so nothing depends on who does it. Nothing here imports Ray.
"""

import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.cluster.lane import Lane, Pace
from penstock.sampler.windowtask import WindowJob
from penstock.storage.budget import format_bytes
from penstock.storage.errors import DataError, DoesNotFit, FormatError, Outgrown
from penstock.storage.pack import WINDOW_FILES
from penstock.storage.trace import window_name
from penstock.storage.transfer import Address

logger = logging.getLogger(__name__)

KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (DoesNotFit, DataError, FormatError)}
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
        self,
        job: WindowJob,
        packs: Path,
        windows: range,
        token: bytes,
        pace: Pace,
        *,
        disk_bytes: int,
        on_error: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """`on_error` is told the first error that `check` will raise."""
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
        self._on_error = on_error
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
        for suffix in WINDOW_FILES:
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

    def failed(self, lane: Lane, window: int, kind: str, message: str, num_inputs: int = 0) -> None:
        """A feeder could not build a window; what a second one cannot build either is the run's fault.

        `num_inputs` is of `Outgrown`.
        """
        with self._changed:
            self._failures[window] = self._failures.get(window, 0) + 1
            if self._failures[window] >= min(2, len(self._lanes)):
                where = f"{lane.address[0]}:{lane.address[1]}"
                what = f"feeder {where} could not build window {window}: {message}"
                error = Outgrown(what, num_inputs=num_inputs) if kind == "Outgrown" else None
                self._fail(error or KINDS.get(kind, RuntimeError)(what))
        self.give_back(lane, window, remake=True)

    def fail(self, error: Exception) -> None:
        """Make `check` raise."""
        with self._changed:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            self._on_error(error)
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
