"""Assign nodes to bins by streaming the graph, and repair the balance of any assignment; see `kernels.partition`.

State is a few bytes per node; the edges are read in order, once per pass. Fennel's alpha is sqrt(K) m / n^1.5 of each
group, with m its share of the undirected edges, E / 2.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.partition import settle_nodes, stream_nodes
from penstock.kernels.seeds import hash_ids
from penstock.sampler.chunking.windows import edge_windows
from penstock.storage.graph import GraphStore
from penstock.storage.progress import Progress, silent


def capacities(groups: NDArray[np.int32], num_bins: int, slack: float) -> NDArray[np.int64]:
    """Nodes that a bin of each group may have, int64 [G]: 1 + slack times the mean, and never less than its ceiling."""
    sizes = np.bincount(groups)
    return np.maximum(-(-sizes // num_bins), np.floor((1 + slack) * sizes / num_bins)).astype(np.int64)


def bin_sizes(groups: NDArray[np.int32], labels: NDArray[np.int32], num_bins: int) -> NDArray[np.int64]:
    """Nodes per group and bin, int64 [G, K]."""
    keys = groups.astype(np.int64) * num_bins + labels
    return np.bincount(keys, minlength=(int(groups.max()) + 1) * num_bins).reshape(-1, num_bins)


def random_bins(groups: NDArray[np.int32], num_bins: int, seed: int) -> NDArray[np.int32]:
    """Draw bins, int32 [N], whose sizes differ by one at most within a group; counter based."""
    num_nodes = len(groups)
    hashes = np.empty(num_nodes, np.uint64)
    hash_ids(np.arange(num_nodes), seed, num_bins, 0, num_nodes, hashes)
    order = np.lexsort((hashes, groups))
    sizes = np.bincount(groups)
    ranks = np.arange(num_nodes) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    labels = np.empty(num_nodes, np.int32)
    labels[order] = ranks * num_bins // np.repeat(sizes, sizes)
    return labels


def stream_bins(
    graph: GraphStore,
    groups: NDArray[np.int32],
    num_bins: int,
    *,
    fennel: bool,
    passes: int,
    slack: float,
    num_bytes: int,
    progress: Progress = silent,
) -> NDArray[np.int32]:
    """Place every node of each group in one of `num_bins` bins, int32 [N], by `passes` over windows of `num_bytes`."""
    sizes = np.bincount(groups)
    alpha = np.sqrt(num_bins) * graph.num_edges / 2 / graph.num_nodes / np.sqrt(np.maximum(sizes, 1))
    capacity = capacities(groups, num_bins, slack)
    labels = np.full(graph.num_nodes, -1, np.int32)
    counts = np.empty(num_bins, np.int64)
    for number in range(passes):
        filled = np.zeros((len(sizes), num_bins), np.int64)
        for window in edge_windows(graph, num_bytes):
            progress("partition", number * graph.num_nodes + window.first, passes * graph.num_nodes, "nodes")
            stream_nodes(
                window.indptr, window.indices, window.first, groups, capacity, alpha, fennel, labels, filled, counts
            )
    return labels


def settle_bins(
    graph: GraphStore,
    groups: NDArray[np.int32],
    labels: NDArray[np.int32],
    num_bins: int,
    *,
    slack: float,
    least: int,
    num_bytes: int,
) -> None:
    """Move nodes, in place, until no bin is above its capacity and none has fewer than `least` nodes.

    Every group must have at least `num_bins * least` nodes.
    """
    capacity = capacities(groups, num_bins, slack)
    sizes = bin_sizes(groups, labels, num_bins)
    if (sizes > capacity[:, None]).any():
        counts = np.empty(num_bins, np.int64)
        for window in edge_windows(graph, num_bytes):
            settle_nodes(window.indptr, window.indices, window.first, groups, capacity, labels, sizes, counts)
    for group, bin in np.argwhere(sizes < least).tolist():
        while sizes[group, bin] < least:
            donor = int(sizes[group].argmax())
            moved = _last_nodes(
                groups, labels, group, donor, int(min(least - sizes[group, bin], sizes[group, donor] - least))
            )
            labels[moved] = bin
            sizes[group, donor] -= len(moved)
            sizes[group, bin] += len(moved)


def _last_nodes(groups: Any, labels: Any, group: int, bin: int, count: int) -> NDArray[np.int64]:
    return np.flatnonzero((groups == group) & (labels == bin))[-count:]
