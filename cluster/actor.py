"""A rank of full-graph training in a Ray actor: the same worker as a child process, with Ray's calls for its socket."""

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import ray
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # a class of torch's C++ part

from penstock.engine.chunked.backend import Board, WorkerSpec
from penstock.engine.chunked.torch_transport import GroupBackend
from penstock.engine.chunked.worker import answer_call, configure_logging, open_worker
from penstock.engine.supervision.stacks import stacks_file, write_when_asked

HEARTBEATS = "heartbeats"  # the concurrency group of `progress`, which answers while an epoch runs


class RankActor:
    """Calls other than `progress` come one at a time and run in one thread, in which torch's settings hold.

    Methods give whether all went well, and the pickled value or error: Ray's own errors are then always of a death.
    """

    def __init__(self, spec: WorkerSpec, driver_path: Sequence[str]) -> None:
        """`driver_path` is where the driver imports from, so that a user's module is found here too."""
        self._spec, self._done, self._stack = spec, (0, 0), ExitStack()
        self._rank: Any = None
        self._store: Any = None
        sys.path.extend(path for path in driver_path if path not in sys.path)
        configure_logging(spec)
        write_when_asked(stacks_file(spec.scratch, spec.rank))

    def whereabouts(self) -> tuple[bool, bytes]:
        """Node id and process id."""
        return answer_call(self._spec, lambda: (ray.get_runtime_context().get_node_id(), os.getpid()))

    def host_store(self) -> tuple[bool, bytes]:
        """Open the store in which the ranks meet, on a free port of this node; gives its address."""

        def host() -> tuple[str, int]:
            address = _own_address()
            listener = socket.create_server((address, 0))
            port: int = listener.getsockname()[1]
            handle = listener.detach()
            self._store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=handle)
            return address, port

        return answer_call(self._spec, host)

    def start(
        self, address: tuple[str, int], board: Path | None, backend: GroupBackend, open_rank: str
    ) -> tuple[bool, bytes]:
        """Join the others and open the rank. `board` is None where the driver's file is out of reach."""
        write = None if board is None else Board(board, self._spec.layout.num_ranks).heartbeat(self._spec.rank)

        def heartbeat(done: int, total: int) -> None:
            self._done = (done, total)
            if write is not None:
                write(done, total)

        def open_it() -> None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(_own_address()))
            store = self._store or TCPStore(*address, is_master=False)
            worker = open_worker(self._spec, store, backend, open_rank, heartbeat)
            self._rank = self._stack.enter_context(worker)

        return answer_call(self._spec, open_it)

    def call(self, method: str, arguments: tuple[Any, ...]) -> tuple[bool, bytes]:
        """Call a method of the rank."""
        self._done = (0, 0)
        return answer_call(self._spec, lambda: getattr(self._rank, method)(*arguments))

    @ray.method(concurrency_group=HEARTBEATS)
    def progress(self) -> tuple[int, int]:
        """Actions done and in all, of the call under way."""
        return self._done

    def stop(self) -> tuple[bool, bytes]:
        """Close the rank in good order."""
        return answer_call(self._spec, self._stack.close)


def _own_address() -> str:
    """This node's, as Ray knows it."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _interface(address: str) -> str:
    """The network interface with an address: gloo would take the one of the host's name, often the loopback."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return str(name)
    raise ValueError(f"no network interface of this node has Ray's address {address}; set GLOO_SOCKET_IFNAME")
