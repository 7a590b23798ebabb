"""Assign every node to a part and a chunk: parts first, then each part into chunks."""

import logging
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from penstock.sampler.chunking.config import Method, PartitionConfig
from penstock.sampler.chunking.metis import can_import_dgl, metis_bytes, run_metis
from penstock.sampler.chunking.streaming import random_bins, settle_bins, stream_bins
from penstock.sampler.chunking.windows import WINDOWS, choose_window, least_window
from penstock.storage.errors import DoesNotFit, MissingDependency
from penstock.storage.extras import install_command
from penstock.storage.graph import GraphStore
from penstock.storage.progress import Progress, silent

logger = logging.getLogger(__name__)

_NODE_BYTES = 48  # labels, groups, and the scratch of sorting hashes and counting bins
Split = Callable[[NDArray[np.int32], int], NDArray[np.int32]]


def choose_method(graph: GraphStore, config: PartitionConfig, host_memory: int) -> Method:
    """Resolve `auto`. DoesNotFit or MissingDependency where METIS is asked for and cannot be had."""
    if config.method != "auto" and config.method != "metis":
        return config.method
    needed, here = metis_bytes(graph), can_import_dgl()
    if here and needed <= host_memory:
        return "metis"
    if not here:
        problem = f"METIS needs DGL, which is not installed: {install_command('dgl')}"
    else:
        problem = (
            f"METIS needs about {needed} bytes of host memory for {graph.num_edges} edges, --host-memory gives "
            f"{host_memory}"
        )
    if config.method == "auto":
        logger.info("%s; partitioning by ldg instead", problem)
        return "ldg"
    if not here:
        raise MissingDependency(f"{problem}, or use method ldg")
    raise DoesNotFit(f"{problem}; raise it, or use method ldg", host_bytes=needed)


def _level_slack(config: PartitionConfig) -> float:
    """Slack of parts, and of chunks within a part: where there are both, they share it."""
    return config.slack if config.parts == 1 else float(np.sqrt(1 + config.slack) - 1)


def require_filled(graph: GraphStore, parts: int, chunks: int) -> None:
    """ValueError where there are fewer nodes than pieces."""
    if graph.num_nodes < parts * chunks:
        raise ValueError(f"{graph.num_nodes} nodes cannot fill {parts} parts x {chunks} chunks; use fewer of either")


def partition_by(
    graph: GraphStore, config: PartitionConfig, split: Split, num_bytes: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Split all nodes into parts, then each part into chunks, repairing balance after each; no piece stays empty."""
    require_filled(graph, config.parts, config.chunks)
    slack = _level_slack(config)
    labels = np.zeros(graph.num_nodes, np.int32)
    levels = []
    for num_bins, least in ((config.parts, config.chunks), (config.chunks, 1)):
        groups, labels = labels, np.zeros(graph.num_nodes, np.int32)
        if num_bins > 1:
            labels = split(groups, num_bins)
            settle_bins(graph, groups, labels, num_bins, slack=slack, least=least, num_bytes=num_bytes)
        levels.append(labels)
    return levels[0], levels[1]


def partition(
    graph: GraphStore, config: PartitionConfig, *, host_memory: int, threads: int, progress: Progress = silent
) -> tuple[NDArray[np.int32], NDArray[np.int32], Method]:
    """Part and chunk of every node, int32 [N] each, and the method that `auto` stood for.

    The same graph and config give the same labels, on any number of threads. Raises ValueError where there are fewer
    nodes than pieces, DoesNotFit or MissingDependency where the method cannot run.
    """
    method = choose_method(graph, config, host_memory)
    least = least_window(graph)
    needed = _NODE_BYTES * graph.num_nodes + WINDOWS * least
    if needed > host_memory:
        raise DoesNotFit(
            f"partitioning {graph.num_nodes} nodes needs {needed} bytes of host memory, --host-memory gives "
            f"{host_memory}; raise it",
            host_bytes=needed,
        )
    num_bytes = choose_window(least, least + (host_memory - needed) // WINDOWS)
    slack = _level_slack(config)

    def split(groups: NDArray[np.int32], num_bins: int) -> NDArray[np.int32]:
        if method == "random":
            return random_bins(groups, num_bins, config.seed)
        if method == "metis":
            return run_metis(graph, groups, num_bins, threads)
        return stream_bins(
            graph,
            groups,
            num_bins,
            fennel=method == "fennel",
            passes=config.passes,
            slack=slack,
            num_bytes=num_bytes,
            progress=progress,
        )

    progress("partition", 0, 1, "passes")
    parts, chunks = partition_by(graph, config, split, num_bytes)
    progress("partition", 1, 1, "passes")
    return parts, chunks, method
