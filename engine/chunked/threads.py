"""Ranks as threads of this process: no start-up, shared page cache, good for one stage or for trying things out."""

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from penstock.engine.chunked.backend import POLL_S, Board, Poll, open_board, spread_over_gpus
from penstock.engine.chunked.rank import open_rank
from penstock.engine.chunked.spec import RankSpec
from penstock.engine.chunked.transport import PeerLost, ThreadHub, ThreadTransport, patience_s
from penstock.engine.supervision import stacks
from penstock.engine.supervision.watch import START_S, Watch

logger = logging.getLogger(__name__)

_Call = tuple[str, tuple[Any, ...]]
_Answer = tuple[int, Any, BaseException | None]
_GRACE_S = 20.0  # for threads to see that they are to end


class ThreadBackend:
    """See backend.Backend; made by `open_threads`."""

    def __init__(self, specs: Sequence[RankSpec], board: Board, hub: ThreadHub) -> None:
        self.hub, self._specs, self._board = hub, specs, board
        self.threads: list[threading.Thread] = []
        self.inboxes: list[queue.SimpleQueue[_Call | None]] = [queue.SimpleQueue() for _ in specs]
        self.answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()

    def call(
        self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None, poll: Poll | None = None
    ) -> list[Any]:
        """See Backend."""
        given = list(arguments) if arguments is not None else [()] * len(self._specs)
        self._board.reset()
        for inbox, found in zip(self.inboxes, given, strict=True):
            inbox.put((method, found))
        return self.collect(method, given, poll)

    def collect(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...]],
        poll: Poll | None = None,
        timeout_s: float | None = None,
    ) -> list[Any]:
        """Wait for one answer per rank."""
        watch = Watch(
            self._specs,
            self._board,
            method,
            arguments,
            collect=lambda ranks: stacks.of_threads({rank: self.threads[rank].ident for rank in ranks}),
            where=lambda rank: f"thread {self.threads[rank].name}",
            timeout_s=timeout_s,
        )
        while not watch.is_over:
            try:
                rank, value, error = self.answers.get(timeout=POLL_S)
            except queue.Empty:
                watch.tick()
                if poll is not None and not watch.has_failed:
                    poll()
                continue
            if error is None:
                watch.add(rank, value)
            else:
                self.hub.aborted.set()  # the others wait for this one: they end with PeerLost
                watch.fail(rank, error)
        return watch.values()

    def close(self) -> None:
        """End the threads. One that does not come to its next action cannot be ended: it is left behind."""
        self.hub.aborted.set()
        for inbox in self.inboxes:
            inbox.put(None)
        ends = time.monotonic() + _GRACE_S
        for thread in self.threads:
            thread.join(max(0.0, ends - time.monotonic()))
            if thread.is_alive():
                logger.warning("thread %s did not end within %.0f s; it is left behind", thread.name, _GRACE_S)


def _serve(spec: RankSpec, hub: ThreadHub, board: Board, backend: ThreadBackend) -> None:
    """Be a rank until None comes, or until another one fails or the backend is left, at the next action."""
    told = board.heartbeat(spec.rank)

    def beat(done: int, total: int) -> None:
        told(done, total)
        if hub.aborted.is_set():
            raise PeerLost(f"rank {spec.rank} stopped after action {done} of {total}: another rank failed")

    try:
        transport = ThreadTransport(hub, spec.rank, patience_s(spec.timeout_s))
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
    backend = ThreadBackend(specs, board, hub)
    try:
        for spec in specs:
            thread = threading.Thread(
                target=_serve, args=(spec, hub, board, backend), name=f"rank-{spec.rank}", daemon=True
            )
            thread.start()
            backend.threads.append(thread)
        backend.collect("start", [()] * len(specs), timeout_s=max(START_S, specs[0].timeout_s))
        yield backend
    finally:
        backend.close()
