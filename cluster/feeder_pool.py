"""A number of feeders that is kept: dead ones are replaced, here by processes of this machine, by Ray in `feeders`.

Nobody waits in `poll`, which the loop that drives training calls now and then.
"""

import logging
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from penstock.cluster.feeder import open_feeder
from penstock.cluster.feeder_builder import FeederSpec
from penstock.cluster.feeder_folder import sweep
from penstock.engine.chunked.backend import NoRoomYet, Poll, RankFailed
from penstock.engine.supervision.events import FeederFailed, ReplaceFeeder
from penstock.engine.supervision.policy import State, step
from penstock.storage.children import start_child
from penstock.storage.lifeline import end_with
from penstock.storage.transfer import Address, Refused, connect, new_token

logger = logging.getLogger(__name__)

_STATUS_S = 2.0
_STOP_S = 10.0
_POLL_S = 0.02
_NEWS_S = 5.0  # a wait that is longer is told


class Handle(Protocol):
    """A feeder that was started."""

    address: Address | None
    where: str

    def look(self) -> str | None:
        """Take news in, without waiting; why it is of no more use, or None."""

    def stop(self) -> None:
        """End it, and what it left on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A feeder that was replaced, or could not be any more."""

    where: str
    cause: str
    is_replaced: bool


class FeederPool:
    """Keeps `count` feeders alive, replacing each at most `retries` times, as the failure policy says; used by one
    thread.

    `losses` are those that were lost; `addresses` those that can be asked now.
    """

    def __init__(self, start: Callable[[], Handle], token: bytes, *, count: int, retries: int) -> None:
        self.token = token
        self._start, self._count = start, count
        self._policy = State(num_ranks=1, feeder_retries=retries)
        self._handles: list[Handle] = []
        self._seats: dict[Handle, int] = {}
        self._ends: list[threading.Thread] = []
        self.losses: list[Loss] = []
        for seat in range(count):
            self._seat(seat)

    @property
    def addresses(self) -> list[Address]:
        """Of the feeders that are ready."""
        return [handle.address for handle in self._handles if handle.address is not None]

    def poll(self) -> bool:
        """Replace dead feeders; whether `addresses` changed since the last call. Never waits.

        RankFailed where one died that was replaced too often.
        """
        before = self.addresses
        for handle in list(self._handles):
            cause = handle.look()
            if cause is not None:
                self._lose(handle, cause, is_dead=True)
        return self.addresses != before

    def replace(self, address: Address, cause: str) -> None:
        """End a feeder that somebody found useless (see `Puller.faults`), and start another; no error if it is gone."""
        for handle in list(self._handles):
            if handle.address == address:
                self._lose(handle, cause, is_dead=False)

    def _seat(self, seat: int) -> None:
        handle = self._start()
        self._handles.append(handle)
        self._seats[handle] = seat

    def _lose(self, handle: Handle, cause: str, *, is_dead: bool) -> None:
        seat = self._seats[handle]
        seen = FeederFailed(at_s=time.monotonic(), feeder=seat, is_dead=is_dead)
        self._policy, decisions = step(self._policy, [seen])
        is_replaced = ReplaceFeeder(seat) in decisions
        if is_dead or is_replaced:  # one that is only slow stays, where there may be no other
            self._handles.remove(handle)
            del self._seats[handle]
            self._end(handle)
        self.losses.append(Loss(where=handle.where, cause=cause, is_replaced=is_replaced))
        if is_replaced:
            logger.warning("the feeder on %s was lost (%s); another is started", handle.where, cause)
            self._seat(seat)
        elif is_dead:
            raise RankFailed(
                f"the feeder on {handle.where} was lost ({cause}), as were those in its place before it "
                f"({len(self.losses)} losses in all); look at that node, or set fewer feeders"
            )

    def wait_ready(self, timeout_s: float, count: int = 1, poll: Poll = lambda: None) -> list[Address]:
        """Wait until `count` feeders can be asked; RuntimeError, naming the causes, where they are not in time, and
        NoRoomYet where none was lost. What `poll` raises meanwhile ends the wait."""
        began, is_told = time.monotonic(), False
        while True:
            self.poll()
            poll()
            if len(self.addresses) >= count:
                return self.addresses
            waited_s = time.monotonic() - began
            if waited_s > _NEWS_S and not is_told:
                is_told = True
                logger.warning(
                    "waiting for a feeder to start, for %.0f s at most: its node needs free cores", timeout_s
                )
            if waited_s > timeout_s or not self._handles:
                causes = "; ".join(f"{loss.where}: {loss.cause}" for loss in self.losses) or "none of them died"
                kind = RuntimeError if self.losses else NoRoomYet
                raise kind(
                    f"{len(self.addresses)} of {self._count} feeders are ready after {timeout_s:.0f} s, wanted {count} "
                    f"({causes}); see that their nodes have free cores, or set fewer feeders"
                )
            time.sleep(_POLL_S)

    def status(self) -> list[dict[str, Any]]:
        """What each ready feeder says of itself, and where it is; a feeder that does not answer in time is left out."""
        found: list[dict[str, Any]] = []
        for handle in self._handles:
            if handle.address is not None:
                try:
                    with connect(handle.address, self.token, timeout_s=_STATUS_S) as client:
                        found.append(client.ask({"op": "status"})[0] | {"where": handle.where})
                except (OSError, Refused) as error:
                    logger.info("no status of the feeder on %s: %s", handle.where, error)
        return found

    def _end(self, handle: Handle) -> None:
        """Let a feeder end on a thread of its own: that may take a while, and nobody shall wait for it."""
        self._ends.append(threading.Thread(target=handle.stop, name="penstock-feeder-end", daemon=True))
        self._ends[-1].start()

    def close(self) -> None:
        """End all of them."""
        while self._handles:
            self._end(self._handles.pop())
        for thread in self._ends:
            thread.join()


def _serve(pipe: Connection, parent: int, spec: FeederSpec, token: bytes) -> None:
    """A feeder's process: tell the address, then serve until the other end of the pipe is closed."""
    end_with(parent)
    try:
        with open_feeder(spec, token) as (_, address):
            pipe.send(address)
            pipe.poll(None)
    except Exception as error:  # the process's boundary
        pipe.send(str(error) or repr(error))
        raise SystemExit(1) from None


class FeederProcess:
    """A feeder in a child process; see `Handle`."""

    def __init__(self, spec: FeederSpec, token: bytes) -> None:
        self.address: Address | None = None
        self._folder, self._error = spec.folder, ""
        self._process, self._pipe = start_child(_serve, spec, token)
        self.where = f"this machine (process {self._process.pid})"

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def look(self) -> str | None:
        """See `Handle`."""
        try:
            if self._pipe.poll():
                found = self._pipe.recv()
                if isinstance(found, str):
                    self._error = found
                else:
                    self.address = found
        except (EOFError, OSError):
            pass  # the process is ending; its exit code tells more
        code = self._process.poll()
        return None if code is None else self._error or f"it died with exit code {code} (negative: of that signal)"

    def stop(self) -> None:
        """See `Handle`."""
        self.address = None
        self._pipe.close()
        try:
            self._process.wait(0 if _is_frozen(self.pid) else _STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        sweep(self._folder)


def _is_frozen(pid: int) -> bool:
    """Whether a process was stopped by a signal, and so cannot end in good order."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt"
    except OSError:
        return False


@contextmanager
def open_feeder_processes(
    graph: Path,
    folder: Path,
    *,
    count: int,
    threads: int = 1,
    disk_bytes: int | None = None,
    memory: int | None = None,
    retries: int = 3,
) -> Iterator[FeederPool]:
    """Start feeders as processes of this machine, on the loopback; none of them, and no file, is left afterwards.

    Their disk folders are in `folder`. To be called from the main thread of a program that lives as long. They may not
    be ready yet: see `wait_ready`.
    """
    token = new_token()
    spec = FeederSpec(
        graph=graph.absolute(), folder=folder.absolute(), threads=threads, disk_bytes=disk_bytes, memory=memory
    )
    pool = FeederPool(lambda: FeederProcess(spec, token), token, count=count, retries=retries)
    try:
        yield pool
    finally:
        pool.close()
        sweep(spec.folder)
        with suppress(OSError):
            spec.folder.rmdir()
