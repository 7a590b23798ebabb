"""Peers: how many bytes an epoch reads under the policies of others, replayed on our trace with the same memory.

Written from the published descriptions. DiskGNN packs what a static hot set misses. Ginex keeps rows by Belady's rule
at the grain of an item, and reads each missing row with the aligned 4 KiB pages that hold it; its address table of 4
bytes per node comes out of the same memory. Tiers are in their steady state: a lap ends as it began.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from penstock.sampler.accesses import Accesses, open_accesses
from penstock.sampler.movement import LapCounts, Tiers, cyclic_future, settle, take_census
from penstock.sampler.policies import PolicyName
from penstock.sampler.scratch import ItemArrays
from penstock.storage.directio import PAGE
from penstock.storage.pack import layout_extent
from penstock.storage.trace import Trace

Peer = Literal["belady", "static", "none", "belady4k"]


def pages_of(ids: NDArray[np.int64], row_bytes: int) -> int:
    """Pages that hold these rows of a table that starts on a page, each row read on its own."""
    start = ids * row_bytes
    return int(((start + row_bytes - 1) // PAGE - start // PAGE + 1).sum())


def bytes_per_epoch(trace: Trace, row_bytes: int, host_bytes: int, policy: Peer) -> int:
    """Bytes read per epoch with `host_bytes` of memory for rows.

    Packs are counted with everything that is in an extent: blocks, ids, codes, admissions and padding. `belady4k`
    counts pages of rows alone.
    """
    table_bytes = 4 * trace.meta.num_nodes if policy == "belady4k" else 0
    slots = max(0, host_bytes - table_bytes) // row_bytes
    name: PolicyName = "belady" if policy == "belady4k" else policy
    with open_accesses(trace) as accesses, TemporaryDirectory() as folder:
        total = _replay(trace, accesses, name if slots else "none", slots, row_bytes, Path(folder), policy)
    return total // trace.meta.num_epochs


def _replay(
    trace: Trace, accesses: Accesses, policy: PolicyName, slots: int, row_bytes: int, folder: Path, peer: Peer
) -> int:
    num_items, largest = len(accesses), int(accesses.num_inputs.max())
    census = take_census(accesses.ids, num_items, trace.meta.num_nodes, never=2 * num_items)
    slots = min(slots, int(np.count_nonzero(census.counts))) if policy != "none" else 0
    with ItemArrays(folder / "future", "<i4", num_items, accesses.num_inputs) as uses:
        future = uses if policy == "belady" else None
        if future is not None:
            cyclic_future(accesses.ids, num_items, census, future, largest)
        tiers = Tiers(census.counts, policy=policy, num_device=0, num_host=slots, max_inputs=largest)
        counts = settle(tiers, accesses.ids, num_items, future)
        if peer != "belady4k":
            return _extent_bytes(accesses, counts, row_bytes)
        moves = tiers.replay(accesses.ids, range(num_items), future)
        return PAGE * sum(pages_of(move.missing, row_bytes) for move in moves)


def _extent_bytes(accesses: Accesses, counts: LapCounts, row_bytes: int) -> int:
    return sum(
        layout_extent(
            item=item,
            payload_bytes=int(accesses.payload_bytes[item]),
            num_inputs=int(accesses.num_inputs[item]),
            num_admits=int(counts.admits[item]),
            num_runs=0,
            num_shared=0,
            num_rows=int(counts.misses[item]),
            row_bytes=row_bytes,
        ).extent_bytes
        for item in range(len(accesses))
    )
