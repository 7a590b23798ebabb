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

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.cluster.feeder_builder import Feeder, FeederSpec, Order
from penstock.cluster.feeder_folder import own_folder
from penstock.sampler.neighbors import SampleConfig
from penstock.sampler.plan import PlanConfig
from penstock.sampler.windowtask import WindowJob, check_kept, job_trace, make_job
from penstock.storage.budget import MIB, Budgets
from penstock.storage.deal import Deal
from penstock.storage.graph import open_graph
from penstock.storage.remote.stage import staged
from penstock.storage.table import gather_rows
from penstock.storage.trace import window_name
from penstock.storage.transfer import Address, Answer, Head, serve

MAX_ROWS_BYTES = 64 * MIB  # of one answer to `rows`
_MAX_WAIT_S = 5.0


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
            feeder_bytes=feeder.room // int(request["shares"]),
            split=request["split"],
            shuffle=request["shuffle"],
            deal=None if deal is None else Deal(**deal),
            memory=feeder.memory,
            threads=feeder.spec.threads,
            known_inputs=int(request.get("known_inputs", 0)),
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
                    else {
                        "state": order.state,
                        "bytes": order.pack_bytes,
                        "error": order.error,
                        "kind": order.kind,
                        "num_inputs": order.num_inputs,
                    }
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
        if order is None or not self._feeder.hold(order):
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
