"""Plan rolling windows: the future is known to the end of the next window, and guessed from popularity beyond it.

A row not used within that horizon gets a class by how often it was used so far: it is expected again after about
(items seen / items that used it) items, so rows are kept in the order of their classes, after all whose next use is
known. Movement never changes values; a guess that is wrong costs bytes only.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.plan import tally
from penstock.sampler.accesses import Accesses
from penstock.sampler.movement import Tiers, find_next_uses
from penstock.sampler.policies import PolicyName
from penstock.sampler.recording import Recording, Table, record
from penstock.sampler.scratch import ItemArrays
from penstock.storage.trace import WindowIndex

NUM_CLASSES = 16
BYTES_PER_NODE = 12  # counts, places, next uses
_PIECE = 1 << 18


class RollingPlanner:
    """Plans window after window; owns the tiers, which carry over. Starts with an empty host tier.

    Memory: 12 bytes per node and the largest item.
    """

    def __init__(
        self, traces: Path, *, policy: PolicyName, num_device: int, num_host: int, num_nodes: int, table: Table
    ) -> None:
        self._traces, self._policy, self._table = traces, policy, table
        self._num_device, self._num_host = num_device, num_host
        self._counts = np.zeros(num_nodes, np.int32)
        self._table_ahead = np.empty(num_nodes if policy == "belady" else 0, np.int32)
        self._items_seen, self._next_window = 0, -1
        self._tiers: Tiers | None = None

    def plan(self, current: WindowIndex, following: WindowIndex | None, *, row_bytes: int, scratch: Path) -> Recording:
        """Plan `current`, knowing `following`; windows must come in order, each as the former call's `following`."""
        self._count([index for index in (current, following) if index is not None])
        max_inputs = max(current.num_inputs)
        if self._tiers is None:
            self._tiers = Tiers(
                self._counts,
                policy=self._policy,
                num_device=self._num_device,
                num_host=self._num_host,
                max_inputs=max_inputs,
            )
        self._tiers.reserve(max_inputs)
        num_items = len(current.offsets)
        with Accesses(self._traces, [current]) as accesses:
            with ItemArrays(scratch / "future.bin", "<i4", num_items, accesses.num_inputs) as uses:
                future = uses if self._policy == "belady" else None
                if future is not None:
                    self._look_ahead(accesses, following, future)
                recording = record(
                    self._tiers,
                    accesses,
                    range(num_items),
                    future,
                    window_starts=(0,),
                    table=self._table,
                    row_bytes=row_bytes,
                    scratch=scratch,
                    cyclic=False,
                )
                uses.delete()
        return recording

    def _count(self, indexes: Sequence[WindowIndex]) -> None:
        """Add windows that were not counted as a former call's `following`."""
        for index in indexes:
            if index.window >= self._next_window:
                self._next_window = index.window + 1
                self._items_seen += len(index.offsets)
                with Accesses(self._traces, [index]) as accesses:
                    for item in range(len(accesses)):
                        tally(accesses.ids(item), self._counts)

    def _look_ahead(self, accesses: Accesses, following: WindowIndex | None, future: ItemArrays) -> None:
        """Find next uses by going backward through `following` and the current window, then hang the tier's rows."""
        assert self._tiers is not None
        ahead = 0 if following is None else len(following.offsets)
        horizon = len(accesses) + ahead
        table = self._classes(horizon)
        if following is not None:
            with Accesses(self._traces, [following]) as later:
                for item in range(ahead - 1, -1, -1):
                    table[later.ids(item)] = len(accesses) + item
        find_next_uses(accesses.ids, len(accesses), table, future, int(accesses.num_inputs.max()))
        never, nodes = horizon + NUM_CLASSES, self._tiers.policy.nodes
        uses = np.where(nodes >= 0, table[np.maximum(nodes, 0)], never).astype(np.int32)
        self._tiers.policy.start(uses, never)

    def _classes(self, horizon: int) -> NDArray[np.int32]:
        """The guess for every node, int32 [N]: `horizon` plus its class; in pieces, so that no other array is [N]."""
        for lo in range(0, len(self._counts), _PIECE):
            gaps = self._items_seen // np.maximum(self._counts[lo : lo + _PIECE], 1)
            bits = np.frexp(gaps.astype(np.float32))[1]  # of the gap
            self._table_ahead[lo : lo + _PIECE] = horizon + np.clip(bits, 0, NUM_CLASSES - 1)
        return self._table_ahead
