"""Feeders as actors on two nodes of a cluster, both of them this machine."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from patience import allowed_s, wait_until
from ray.cluster_utils import Cluster

from penstock.cluster.config import ClusterConfig
from penstock.cluster.feeder_pool import FeederPool
from penstock.cluster.feeders import FeederHandle, open_feeder_actors
from penstock.cluster.lane import Pace
from penstock.cluster.pulling import open_pulled_feed
from penstock.engine.memory_feed import open_memory_feed
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.sampler.plan import PlanConfig
from penstock.storage.budget import Budgets
from penstock.storage.graph import GraphStore

# Ray drops a socket that it did not close when nodes are added
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SAMPLE = SampleConfig(fanouts=(3, 3), batch_size=16, seed=4)
BUDGETS = Budgets(device_bytes=800, host_bytes=80_000, disk_bytes=220_000)
CONFIG = ClusterConfig(feeders=2, feeder_disk=400_000, feeder_resources={"feeder": 1.0}, retries=1)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    """A head node for the trainer, and two for feeders."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for _ in range(2):
            found.add_node(num_cpus=2, resources={"feeder": 2})
        ray.init(address=found.address, logging_level=logging.ERROR)
        yield found
    finally:
        ray.shutdown()
        found.shutdown()  # type: ignore[no-untyped-call]


def handles(pool: FeederPool) -> list[FeederHandle]:
    found: Any = pool._handles
    return list(found)


def values(feed: Any) -> list[tuple[Any, ...]]:
    return [
        (b.step, b.input_ids.numpy().tobytes(), b.labels.numpy().tobytes(), b.features.numpy().tobytes()) for b in feed
    ]


def test_a_killed_actor_is_replaced_on_its_way(tiny_graph: GraphStore, tmp_path: Path) -> None:
    trace = sample_trace(tiny_graph, tmp_path / "trace", SAMPLE, num_epochs=3, host_memory=64 << 20, threads=1)
    with open_memory_feed(tiny_graph, trace, start_step=0, stop_step=30) as feed:
        expected = values(feed)
    shared = tmp_path / "feeders"
    with open_feeder_actors(tiny_graph.path, CONFIG, folder=shared, memory=64 << 20) as pool:
        pool.wait_ready(allowed_s(60), count=2)
        started = handles(pool)
        assert len({handle.node for handle in started}) == 2
        assert ray.get_runtime_context().get_node_id() not in {handle.node for handle in started}
        found = []
        with open_pulled_feed(
            pool.addresses,
            pool.token,
            sample=SAMPLE,
            plan=PlanConfig(),
            budgets=BUDGETS,
            packs=tmp_path / "packs",
            start_step=0,
            stop_step=30,
            pace=Pace(timeout_s=allowed_s(60)),
        ) as pulled:
            found += values([next(pulled.feed)])
            os.kill(started[0].pid, signal.SIGKILL)
            while not pool.poll() or not pool.losses:  # as a driver's loop does
                time.sleep(0.02)
            for batch in pulled.feed:
                if pool.poll():
                    pulled.puller.set_feeders(pool.addresses)
                found += values([batch])
        assert found == expected
        assert pool.losses[0].is_replaced and started[0].where in pool.losses[0].where
        pool.wait_ready(allowed_s(60), count=2)
        assert len(list(shared.iterdir())) == 2 and len(pool.status()) == 2
        pids = [handle.pid for handle in handles(pool)]
    assert not list(shared.iterdir())
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_no_node_for_feeders_is_told(tiny_graph: GraphStore, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"feeder_resources": {"nowhere": 1.0}})
    with open_feeder_actors(tiny_graph.path, config, folder=tmp_path / "feeders") as pool:
        with pytest.raises(RuntimeError, match="0 of 2 feeders are ready after 1 s, wanted 1.*free cores"):
            pool.wait_ready(1)
