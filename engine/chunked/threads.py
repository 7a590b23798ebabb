"""Ranks as threads of this process: no start-up, shared page cache, good for one stage or for trying things out."""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from penstock.engine.chunked.backend import POLL_S, Board, Poll, open_board, raise_first, spread_over_gpus
from penstock.engine.chunked.rank import open_rank
from penstock.engine.chunked.spec import RankSpec
from penstock.engine.chunked.transport import PeerLost, ThreadHub, ThreadTransport

_Call = tuple[str, tuple[Any, ...]]
_Answer = tuple[int, Any, BaseException | None]


class ThreadBackend:
    """See backend.Backend; made by `open_threads`."""

    def __init__(self, num_ranks: int, hub: ThreadHub) -> None:
        self.hub = hub
        self.inboxes: list[queue.SimpleQueue[_Call | None]] = [queue.SimpleQueue() for _ in range(num_ranks)]
        self.answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()

    def call(
        self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None, poll: Poll | None = None
    ) -> list[Any]:
        """See Backend."""
        for rank, inbox in enumerate(self.inboxes):
            inbox.put((method, arguments[rank] if arguments else ()))
        return self.collect(poll)

    def collect(self, poll: Poll | None = None) -> list[Any]:
        """Wait for one answer per rank."""
        found: dict[int, Any] = {}
        errors: list[tuple[int, BaseException]] = []
        while len(found) + len(errors) < len(self.inboxes):
            try:
                rank, value, error = self.answers.get(timeout=POLL_S)
            except queue.Empty:
                if poll is not None and not errors:
                    poll()
                continue
            if error is None:
                found[rank] = value
            else:
                errors.append((rank, error))
                self.hub.aborted.set()  # the others wait for this one: they end with PeerLost
        if errors:
            raise_first(errors)
        return [found[rank] for rank in range(len(self.inboxes))]


def _serve(spec: RankSpec, hub: ThreadHub, board: Board, backend: ThreadBackend) -> None:
    """Be a rank until None comes, or until another one fails or the backend is left, at the next action."""
    told = board.heartbeat(spec.rank)

    def beat(done: int, total: int) -> None:
        told(done, total)
        if hub.aborted.is_set():
            raise PeerLost(f"rank {spec.rank} stopped after action {done} of {total}: another rank failed")

    try:
        transport = ThreadTransport(hub, spec.rank, spec.timeout_s)
        with open_rank(spec, transport, beat) as rank:
            backend.answers.put((spec.rank, None, None))
            while (call := backend.inboxes[spec.rank].get()) is not None:
                method, arguments = call
                backend.answers.put((spec.rank, getattr(rank, method)(*arguments), None))
    except BaseException as error:  # noqa: B036  the thread's boundary: the caller raises it
        backend.answers.put((spec.rank, None, error))


@contextmanager
def open_threads(specs: Sequence[RankSpec]) -> Iterator[ThreadBackend]:
    """Start one thread per rank; they have ended when the context is left."""
    specs, _ = spread_over_gpus(specs)
    hub = ThreadHub()
    board = open_board(specs)
    backend = ThreadBackend(len(specs), hub)
    threads = [
        threading.Thread(target=_serve, args=(spec, hub, board, backend), name=f"rank-{spec.rank}", daemon=True)
        for spec in specs
    ]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
        backend.collect()
        yield backend
    finally:
        hub.aborted.set()
        for inbox in backend.inboxes:
            inbox.put(None)
        for thread in started:
            thread.join()
