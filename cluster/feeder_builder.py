"""What a feeder has on its disk: windows that were asked for, built by threads, under one budget for all who ask."""

import heapq
import logging
import os
import shutil
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from penstock.sampler.lookahead import BYTES_PER_NODE
from penstock.sampler.rolling import used_bytes
from penstock.sampler.windowtask import WindowJob, build_window
from penstock.storage.budget import MIB, available_memory, format_bytes, free_disk
from penstock.storage.directio import PAGE
from penstock.storage.errors import DoesNotFit
from penstock.storage.graph import GraphStore
from penstock.storage.trace import window_name

logger = logging.getLogger(__name__)

State = Literal["queued", "building", "done", "failed", "no room", "unknown"]
_LEAST_MEMORY = 64 * MIB
_JOIN_S = 30.0  # a window under way may be about to be written


@dataclass(frozen=True, slots=True, kw_only=True)
class FeederSpec:
    """Where a feeder works. `folder` is shared by the feeders of a host, each has one of its own in it.

    None means a tenth of the free disk, and a quarter of the free memory. With a `uri`, `graph` is its local copy.
    """

    graph: Path
    folder: Path
    disk_bytes: int | None = None
    memory: int | None = None
    threads: int = 1
    host: str = "127.0.0.1"
    uri: str | None = None


@dataclass(slots=True, eq=False)
class Order:
    """A window that was asked for; changed under the feeder's lock. `reserved` bytes of disk are its own.

    One that is being fetched gives its room to no other: the connection reads its files.
    """

    session: object
    job: WindowJob
    window: int
    folder: Path
    reserved: int
    state: State = "queued"
    error: str = ""
    kind: str = ""
    num_inputs: int = 0  # of the item that outgrew its room
    index_xxh3: str = ""
    pack_xxh3: str = ""
    pack_bytes: int = 0
    is_dropped: bool = False
    is_fetched: bool = False


class _NoRoom(Exception):
    """The window turned out larger than its reservation, and others are in the way; it is to be asked for again."""


class Feeder:
    """Builds windows on `threads` threads for all sessions, under one disk budget; owns its lock."""

    def __init__(self, spec: FeederSpec, graph: GraphStore, folder: Path) -> None:
        self.spec, self.graph, self.folder = spec, graph, folder
        self.disk_bytes = free_disk(folder) // 10 if spec.disk_bytes is None else spec.disk_bytes
        self.room = self.disk_bytes - PAGE  # `folder` itself takes one
        total = available_memory() // 4 if spec.memory is None else spec.memory
        # every thread plans by three int32 arrays over all nodes, see `windowtask`
        self.memory = max(_LEAST_MEMORY, total // spec.threads - BYTES_PER_NODE * graph.num_nodes)
        self.changed = threading.Condition()
        self._queue: list[tuple[int, int, Order]] = []
        self._orders: set[Order] = set()
        self._serial, self._stopped, self._high_water = 0, False, 0
        self._workers = [
            threading.Thread(target=self._work, name=f"penstock-build-{n}", daemon=True) for n in range(spec.threads)
        ]
        for worker in self._workers:
            worker.start()

    def scratch(self, name: str) -> Path:
        """A folder that nobody else has."""
        with self.changed:
            self._serial += 1
            return self.folder / f"{name}-{self._serial}"

    def accept(self, session: object, job: WindowJob, window: int) -> Order | None:
        """Queue a window if there is room for it, perhaps in place of later ones of the session; None where not.

        DoesNotFit where there never will be room.
        """
        limit = min(job.feeder_bytes, self.room)
        if job.build_bytes > limit:
            raise DoesNotFit(
                f"building a window takes {job.build_bytes} bytes, this feeder has {format_bytes(limit)} of disk for "
                f"it; set cluster.feeder_disk to {self._disk_for(job, job.build_bytes)} or more"
            )
        folder = self.scratch("window")
        with self.changed:
            while not self._fits(session, job, job.build_bytes):
                later = [o for o in self._later(session, window) if o.state == "done" and not o.is_fetched]
                if not later:
                    return None
                self._drop(max(later, key=lambda order: order.window))
            order = Order(session, job, window, folder, job.build_bytes)
            self._orders.add(order)
            self._serial += 1  # orders do not compare
            heapq.heappush(self._queue, (window, self._serial, order))
            self._note()
            self.changed.notify_all()
            return order

    def _disk_for(self, job: WindowJob, num_bytes: int) -> int:
        """The disk of which a job's share holds so many bytes."""
        return num_bytes * max(1, self.room // job.feeder_bytes) + PAGE

    def _later(self, session: object, window: int) -> list[Order]:
        return [order for order in self._orders if order.session is session and order.window > window]

    def _fits(self, session: object, job: WindowJob, more: int) -> bool:
        own = sum(order.reserved for order in self._orders if order.session is session)
        return own + more <= job.feeder_bytes and self._reserved() + more <= self.room

    def _reserved(self) -> int:
        return sum(order.reserved for order in self._orders)

    def _note(self) -> None:
        self._high_water = max(self._high_water, self._reserved())

    def hold(self, order: Order) -> bool:
        """Keep a window that is done until its session drops it; False where it was dropped or is not done."""
        with self.changed:
            order.is_fetched = order.state == "done" and not order.is_dropped
            return order.is_fetched

    def drop(self, order: Order) -> None:
        """Forget a window and delete its files; one that is being built goes when it is done."""
        with self.changed:
            self._drop(order)

    def _drop(self, order: Order) -> None:
        order.is_dropped = True
        if order.state == "building":
            return
        self._orders.discard(order)
        shutil.rmtree(order.folder, ignore_errors=True)
        self.changed.notify_all()

    def _work(self) -> None:
        while True:
            with self.changed:
                while not self._queue and not self._stopped:
                    self.changed.wait(1.0)
                if self._stopped:
                    return
                _, _, order = heapq.heappop(self._queue)
                if order.is_dropped:
                    continue
                order.state = "building"
            state: State = "failed"
            try:
                self._build(order)
                state = "done"
            except _NoRoom:
                order.is_dropped = True
            except Exception as error:  # a boundary: the one who asked is told
                logger.info("window %d failed", order.window, exc_info=True)
                order.error, order.kind = str(error) or repr(error), type(error).__name__
                order.num_inputs = getattr(error, "num_inputs", 0)
                shutil.rmtree(order.folder, ignore_errors=True)
            with self.changed:
                order.state = state
                order.reserved = used_bytes(order.folder) + PAGE  # the folder's own
                if order.is_dropped:
                    self._drop(order)
                self.changed.notify_all()

    def _build(self, order: Order) -> None:
        def reserve(num_bytes: int) -> None:
            self._enlarge(order, num_bytes + PAGE)

        index = build_window(self.graph, order.job, order.window, order.folder, memory=self.memory, reserve=reserve)
        (order.folder / window_name(order.window, "residents.npy")).unlink()  # the job says what it holds
        text = (order.folder / window_name(order.window, "json")).read_bytes()
        order.index_xxh3 = str(xxhash.xxh3_64_hexdigest(text))
        order.pack_bytes = index.offsets[-1] + index.bytes[-1]

    def _enlarge(self, order: Order, num_bytes: int) -> None:
        """Reserve what a window takes as planned; later windows of its session make room, or are waited for.

        Only later ones are waited for, so that two builders never wait for each other.
        """
        limit = min(order.job.feeder_bytes, self.room)
        if num_bytes > limit:
            raise DoesNotFit(
                f"window {order.window} takes {num_bytes} bytes while it is built, this feeder has "
                f"{format_bytes(limit)} of disk for it; set cluster.feeder_disk to "
                f"{self._disk_for(order.job, num_bytes)} or more"
            )
        with self.changed:
            while not self._fits(order.session, order.job, num_bytes - order.reserved):
                later = self._later(order.session, order.window)
                if not later:
                    raise _NoRoom
                last = max(later, key=lambda found: (found.state != "building" and not found.is_fetched, found.window))
                if last.state == "building" or last.is_fetched:
                    self.changed.wait(1.0)
                else:
                    self._drop(last)
                if self._stopped or order.is_dropped:
                    raise _NoRoom
            if self._stopped or order.is_dropped:
                raise _NoRoom
            order.reserved = num_bytes
            self._note()

    def status(self) -> dict[str, Any]:
        """Numbers, and what the graph is."""
        with self.changed:
            states = [order.state for order in self._orders]
            return {
                "disk_bytes": self.disk_bytes,
                "used_bytes": self._reserved(),
                "high_water_bytes": self._high_water,
                "windows_waiting": states.count("done"),
                "windows_wanted": states.count("queued") + states.count("building"),
                "threads": self.spec.threads,
                "pid": os.getpid(),
                "fingerprint": self.graph.fingerprint,
                "graph": asdict(self.graph.meta),
            }

    def close(self) -> None:
        """Stop the threads; a window under way is given up before it is written, or ends first."""
        with self.changed:
            self._stopped = True
            self.changed.notify_all()
        for worker in self._workers:
            worker.join(_JOIN_S)
