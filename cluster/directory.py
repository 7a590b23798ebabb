"""Which feeders there are: the driver knows, replicas ask it all along, and say which ones were of no use.

A replica that waits for windows cannot be called by the driver, so it asks: a small server of the driver, under the
feeders' token. Nothing here imports Ray.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

from penstock.cluster.feeder_pool import FeederPool
from penstock.cluster.puller import Puller
from penstock.engine.chunked.backend import Poll
from penstock.storage.transfer import Address, Answer, Head, Refused, connect, serve

logger = logging.getLogger(__name__)

_ASK_S = 0.5
_ANSWER_S = 10.0


class Directory:
    """The driver's side; `poll` belongs to the thread that owns the pool, the rest is asked from any."""

    def __init__(self, pool: FeederPool) -> None:
        self._pool, self._addresses = pool, list[Address]()
        self._complaints: SimpleQueue[tuple[Address, str]] = SimpleQueue()
        self.address: Address = ("", 0)

    @property
    def token(self) -> bytes:
        """What replicas need to ask."""
        return self._pool.token

    @property
    def pool(self) -> FeederPool:
        """The feeders."""
        return self._pool

    def poll(self) -> None:
        """Replace feeders that died or that a replica gave up. Never waits."""
        while True:
            try:
                address, cause = self._complaints.get_nowait()
            except Empty:
                break
            self._pool.replace(address, cause)
        self._pool.poll()
        self._addresses = self._pool.addresses

    def wait_ready(self, timeout_s: float, poll: Poll) -> None:
        """Wait for the first feeder; RuntimeError, with causes, where none comes. See `FeederPool.wait_ready`."""
        self._pool.wait_ready(timeout_s, poll=poll)
        self.poll()

    def answer(self, head: Head, payload: bytes) -> Answer:
        """See `transfer.Session`."""
        if head.get("op") != "feeders":
            raise ValueError(f"{head.get('op')!r} is nothing that a directory does")
        for host, port, cause in head["faults"]:
            self._complaints.put(((str(host), int(port)), str(cause)[:500]))
        return Answer(head={"addresses": [list(address) for address in self._addresses]})

    def close(self) -> None:
        """See `transfer.Session`; a connection that ends changes nothing."""


@contextmanager
def open_directory(pool: FeederPool, host: str) -> Iterator[Directory]:
    """Answer replicas on an address of this host, until the context is left."""
    directory = Directory(pool)
    with serve(host, pool.token, lambda: directory, idle_s=60.0) as server:
        directory.address = server.address
        yield directory


def ask(address: Address, token: bytes, faults: list[tuple[str, int, str]] | None = None) -> list[Address]:
    """Addresses of the feeders that are alive; OSError or Refused where the driver does not answer."""
    with connect(address, token, timeout_s=_ANSWER_S) as client:
        head: dict[str, Any] = client.ask({"op": "feeders", "faults": faults or []})[0]
    return [(str(host), int(port)) for host, port in head["addresses"]]


@contextmanager
def followed(address: Address, token: bytes, puller: Puller) -> Iterator[None]:
    """Keep a puller's feeders up to date, on a thread, until the context is left."""
    over = threading.Event()

    def follow() -> None:
        told = 0
        while not over.wait(_ASK_S):
            faults = puller.faults[told:]
            try:
                found = ask(address, token, [(*fault.address, fault.cause) for fault in faults])
            except (OSError, Refused) as error:  # a driver that is gone ends this process soon
                logger.info("the driver does not say which feeders there are: %s", error)
                continue
            told += len(faults)
            puller.set_feeders(found)

    thread = threading.Thread(target=follow, name="penstock-directory", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
