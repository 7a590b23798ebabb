"""Ranks as child processes of this one, on one machine.

Children are started as fresh interpreters with this one's `sys.path`, not by `multiprocessing`: that would run the
user's script again. Each has a socket to its parent, which the end of a child closes: that wakes the parent at once.
"""

import contextlib
import logging
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Pipe
from typing import Any

from penstock.engine.chunked.backend import POLL_S, Board, Poll, WorkerSpec, open_board, spread_over_gpus
from penstock.engine.chunked.failures import Outcome, died, exit_reason
from penstock.engine.chunked.torch_transport import GroupBackend
from penstock.engine.chunked.worker import OPEN_RANK, Start

logger = logging.getLogger(__name__)

_CODE = "import sys; handle, parent, *sys.path = sys.argv[1:]; from penstock.engine.chunked.worker import main; "
_CODE += "main(int(handle), int(parent))"
_GRACE_S = 20.0  # for a child that was told to end


class _Child:
    """A child process and the thread that reads what it says into `answers`: bytes, or None at its end."""

    def __init__(self, rank: int, threads: int, answers: "queue.SimpleQueue[tuple[int, bytes | None]]") -> None:
        self.rank, self._answers = rank, answers
        self.connection, theirs = Pipe()
        with theirs:
            handle = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CODE, str(handle), str(os.getpid()), *map(str, sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # our stdout is for results
                pass_fds=[handle],
                env=_environment(threads),
            )
        self._reader = threading.Thread(target=self._read, name=f"answers-{rank}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while True:
                self._answers.put((self.rank, self.connection.recv_bytes()))
        except (EOFError, OSError):
            self._answers.put((self.rank, None))

    def say(self, message: object) -> None:
        """Send a message; that a dead child cannot be told anything is for the reader to say."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(pickle.dumps(message))

    def close(self, *, kill: bool) -> None:
        """Wait for the end of the process, and kill it if told so, or if it takes too long."""
        if kill:
            self.process.kill()
        try:
            code = self.process.wait(_GRACE_S)
            if code and not kill:
                logger.warning("rank %d %s when it was told to end", self.rank, exit_reason(code))
        except subprocess.TimeoutExpired:
            logger.warning("rank %d did not end within %.0f s; it was killed", self.rank, _GRACE_S)
            self.process.kill()
            self.process.wait()
        self._reader.join()
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
        self._call("start", [(start,) for start in starts], list(starts), None)

    def call(
        self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None, poll: Poll | None = None
    ) -> list[Any]:
        """See Backend."""
        given = list(arguments) if arguments is not None else [()] * len(self._specs)
        return self._call(method, given, [(method, found) for found in given], poll)

    def _call(
        self, method: str, arguments: list[tuple[Any, ...]], messages: Sequence[object], poll: Poll | None
    ) -> list[Any]:
        if not self._usable:
            raise RuntimeError(f"{method}: ranks that failed take no more calls; leave them and open new ones")
        self._usable = False  # until all has gone well
        self._board.reset()
        for child, message in zip(self._children, messages, strict=True):
            child.say(message)
        outcome = Outcome(len(self._children))
        while not outcome.is_over:
            try:
                rank, data = self._answers.get(timeout=POLL_S)
            except queue.Empty:
                if poll is not None and not outcome.has_failed:
                    poll()
                continue
            self._take(outcome, rank, data, method, arguments[rank])
        values = outcome.values()
        self._usable = True
        return values

    def _take(self, outcome: Outcome, rank: int, data: bytes | None, method: str, arguments: tuple[Any, ...]) -> None:
        if data is None:
            process = self._children[rank].process
            process.kill()  # its socket is closed: nothing can be had from it
            reason = exit_reason(process.wait())
            outcome.fail(rank, died(self._specs[rank], reason, method, arguments, self._board))
            return
        well, value = pickle.loads(data)
        (outcome.add if well else outcome.fail)(rank, pickle.loads(value))

    def close(self) -> None:
        """End the children: in good order, or at once if something went wrong."""
        if self._usable:
            for child in self._children:
                child.say(None)
        for child in self._children:
            if not self._usable:
                child.process.kill()
        for child in self._children:
            child.close(kill=not self._usable)


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
