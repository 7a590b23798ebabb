from typing import Any

import pytest

from penstock.cluster.config import ClusterConfig
from penstock.cluster.session import Node, threads_per_replica


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
