"""Ranks as child processes of this one, on one machine.

Each child (see `storage.children`) has a socket to its parent, which its end closes: that wakes the parent at once.
Every wait is watched: for answers by the failure policy, for the end of a child by a clock.
"""

import contextlib
import logging
import os
import pickle
import platform
import queue
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from penstock.engine.chunked.backend import POLL_S, Board, Poll, WorkerSpec, open_board, spread_over_gpus
from penstock.engine.chunked.failures import died, exit_reason
from penstock.engine.chunked.torch_transport import GroupBackend
from penstock.engine.chunked.worker import OPEN_RANK, Start, serve_rank
from penstock.engine.supervision import stacks
from penstock.engine.supervision.watch import START_S, Watch
from penstock.storage.children import start_child

logger = logging.getLogger(__name__)

_GRACE_S = 20.0  # for children that were told to end
_KILL_S = 5.0  # for one that was killed: what sleeps in the kernel, on a disk that is gone, may never end


class _Child:
    """A child process, and threads that read what it says into `answers` (bytes, or None at its end) and write to it.

    A child that does not read must not stop its parent: messages wait in `_messages`.
    """

    def __init__(self, rank: int, threads: int, answers: "queue.SimpleQueue[tuple[int, bytes | None]]") -> None:
        self.rank, self._answers = rank, answers
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.process, self.connection = start_child(serve_rank, environment=_environment(threads))
        self._threads = [
            threading.Thread(target=work, name=f"{name}-{rank}", daemon=True)
            for name, work in (("answers", self._read), ("messages", self._write))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        try:
            while True:
                self._answers.put((self.rank, self.connection.recv_bytes()))
        except (EOFError, OSError):
            self._answers.put((self.rank, None))

    def _write(self) -> None:
        # that a dead child cannot be told anything is for the reader to say
        with contextlib.suppress(OSError):
            while (message := self._messages.get()) is not None:
                self.connection.send_bytes(message)

    def say(self, message: object) -> None:
        """Send a message; does not wait until it is read."""
        self._messages.put(pickle.dumps(message))

    def close(self, *, kill: bool, until: float) -> None:
        """Wait for the end of the process, and kill it if told so, or when it is `until` (monotonic)."""
        if kill:
            self.process.kill()
        try:
            code = self.process.wait(max(0.0, until - time.monotonic()))
            if code and not kill:
                logger.warning("rank %d %s when it was told to end", self.rank, exit_reason(code))
        except subprocess.TimeoutExpired:
            logger.warning("rank %d did not end within %.0f s; it is killed", self.rank, _GRACE_S)
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_KILL_S)
        self._messages.put(None)
        if self.process.returncode is None:
            logger.error("process %d of rank %d cannot be killed: it sleeps in the kernel", self.process.pid, self.rank)
            return
        for thread in self._threads:
            thread.join()
        self.connection.close()


def _environment(threads: int) -> dict[str, str]:
    """What torch, BLAS and Numba read when they are imported; and ranks of one machine meet on its loopback."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if any(name == "lo" for _, name in socket.if_nameindex()) else {}
    return loopback | os.environ | dict.fromkeys(names, str(threads))


class ProcessBackend:
    """See backend.Backend; made by `open_processes`. Single use: it takes no call after an error."""

    def __init__(self, specs: Sequence[WorkerSpec], board: Board) -> None:
        self._specs, self._board = specs, board
        self._answers: queue.SimpleQueue[tuple[int, bytes | None]] = queue.SimpleQueue()
        self._children: list[_Child] = []
        self._usable = False

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [child.process.pid for child in self._children]

    def start(self, starts: Sequence[Start]) -> None:
        """Start the children and wait until all ranks are open."""
        for start in starts:
            self._children.append(_Child(start.spec.rank, start.spec.threads, self._answers))
        self._usable = True
        timeout_s = max(START_S, self._specs[0].timeout_s)
        self._call("start", [(start,) for start in starts], list(starts), None, timeout_s)

    def call(
        self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None, poll: Poll | None = None
    ) -> list[Any]:
        """See Backend."""
        given = list(arguments) if arguments is not None else [()] * len(self._specs)
        return self._call(method, given, [(method, found) for found in given], poll)

    def _call(
        self,
        method: str,
        arguments: list[tuple[Any, ...]],
        messages: Sequence[object],
        poll: Poll | None,
        timeout_s: float | None = None,
    ) -> list[Any]:
        if not self._usable:
            raise RuntimeError(f"{method}: ranks that failed take no more calls; leave them and open new ones")
        self._usable = False  # until all has gone well
        self._board.reset()
        watch = Watch(
            self._specs,
            self._board,
            method,
            arguments,
            collect=self._stacks,
            where=self._where,
            timeout_s=timeout_s,
        )
        for child, message in zip(self._children, messages, strict=True):
            child.say(message)
        while not watch.is_over:
            try:
                rank, data = self._answers.get(timeout=POLL_S)
            except queue.Empty:
                watch.tick()
                if poll is not None and not watch.has_failed:
                    poll()
                continue
            self._take(watch, rank, data, method, arguments[rank])
        values = watch.values()
        self._usable = True
        return values

    def _take(self, watch: Watch, rank: int, data: bytes | None, method: str, arguments: tuple[Any, ...]) -> None:
        if data is None:
            process = self._children[rank].process
            process.kill()  # its socket is closed: nothing can be had from it
            try:
                reason = exit_reason(process.wait(_KILL_S))
            except subprocess.TimeoutExpired:
                reason = "closed its socket and cannot be killed"
            watch.fail(rank, died(self._specs[rank], reason, self._where(rank), method, arguments, self._board))
            return
        well, value = pickle.loads(data)
        (watch.add if well else watch.fail)(rank, pickle.loads(value))

    def _where(self, rank: int) -> str:
        return f"process {self.pids[rank]} on host {platform.node()}"

    def _files(self, ranks: Sequence[int]) -> dict[int, Path]:
        return {rank: stacks.stacks_file(self._specs[rank].scratch, rank) for rank in ranks}

    def _stacks(self, ranks: Sequence[int]) -> dict[int, str]:
        return stacks.collect({rank: self.pids[rank] for rank in ranks}, self._files(ranks))

    def close(self) -> None:
        """End the children: in good order, or at once if something went wrong."""
        for child in self._children:
            if self._usable:
                child.say(None)
            else:
                child.process.kill()
        until = time.monotonic() + _GRACE_S
        for child in self._children:
            child.close(kill=not self._usable, until=until)
        for path in self._files(range(len(self._children))).values() if self._usable else ():
            path.unlink(missing_ok=True)


@contextmanager
def open_processes(specs: Sequence[WorkerSpec], *, open_rank: str = OPEN_RANK) -> Iterator[ProcessBackend]:
    """Start one process per rank; they have ended when the context is left, and end when this process does.

    On Linux they also end with the thread that opens them, so open and leave them in one thread. `open_rank`
    (`module:function`, like `rank.open_rank`) is what a child makes its rank with.
    """
    placed, num_gpus = spread_over_gpus(specs)
    # NCCL wants a GPU for each rank; where they share, gloo has to do
    backend: GroupBackend = "nccl" if len(specs) <= num_gpus else "gloo"
    board = open_board(specs)
    store = specs[0].scratch / f"rendezvous-{uuid.uuid4().hex}"
    ranks = ProcessBackend(placed, board)
    with ExitStack() as stack:
        stack.callback(store.unlink, missing_ok=True)
        stack.callback(ranks.close)
        ranks.start(
            [
                Start(
                    spec=spec,
                    board=board.path,
                    store=store.absolute(),
                    backend=backend,
                    open_rank=open_rank,
                )
                for spec in placed
            ]
        )
        yield ranks
