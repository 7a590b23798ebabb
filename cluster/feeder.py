"""A feeder: builds the windows that trainers ask it for, ahead of them, and hands them out; nothing here imports Ray.

A trainer's connection is a session: it opens a job (`sampler.windowtask`), asks for windows by number, waits for them,
fetches them and says when it has them. Windows live as long as their session, so a trainer that dies leaves nothing
behind. All sessions share a disk budget, and each job has its share of it; where there is no room a window is refused
for now, which is how a trainer that falls behind slows its feeders. Requests, by `op`:

| op | answer |
|---|---|
| `status` | disk budget, bytes reserved and their high-water mark, windows, and what the graph is |
| `describe` | a job for a trainer's budgets; its `kept` ids as payload |
| `open` (payload: `kept`) | opens the job for this session; how many windows are built at a time |
| `build` | `queued`, `building`, `done`, `failed` or `no room` |
| `wait` | the state of each window asked for, as soon as one is done, or after `seconds` |
| `fetch` | the window's `index` or `pack` |
| `release` | deletes the window |
| `rows` (payload: ids) | rows as the job's packs hold them |
"""

import heapq
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.cluster.feeder_folder import own_folder
from penstock.sampler.neighbors import SampleConfig
from penstock.sampler.plan import PlanConfig
from penstock.sampler.rolling import used_bytes
from penstock.sampler.windowtask import WindowJob, build_window, check_kept, job_trace, make_job
from penstock.storage.budget import MIB, Budgets, available_memory, format_bytes, free_disk
from penstock.storage.deal import Deal
from penstock.storage.errors import DoesNotFit
from penstock.storage.graph import GraphStore, open_graph
from penstock.storage.remote.stage import staged
from penstock.storage.table import gather_rows
from penstock.storage.trace import window_name
from penstock.storage.transfer import Address, Answer, Head, serve

logger = logging.getLogger(__name__)

State = Literal["queued", "building", "done", "failed", "no room", "unknown"]
MAX_ROWS_BYTES = 64 * MIB  # of one answer to `rows`
_MAX_WAIT_S = 5.0
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
    """A window that was asked for; changed under the feeder's lock. `reserved` bytes of disk are its own."""

    session: "FeederSession"
    job: WindowJob
    window: int
    folder: Path
    reserved: int
    state: State = "queued"
    error: str = ""
    kind: str = ""
    index_xxh3: str = ""
    pack_xxh3: str = ""
    pack_bytes: int = 0
    is_dropped: bool = False


class _NoRoom(Exception):
    """The window turned out larger than its reservation, and others are in the way; it is to be asked for again."""


class Feeder:
    """Builds windows on `threads` threads for all sessions, under one disk budget; owns its lock."""

    def __init__(self, spec: FeederSpec, graph: GraphStore, folder: Path) -> None:
        self.spec, self.graph, self.folder = spec, graph, folder
        self.disk_bytes = free_disk(folder) // 10 if spec.disk_bytes is None else spec.disk_bytes
        total = available_memory() // 4 if spec.memory is None else spec.memory
        self.memory = max(_LEAST_MEMORY, total // spec.threads)
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

    def accept(self, session: "FeederSession", job: WindowJob, window: int) -> Order | None:
        """Queue a window if there is room for it, perhaps in place of later ones of the session; None where not.

        DoesNotFit where there never will be room.
        """
        limit = min(job.feeder_bytes, self.disk_bytes)
        if job.build_bytes > limit:
            wanted = job.build_bytes * max(1, self.disk_bytes // job.feeder_bytes)
            raise DoesNotFit(
                f"building a window takes {job.build_bytes} bytes, this feeder has {format_bytes(limit)} of disk for "
                f"it; set cluster.feeder_disk to {wanted} or more"
            )
        folder = self.scratch("window")
        with self.changed:
            while not self._fits(session, job, job.build_bytes):
                later = [o for o in self._orders if o.session is session and o.state == "done" and o.window > window]
                if not later:
                    return None
                self._drop(max(later, key=lambda order: order.window))
            order = Order(session, job, window, folder, job.build_bytes)
            self._orders.add(order)
            heapq.heappush(self._queue, (window, self._serial, order))
            self._note()
            self.changed.notify_all()
            return order

    def _fits(self, session: "FeederSession", job: WindowJob, more: int) -> bool:
        own = sum(order.reserved for order in self._orders if order.session is session)
        return own + more <= job.feeder_bytes and self._reserved() + more <= self.disk_bytes

    def _reserved(self) -> int:
        return sum(order.reserved for order in self._orders)

    def _note(self) -> None:
        self._high_water = max(self._high_water, self._reserved())

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
                shutil.rmtree(order.folder, ignore_errors=True)
            with self.changed:
                order.state = state
                order.reserved = used_bytes(order.folder)
                if order.is_dropped:
                    self._drop(order)
                self.changed.notify_all()

    def _build(self, order: Order) -> None:
        def reserve(num_bytes: int) -> None:
            self._enlarge(order, num_bytes)

        index = build_window(self.graph, order.job, order.window, order.folder, memory=self.memory, reserve=reserve)
        (order.folder / window_name(order.window, "residents.npy")).unlink()  # the job says what it holds
        text = (order.folder / window_name(order.window, "json")).read_bytes()
        order.index_xxh3 = str(xxhash.xxh3_64_hexdigest(text))
        order.pack_bytes = index.offsets[-1] + index.bytes[-1]

    def _enlarge(self, order: Order, num_bytes: int) -> None:
        """Reserve what a window takes as planned; later windows of its session make room, or are waited for.

        Only later ones are waited for, so that two builders never wait for each other.
        """
        limit = min(order.job.feeder_bytes, self.disk_bytes)
        if num_bytes > limit:
            raise DoesNotFit(
                f"window {order.window} takes {num_bytes} bytes while it is built, this feeder has "
                f"{format_bytes(limit)} of disk for it; raise cluster.feeder_disk, or resume the run: it sizes its "
                "windows anew, where training is now"
            )
        with self.changed:
            while not self._fits(order.session, order.job, num_bytes - order.reserved):
                later = [o for o in self._orders if o.session is order.session and o.window > order.window]
                if not later:
                    raise _NoRoom
                last = max(later, key=lambda found: (found.state != "building", found.window))
                if last.state == "building":
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


class FeederSession:
    """What one trainer asks, on one connection; a `transfer.Session`."""

    def __init__(self, feeder: Feeder) -> None:
        self._feeder = feeder
        self._job: WindowJob | None = None
        self._orders: dict[int, Order] = {}

    def answer(self, head: Head, payload: bytes) -> Answer:
        """See `transfer.Session`."""
        op = head.get("op")
        if op == "status":
            return Answer(head=self._feeder.status())
        if op == "describe":
            return self._describe(head["request"])
        if op == "open":
            return self._open(head["job"], payload)
        if self._job is None:
            raise ValueError(f"{op!r} before a job was opened")
        if op == "rows":
            return self._rows(self._job, payload)
        if op == "wait":
            return self._wait([int(window) for window in head["windows"]], float(head["seconds"]))
        window = int(head["window"])
        if not 0 <= window < self._job.meta.num_windows:
            raise ValueError(f"window {window} is not within 0..{self._job.meta.num_windows - 1}")
        if op == "build":
            return self._build(self._job, window)
        if op == "fetch":
            return self._fetch(window, head["part"])
        if op == "release":
            self._forget(window)
            return Answer(head={})
        raise ValueError(f"{op!r} is nothing that a feeder does")

    def _describe(self, request: dict[str, Any]) -> Answer:
        feeder, deal = self._feeder, request["deal"]
        job = make_job(
            feeder.graph,
            feeder.scratch("probe"),
            SampleConfig.model_validate(request["sample"]),
            PlanConfig.model_validate(request["plan"]),
            Budgets(**request["budgets"]),
            start_step=request["start_step"],
            stop_step=request["stop_step"],
            feeder_bytes=feeder.disk_bytes // int(request["shares"]),
            split=request["split"],
            shuffle=request["shuffle"],
            deal=None if deal is None else Deal(**deal),
            memory=feeder.memory,
            threads=feeder.spec.threads,
        )
        return Answer(head={"job": job.to_json()}, data=job.kept.astype("<i8").tobytes())

    def _open(self, value: dict[str, Any], payload: bytes) -> Answer:
        job = WindowJob.from_json(value, np.frombuffer(payload, "<i8").astype(np.int64))
        job_trace(self._feeder.graph, job)
        check_kept(job)
        self.close()
        self._job = job
        return Answer(head={"threads": self._feeder.spec.threads})

    def _build(self, job: WindowJob, window: int) -> Answer:
        self._look(window)
        if window not in self._orders:
            order = self._feeder.accept(self, job, window)
            if order is None:
                return Answer(head={"state": "no room"})
            self._orders[window] = order
        return Answer(head={"state": self._orders[window].state})

    def _look(self, window: int) -> Order | None:
        """The order of a window, unless it was dropped meanwhile."""
        order = self._orders.get(window)
        if order is not None and order.is_dropped:
            del self._orders[window]
            return None
        return order

    def _wait(self, windows: list[int], seconds: float) -> Answer:
        def news() -> dict[str, Any]:
            found = {}
            for window in windows:
                order = self._look(window)
                found[str(window)] = (
                    {"state": "unknown"}
                    if order is None
                    else {"state": order.state, "bytes": order.pack_bytes, "error": order.error, "kind": order.kind}
                )
            return found

        with self._feeder.changed:
            self._feeder.changed.wait_for(
                lambda: any(entry["state"] not in ("queued", "building") for entry in news().values()),
                min(seconds, _MAX_WAIT_S),
            )
            return Answer(head={"windows": news()})

    def _fetch(self, window: int, part: str) -> Answer:
        order = self._look(window)
        if order is None or order.state != "done":
            raise ValueError(f"window {window} is not there")
        if part == "index":
            data = (order.folder / window_name(window, "json")).read_bytes()
            return Answer(head={}, data=data, xxh3=order.index_xxh3)
        if part != "pack":
            raise ValueError(f"a window has an index and a pack, no {part!r}")
        # the index has the checksums of the extents, which are all of the file
        return Answer(head={}, file=order.folder / window_name(window, "pack"), file_bytes=order.pack_bytes, xxh3="")

    def _rows(self, job: WindowJob, payload: bytes) -> Answer:
        ids, row_bytes = np.frombuffer(payload, "<i8"), job.meta.row_format.row_bytes
        if len(ids) * row_bytes > MAX_ROWS_BYTES:
            raise ValueError(f"{len(ids)} rows are more than {MAX_ROWS_BYTES} bytes; ask for fewer at a time")
        rows: NDArray[np.uint8] = np.empty((len(ids), row_bytes), np.uint8)
        gather_rows(self._feeder.graph, ids, rows, job.meta.row_format)
        return Answer(head={}, data=rows.reshape(-1))

    def _forget(self, window: int) -> None:
        order = self._orders.pop(window, None)
        if order is not None:
            self._feeder.drop(order)

    def close(self) -> None:
        """Delete all that was built for this connection."""
        for window in list(self._orders):
            self._forget(window)


@contextmanager
def open_feeder(spec: FeederSpec, token: bytes, *, idle_s: float = 60.0) -> Iterator[tuple[Feeder, Address]]:
    """Serve windows of a graph to those who know the token, until the context is left; then nothing is left of it."""
    with nullcontext() if spec.uri is None else staged(spec.uri, spec.graph), own_folder(spec.folder) as folder:
        feeder = Feeder(spec, open_graph(spec.graph), folder)
        try:
            with serve(spec.host, token, lambda: FeederSession(feeder), idle_s=idle_s) as server:
                yield feeder, server.address
        finally:
            feeder.close()
