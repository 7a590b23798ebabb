"""Where replicas of sampled training run on Ray: how wide, on which nodes, and with which feeders."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray

from penstock.cluster.config import ClusterConfig
from penstock.cluster.directory import Directory, open_directory
from penstock.cluster.feeders import open_feeder_actors
from penstock.cluster.pipeline import open_ray
from penstock.cluster.session import alive_nodes, open_session, threads_per_replica
from penstock.engine.chunked.backend import Poll
from penstock.storage.budget import num_threads


class RayPlace:
    """Actors on a cluster that was joined; see `penstock.replicated.Place`."""

    def __init__(self, config: Any, open_rank: str, poll: Poll) -> None:
        self._config = config
        cluster: ClusterConfig = config.cluster
        self.threads: int = config.train.threads or threads_per_replica(alive_nodes(), cluster)
        self.replicas_per_gpu = math.ceil(1 / (cluster.gpus_per_replica or 1.0))
        self.open_backend = partial(
            open_ray,
            open_rank=open_rank,
            groups=[[rank] for rank in range(cluster.replicas)],
            resources=cluster.replica_resources or None,
            gpus_per_replica=cluster.gpus_per_replica,
            memory_bytes=cluster.replicas * (config.budgets.host_memory or 0),
            wait_s=cluster.wait_s,
            poll=poll,
        )

    def hosts(self, backend: Any, count: int) -> list[str]:
        """See Place; two nodes of one machine are told apart by their ids."""
        names = {node.node_id: f"{node.host}/{node.node_id[:8]}" for node in alive_nodes()}
        return [names.get(node, node) for node in backend.nodes]

    @contextmanager
    def open_feeders(self) -> Iterator[Directory | None]:
        """See Place."""
        config, cluster = self._config, self._config.cluster
        if not cluster.feeders:
            yield None
            return
        folder = None if config.remote.stage_dir is None else config.remote.stage_dir.absolute() / "feeders"
        with (
            open_feeder_actors(config.dataset.absolute(), cluster, uri=config.remote.dataset, folder=folder) as pool,
            open_directory(pool, str(ray.util.get_node_ip_address())) as directory,  # type: ignore[no-untyped-call]
        ):
            yield directory


@contextmanager
def open_ray_place(config: Any, *, folder: Path, open_rank: str, poll: Poll) -> Iterator[RayPlace]:
    """Join the cluster of `cluster.address`, or start one (`local`) with room for all of the run.

    `config` is a `penstock.config.RunConfig`, which lies above this folder; Ray is joined from `folder`. `poll` is
    called now and then while there is no room.
    """
    cluster: ClusterConfig = config.cluster
    reserved = cluster.feeders * cluster.feeder_threads
    num_cpus = max(num_threads(), cluster.replicas * (config.train.threads or 1) + reserved)
    with open_session(cluster.address, folder, num_cpus=num_cpus):
        yield RayPlace(config, open_rank, poll)
