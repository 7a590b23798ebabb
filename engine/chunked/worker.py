"""A rank in a process of its own: started by `open_processes` over a socket, or inside a Ray actor.

The process does what its parent sends, one call after the other, and ends when told to, or as soon as its parent is
gone. It ignores SIGINT and SIGTERM: whoever sends those to a whole group means the parent, which ends its ranks.
"""

import logging
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]  # a class of torch's C++ part
from torch.distributed.distributed_c10d import Store

from penstock.engine.chunked.backend import Board, WorkerSpec
from penstock.engine.chunked.failures import encode_error
from penstock.engine.chunked.torch_transport import GroupBackend, open_torch_transport
from penstock.engine.chunked.transport import Transport, patience_s
from penstock.engine.supervision.stacks import stacks_file, write_when_asked
from penstock.storage import logs
from penstock.storage.lifeline import end_with

OPEN_RANK = "penstock.engine.chunked.rank:open_rank"
OpenRank = Callable[[WorkerSpec, Transport, Callable[[int, int], None]], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The first message to a child. Ranks meet in the file `store`; `open_rank` is `module:function`."""

    spec: WorkerSpec
    board: Path
    store: Path
    backend: GroupBackend
    open_rank: str


@contextmanager
def open_worker(
    spec: WorkerSpec, store: Store, backend: GroupBackend, open_rank: str, heartbeat: Callable[[int, int], None]
) -> Iterator[Any]:
    """Join the others over `store` and open the rank; beats as it gets on, so that the one that does not is found."""
    heartbeat(1, 3)
    module, _, name = open_rank.partition(":")
    opener: OpenRank = getattr(import_module(module), name)
    with (
        open_torch_transport(
            spec.rank,
            spec.layout,
            store,
            backend=backend,
            device=torch.device(spec.device),
            timeout_s=patience_s(spec.timeout_s),
        ) as transport,
        _opened(opener, spec, transport, heartbeat) as rank,
    ):
        yield rank


@contextmanager
def _opened(
    opener: OpenRank, spec: WorkerSpec, transport: Transport, heartbeat: Callable[[int, int], None]
) -> Iterator[Any]:
    heartbeat(2, 3)
    with opener(spec, transport, heartbeat) as rank:
        heartbeat(3, 3)
        yield rank


def answer_call(spec: WorkerSpec, call: Callable[[], Any]) -> tuple[bool, bytes]:
    """Whether a call went well, and its pickled value or error; plain pickle, which copies tensors."""
    try:
        return True, pickle.dumps(call())
    except Exception as error:  # the process's boundary: the caller raises it
        logging.getLogger(__name__).info("rank %d", spec.rank, exc_info=True)
        return False, encode_error(spec, error)


def _read_calls(connection: Connection, calls: "queue.SimpleQueue[bytes]") -> None:
    """Hand on what the parent sends; end the process when it is gone, whatever the main thread waits for."""
    try:
        while True:
            calls.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)


def _serve(start: Start, connection: Connection, calls: "queue.SimpleQueue[bytes]") -> bool:
    """Be the rank until None comes (True) or something fails (False)."""
    spec = start.spec
    board = Board(start.board, spec.layout.num_ranks)
    store = FileStore(str(start.store), spec.layout.num_ranks)

    def run() -> bool:
        with open_worker(spec, store, start.backend, start.open_rank, board.heartbeat(spec.rank)) as rank:
            connection.send_bytes(pickle.dumps((True, pickle.dumps(None))))
            while (call := pickle.loads(calls.get())) is not None:
                method, arguments = call
                well, value = answer_call(spec, lambda: getattr(rank, method)(*arguments))  # noqa: B023  called at once
                connection.send_bytes(pickle.dumps((well, value)))
                if not well:
                    return False
        return True

    well, value = answer_call(spec, run)
    if not well:
        connection.send_bytes(pickle.dumps((well, value)))
    return well and bool(pickle.loads(value))


def serve_rank(connection: Connection, parent: int) -> None:
    """Be a rank for the process `parent`, at the other end of the connection."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with(parent)
    start: Start = pickle.loads(connection.recv_bytes())
    configure_logging(start.spec)
    write_when_asked(stacks_file(start.spec.scratch, start.spec.rank))
    calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_calls, args=(connection, calls), daemon=True).start()
    well = _serve(start, connection, calls)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if well else 1)  # the reader still waits on the connection


def configure_logging(spec: WorkerSpec) -> None:
    """Log to stderr, with the rank: what a process of ours does that is nobody else's."""
    logs.configure(rank=spec.rank, stage=spec.layout.stage_of(spec.rank))
