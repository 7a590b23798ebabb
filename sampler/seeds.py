"""Who is computed when: the seeds of every item of every epoch.

Training epochs permute the split's ids by counter-based hashes (sort by hash(seed, epoch, id), ties by id), so an
epoch's order needs no state of the epochs before it. Evaluation splits keep ascending order.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.seeds import hash_ids
from penstock.storage.graph import GraphStore
from penstock.storage.trace import TraceMeta


def epoch_order(ids: NDArray[Any], seed: int, epoch: int, *, shuffle: bool = True) -> NDArray[Any]:
    """Order the ids of a split for an epoch; `ids` are ascending and distinct.

    Takes 16 bytes of memory per id on top of the result.
    """
    if not shuffle:
        return ids
    hashes = np.empty(len(ids), np.uint64)
    hash_ids(ids, seed, epoch, 0, len(ids), hashes)
    return np.asarray(ids[np.argsort(hashes, kind="stable")])  # stable: of equal hashes the smaller id comes first


@lru_cache(maxsize=2)  # windows that follow each other share an epoch, or two
def _graph_order(graph: GraphStore, split: Any, seed: int, epoch: int, shuffle: bool) -> NDArray[Any]:
    ids = np.arange(graph.num_nodes, dtype=graph.id_dtype) if split == "all" else graph.split_ids(split)
    return epoch_order(ids, seed, epoch, shuffle=shuffle)


def item_seeds(graph: GraphStore, meta: TraceMeta, item: int) -> NDArray[Any]:
    """Node ids that item `item` (of the trace) computes outputs for."""
    epoch, index = divmod(meta.whole_item(item), meta.whole_epoch_items)
    if meta.split == "all" and not meta.shuffle:  # as many ids as nodes need not be there at once
        first = index * meta.batch_size
        return np.arange(first, min(first + meta.batch_size, graph.num_nodes), dtype=graph.id_dtype)
    order = _graph_order(graph, meta.split, meta.seed, epoch, meta.shuffle)
    return order[index * meta.batch_size : (index + 1) * meta.batch_size]
