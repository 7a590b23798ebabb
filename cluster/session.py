"""Join a Ray cluster, or start one on this machine for as long as a run lasts."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node that is alive: Ray's id, the host's name and address, and its CPUs and GPUs."""

    node_id: str
    host: str
    address: str
    cpus: float
    gpus: float


@contextmanager
def open_session(address: str | None, folder: Path, *, num_cpus: int) -> Iterator[None]:
    """Join the cluster at `address` (`auto`: RAY_ADDRESS, else this machine's), or start one (`local`, or None where
    RAY_ADDRESS is not set) with so many CPUs; leave it behind. A session that is open already is used.

    ValueError where there is no cluster to join.
    """
    if ray.is_initialized():
        yield
        return
    here = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    # Ray puts the driver's folder on the path of every worker: ours has folders called `kernels` and `storage`
    os.chdir(folder)
    try:
        if address == "local" or (address is None and "RAY_ADDRESS" not in os.environ):
            ray.init("local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING)
        else:
            ray.init(address, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ValueError(
            f"no Ray cluster answers at {address!r}: {error}; start one with `ray start --head`, give its address, or "
            "use --ray local"
        ) from error
    finally:
        os.chdir(here)
    try:
        yield
    finally:
        ray.shutdown()


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that was joined."""
    return [
        Node(
            node_id=node["NodeID"],
            host=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


def threads_per_replica(replicas: int, reserved_cpus: int) -> int:
    """How many threads each of `replicas` may have when they share the cluster, less what others need."""
    cpus = [node.cpus for node in alive_nodes() if node.cpus >= 1]
    if not cpus:
        return 1
    return max(1, int(min(min(cpus), (sum(cpus) - reserved_cpus) // replicas)))
