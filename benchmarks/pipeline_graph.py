"""A graph with communities and hubs, to be cut: the classes that `storage.generate` plants give no locality.

A degree-corrected planted partition (Karrer and Newman, Phys. Rev. E 83, 2011): nodes have Pareto weights, communities
log-normal sizes. One end of an edge is drawn by weight, the other by weight within the same community or, with
probability `MIXING`, within one of the few partners that each community has. Communities are runs of ids, as a
renumbering for locality would give, so whoever computes on rows has them in the same good order. A node's class is its
community's, and features hint at it. Records say how many rows METIS makes chunks and parts read of each other; in cuts
in two and in eight, real graphs need 0.48 and 0.68 (ogbn-arxiv) to 0.96 and 2.61 (Reddit) times their nodes, by the
logs of GNNPipe's authors.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.storage.graph import GraphStore
from penstock.storage.ingest import IngestOptions, ingest_npy

NUM_FEATURES, NUM_CLASSES = 64, 16
PAIRS_PER_NODE = 6  # undirected; some are drawn twice, so that a node has 11 in-edges on average
MIXING = 0.5
_COMMUNITY = 500  # mean nodes
_PARTNERS = 4
_EXPONENT = 2.5  # of the degrees
_LARGEST = 1000.0  # weight, in units of the smallest


def _communities(rng: np.random.Generator, num_nodes: int) -> NDArray[np.int64]:
    """First node of every community, and N last."""
    sizes = np.maximum(8, rng.lognormal(np.log(_COMMUNITY) - 0.5, 1.0, 4 + 4 * num_nodes // _COMMUNITY)).astype(
        np.int64
    )
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return np.append(starts[starts < num_nodes], num_nodes)


def _edges(
    rng: np.random.Generator, starts: NDArray[np.int64], community: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both ends of every pair."""
    num_nodes, num_communities = len(community), len(starts) - 1
    weights = np.minimum(_LARGEST, rng.random(num_nodes) ** (-1 / (_EXPONENT - 1)))
    heights = np.concatenate([[0.0], np.cumsum(weights)])
    partners = rng.integers(0, num_communities, (num_communities, _PARTNERS))
    num_pairs = PAIRS_PER_NODE * num_nodes

    def draw(low: NDArray[np.float64] | float, high: NDArray[np.float64] | float) -> NDArray[np.int64]:
        at = low + rng.random(num_pairs) * (np.asarray(high) - low)
        return np.clip(np.searchsorted(heights, at, side="right") - 1, 0, num_nodes - 1)

    first = draw(0.0, heights[-1])
    home = community[first]
    far = rng.random(num_pairs) < MIXING
    other = np.where(far, partners[home, rng.integers(0, _PARTNERS, num_pairs)], home)
    return first, draw(heights[starts[other]], heights[starts[other + 1]])


def write_pipeline_graph(folder: Path, num_nodes: int, seed: int = 0) -> GraphStore:
    """Make the graph under `folder`, or open it where it is; about 1 kB of memory per node meanwhile."""
    source = folder / f"arrays-{num_nodes}"
    if not (source / "train_mask.npy").is_file():  # the last to be written
        source.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        starts = _communities(rng, num_nodes)
        community = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        src, dst = _edges(rng, starts, community)
        labels = rng.integers(0, NUM_CLASSES, len(starts) - 1)[community]
        centroids = rng.standard_normal((NUM_CLASSES, NUM_FEATURES), np.float32)
        features = rng.standard_normal((num_nodes, NUM_FEATURES), np.float32)
        split = rng.random(num_nodes)
        arrays = {"src": src, "dst": dst, "labels": labels, "features": features + 0.2 * centroids[labels]}
        arrays |= {"valid_mask": split > 0.9, "train_mask": split < 0.5}
        for name, values in arrays.items():
            np.save(source / f"{name}.npy", values)
    options = IngestOptions(undirected=True, self_loops="remove")
    return ingest_npy(source, folder / f"graph-{num_nodes}", options, host_memory=2 << 30)
