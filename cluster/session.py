"""Join a Ray cluster, or start one on this machine for as long as a run lasts."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from penstock.cluster.config import ClusterConfig
from penstock.cluster.head import ask, head_watched

logger = logging.getLogger(__name__)

_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node that is alive: Ray's id, the host's name and address, and all that it has, `CPU` and `GPU` among it."""

    node_id: str
    host: str
    address: str
    amounts: Mapping[str, float]

    @property
    def cpus(self) -> float:
        """In all."""
        return self.amounts.get("CPU", 0.0)

    def has(self, resources: Mapping[str, float]) -> bool:
        """Whether it has as much of each, were it idle."""
        return all(self.amounts.get(name, 0.0) >= amount for name, amount in resources.items())


@contextmanager
def open_session(address: str | None, folder: Path, *, num_cpus: int) -> Iterator[None]:
    """Join the cluster at `address` (`auto`: RAY_ADDRESS, else this machine's), or start one (`local`, or None where
    RAY_ADDRESS is not set) with so many CPUs; leave it behind. A session that is open already is used.

    ValueError where there is no cluster to join. HeadLost, from what asks Ray meanwhile, where its head is lost.
    """
    if ray.is_initialized():
        with head_watched():
            yield
        return
    here, handlers = Path.cwd(), {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    folder.mkdir(parents=True, exist_ok=True)
    # Ray puts the driver's folder on the path of every worker: ours has folders called `kernels` and `storage`
    os.chdir(folder)
    try:
        if address == "local" or (address is None and "RAY_ADDRESS" not in os.environ):
            ray.init("local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING)
        else:
            _require_head(os.environ.get("RAY_ADDRESS", "auto") if address in (None, "auto") else address)
            ray.init(address, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ValueError(
            f"no Ray cluster answers at {address!r}: {error}; start one with `ray start --head`, give its address, or "
            "use --ray local"
        ) from error
    finally:
        os.chdir(here)
        _handle_again(handlers)
    with head_watched() as lost:
        try:
            yield
        finally:
            if not lost.is_set():
                ray.shutdown()


def _require_head(address: str | None) -> None:
    """Raise ConnectionError where nothing listens at `host:port`: Ray itself would try for a quarter of an hour."""
    host, _, port = (address or "").rpartition(":")
    if host and "/" not in host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
        except OSError as error:  # also of names and of routes
            raise ConnectionError(str(error)) from error


def _handle_again(handlers: Mapping[signal.Signals, Any]) -> None:
    """Install a program's own handlers again: Ray puts one in their place that ends the process, unsaved."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:  # of C code, which cannot be put back
                signal.signal(number, handler)


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that was joined."""
    return [
        Node(
            node_id=node["NodeID"],
            host=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            amounts=node["Resources"],
        )
        for node in ask(ray.nodes)
        if node["Alive"]
    ]


def threads_per_replica(nodes: Sequence[Node], config: ClusterConfig) -> int:
    """How many threads each replica may have on the nodes that it may use, less what feeders need there.

    Nodes that feeders are bound to by `feeder_resources` are theirs, so small ones do not make replicas small.
    """
    found = [node for node in nodes if node.cpus >= 1 and node.has(config.replica_resources)]
    reserved = config.feeders * config.feeder_threads
    apart = [node for node in found if not node.has(config.feeder_resources)]
    if apart:
        found, reserved = apart, 0
    cpus = [node.cpus for node in found]
    return max(1, int(min(min(cpus), (sum(cpus) - reserved) // config.replicas))) if cpus else 1
