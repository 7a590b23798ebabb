"""Feeders as Ray actors on nodes with cores to spare; windows travel over their own sockets, not through Ray.

Ray restarts nobody (`max_restarts=0`): a new feeder has a new address, which trainers have to be told anyway. The token
reaches actors as an argument of a call, which Ray encrypts where its TLS is on.
"""

import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from penstock.cluster.config import ClusterConfig
from penstock.cluster.feeder import open_feeder
from penstock.cluster.feeder_builder import FeederSpec
from penstock.cluster.feeder_folder import sweep
from penstock.cluster.feeder_pool import FeederPool
from penstock.cluster.head import HeadLost, ask, require_head
from penstock.cluster.pipeline import PROCESS_BYTES
from penstock.storage.transfer import Address, new_token

logger = logging.getLogger(__name__)

_START_S = 120.0  # at least, for an actor to be placed and to serve
_STOP_S = 10.0


class FeederActor:
    """A feeder in an actor. `live` lasts as long as the actor, on a thread of its own."""

    def __init__(self, driver_path: Sequence[str]) -> None:
        """`driver_path` is where the driver imports from."""
        self._stack, self._over = ExitStack(), threading.Event()
        sys.path.extend(path for path in driver_path if path not in sys.path)

    def serve(self, spec: FeederSpec, token: bytes) -> tuple[Address, str, int]:
        """Serve on this node's address only; gives the address, the node's id and the process's."""
        host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        _, address = self._stack.enter_context(open_feeder(replace(spec, host=host), token))
        return address, ray.get_runtime_context().get_node_id(), os.getpid()

    def live(self) -> None:
        """Wait until `stop`: whoever waits for this learns of a death at once."""
        self._over.wait()

    def stop(self) -> None:
        """End in good order; nothing is left on disk."""
        self._stack.close()
        self._over.set()


class FeederHandle:
    """A feeder that Ray was asked for; see `feeder_pool.Handle`."""

    def __init__(
        self, spec: FeederSpec, token: bytes, options: dict[str, Any], path: Sequence[str], wait_s: float
    ) -> None:
        self._start_s = max(_START_S, wait_s)
        actor_class: Any = ray.remote(FeederActor)
        self._actor = ask(lambda: actor_class.options(**options).remote(path))
        self._served, self._live = self._actor.serve.remote(spec, token), self._actor.live.remote()
        self._folder, self._asked = spec.folder, time.monotonic()
        self.address: Address | None = None
        self.node, self.pid, self.where = "", 0, "a node that Ray has not chosen yet"

    def look(self) -> str | None:
        """See `Handle`."""
        require_head()
        try:
            if self.address is None and ray.wait([self._served], timeout=0)[0]:
                self.address, self.node, self.pid = ray.get(self._served)
                self.where = f"node {self.node} at {self.address[0]} (process {self.pid})"
            if ray.wait([self._live], timeout=0)[0]:
                ray.get(self._live)
                return "it ended"
        except RayError as error:
            return " ".join(str(error).split())
        if self.address is None and time.monotonic() - self._asked > self._start_s:
            return f"Ray did not start it within {self._start_s:.0f} s; see that there are free cores for it"
        return None

    def stop(self) -> None:
        """See `Handle`; a feeder that does not end in good order is killed, and its node swept where that lives."""
        if self.address is not None:
            self.address = None
            try:
                ray.get(self._actor.stop.remote(), timeout=_STOP_S)
            except (RayError, TimeoutError):
                self._sweep()
        with suppress(HeadLost):  # whoever uses Ray next is told
            ask(lambda: ray.kill(self._actor, no_restart=True))

    def _sweep(self) -> None:
        place = NodeAffinitySchedulingStrategy(self.node, soft=False)
        task: Any = ray.remote(sweep)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": place}
        try:
            ask(lambda: ray.kill(self._actor, no_restart=True))
            ask(lambda: ray.get(task.options(**options).remote(self._folder), timeout=_STOP_S))
        except (RayError, TimeoutError, HeadLost) as error:
            logger.warning("what a feeder left in %s on node %s stays: %s", self._folder, self.node, error)


@contextmanager
def open_feeder_actors(
    graph: Path, config: ClusterConfig, *, uri: str | None = None, folder: Path | None = None, memory: int | None = None
) -> Iterator[FeederPool]:
    """Start `config.feeders` actors, spread over nodes that have `feeder_resources` and cores; Ray must be running.

    Every node finds the graph under the same path, or copies it there from `uri`. `folder` is where they work on their
    nodes, None the temporary one. They may not be ready yet: see `FeederPool.wait_ready`. They have ended when the
    context is left, and their folders are gone, but those on nodes that died.
    """
    token = new_token()
    shared = folder or Path(tempfile.gettempdir()) / f"penstock-feeders-{os.getuid()}"
    spec = FeederSpec(
        graph=graph.absolute(),
        folder=shared,
        disk_bytes=config.feeder_disk,
        memory=memory,
        threads=config.feeder_threads,
        uri=uri,
    )
    options: dict[str, Any] = {
        "num_cpus": config.feeder_threads,
        "memory": (memory or 0) + PROCESS_BYTES,
        "resources": config.feeder_resources or None,
        "scheduling_strategy": "SPREAD",
        "max_restarts": 0,
        "max_concurrency": 3,  # serve, live and stop
    }
    path = [path for path in map(os.path.abspath, sys.path) if os.path.exists(path)]
    pool = FeederPool(
        lambda: FeederHandle(spec, token, options, path, config.wait_s),
        token,
        count=config.feeders,
        retries=config.retries,
    )
    try:
        yield pool
    finally:
        pool.close()
