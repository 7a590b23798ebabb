import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from patience import allowed_s

from penstock.cluster.config import ClusterConfig
from penstock.cluster.session import Node, open_session, threads_per_replica


def node(cpus: float, **resources: float) -> Node:
    return Node(node_id="n", host="h", address="a", amounts={"CPU": cpus, **resources})


@pytest.mark.parametrize(
    ("nodes", "options", "threads"),
    [
        ([node(8), node(8)], {}, 8),
        ([node(8), node(6), node(0)], {}, 6),
        ([node(8)], {"replicas": 3}, 2),
        ([node(8)], {"feeders": 2, "feeder_threads": 2}, 2),
        ([node(2)], {"feeders": 4}, 1),
        ([node(8), node(8), node(1, feeder=1)], {"feeders": 1, "feeder_resources": {"feeder": 1.0}}, 8),
        ([node(8, feeder=1)], {"feeders": 2, "feeder_resources": {"feeder": 1.0}}, 3),
        ([node(8), node(4, trainer=1), node(4, trainer=1)], {"replica_resources": {"trainer": 1.0}}, 4),
        ([], {}, 1),
    ],
)
def test_threads_are_those_of_nodes_that_replicas_may_use(
    nodes: list[Node], options: dict[str, Any], threads: int
) -> None:
    assert threads_per_replica(nodes, ClusterConfig(**({"replicas": 2} | options))) == threads


def test_a_head_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        with pytest.raises(ValueError, match="no Ray cluster answers at '127.0.0.1:.*refused.*ray start --head"):
            with open_session(f"127.0.0.1:{taken.getsockname()[1]}", tmp_path, num_cpus=1):
                pytest.fail("it opened")


@pytest.mark.ray
def test_a_program_keeps_its_signal_handlers(tmp_path: Path) -> None:
    asked, before = threading.Event(), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        with open_session("local", tmp_path, num_cpus=1):
            signal.raise_signal(signal.SIGTERM)
            assert asked.wait(allowed_s(10))
    finally:
        signal.signal(signal.SIGTERM, before)
