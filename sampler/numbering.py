"""Number the nodes of one item: by a table over all nodes where memory allows it, else by a hash table.

Both number in the order of first appearance. With the table a whole item takes three quarters of the time; it
wants 4 bytes per node of the graph and thread, where the hash table's size depends on the item alone.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.compact import clear_table, compact_hash, compact_table, fill_hash, fill_table

_SPARSE = 16  # nodes per touched entry above which clearing entries one by one beats clearing the whole table


class TableNumbering:
    """Numbers kept in an int32 [N] table, -1 between items."""

    def __init__(self, num_nodes: int) -> None:
        self._table = np.full(num_nodes, -1, np.int32)

    def start(self, nodes: NDArray[Any], num_nodes: int) -> None:
        """Begin with the first `num_nodes` of `nodes`, which are distinct."""
        fill_table(nodes, 0, num_nodes, self._table)

    def reserve(self, nodes: NDArray[Any], num_nodes: int, max_nodes: int) -> None:
        """Make room for `max_nodes` in all: a table over all nodes has it."""

    def compact(self, ids: NDArray[Any], num_ids: int, nodes: NDArray[Any], num_nodes: int, local: Any) -> int:
        """Number `ids`, append the new ones to `nodes`, which has room for one more; return how many there are now."""
        return int(compact_table(ids, 0, num_ids, self._table, nodes, num_nodes, local))

    def clear(self, nodes: NDArray[Any], num_nodes: int) -> None:
        """Forget all nodes, before the next item."""
        if num_nodes * _SPARSE > len(self._table):
            self._table.fill(-1)
        else:
            clear_table(nodes, 0, num_nodes, self._table)


class HashNumbering:
    """Numbers kept in a hash table at least twice as large as the item; the same interface."""

    def __init__(self, id_dtype: np.dtype[Any]) -> None:
        self._ids, self._locals = np.empty(0, id_dtype), np.empty(0, np.int32)
        self._capacity = 0

    def start(self, nodes: NDArray[Any], num_nodes: int) -> None:
        """Begin with the first `num_nodes` of `nodes`."""
        self._capacity = 0
        self.reserve(nodes, num_nodes, num_nodes)

    def reserve(self, nodes: NDArray[Any], num_nodes: int, max_nodes: int) -> None:
        """Make room for `max_nodes` in all, of which `nodes[:num_nodes]` are there already."""
        wanted = 1 << (2 * max_nodes).bit_length()
        if wanted <= self._capacity:
            return
        self._capacity = wanted
        if wanted > len(self._ids):
            self._ids, self._locals = np.empty(wanted, self._ids.dtype), np.empty(wanted, np.int32)
        self._ids[:wanted].fill(-1)
        fill_hash(nodes, 0, num_nodes, self._ids[:wanted], self._locals)

    def compact(self, ids: NDArray[Any], num_ids: int, nodes: NDArray[Any], num_nodes: int, local: Any) -> int:
        """Number `ids` as `TableNumbering` does."""
        table = self._ids[: self._capacity]
        return int(compact_hash(ids, 0, num_ids, table, self._locals, nodes, num_nodes, local))

    def clear(self, nodes: NDArray[Any], num_nodes: int) -> None:
        """Forget all nodes; the next start does the work."""
        self._capacity = 0


Numbering = TableNumbering | HashNumbering
