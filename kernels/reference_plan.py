"""The kernels of `plan` in the most obvious NumPy and Python."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.plan import FILLED, LIST, NEXT, PREVIOUS

Ids = NDArray[Any]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


def count_accesses(ids: Ids, item: int, never: int, counts: Ints, first: Ints) -> None:
    """Count, and note the first."""
    counts[ids] += 1
    first[ids] = np.where(first[ids] == never, item, first[ids])


def next_uses(ids: Ids, item: int, table: Ints, out: Ints) -> None:
    """Read the table, then write it."""
    out[:] = table[ids]
    table[ids] = item


def look_up(ids: Ids, place: Ints, shift: int, source: Ints, keys: Longs) -> int:
    """Places, and keys of those without."""
    source[:] = place[ids]
    positions = np.flatnonzero(source < 0)
    keys[: len(positions)] = (ids[positions].astype(np.int64) << shift) | positions
    return len(positions)


def rank_misses(keys: Longs, shift: int, base: int, source: Ints, missing: Longs) -> None:
    """Number sorted keys."""
    missing[: len(keys)] = keys >> shift
    source[keys & ((1 << shift) - 1)] = base + np.arange(len(keys))


def _lists(heads: Ints, links: Ints) -> list[list[int]]:
    """The slots of every list, front first."""
    lists = []
    for head in heads.tolist():
        slots = []
        while head >= 0:
            slots.append(head)
            head = int(links[head, NEXT])
        lists.append(slots)
    return lists


def _hang(lists: list[list[int]], heads: Ints, links: Ints) -> None:
    for number, slots in enumerate(lists):
        heads[number] = slots[0] if slots else -1
        for n, slot in enumerate(slots):
            links[slot, NEXT] = slots[n + 1] if n + 1 < len(slots) else -1
            links[slot, PREVIOUS] = slots[n - 1] if n else -1
            links[slot, LIST] = number


def hang_slots(order: Longs, uses: Ints, heads: Ints, links: Ints) -> None:
    """Lists by use, the last of `order` in front."""
    links[order, FILLED] = -1
    _hang([[int(s) for s in order[::-1] if uses[s] == number] for number in range(len(heads))], heads, links)


def keep_nearest(
    item: int,
    ids: Ids,
    uses: Ints,
    source: Ints,
    num_device: int,
    place: Ints,
    nodes: Longs,
    heads: Ints,
    links: Ints,
    rows: Ints,
    admit_rows: Ints,
    admit_slots: Ints,
) -> int:
    """Move hits to the front of their lists; then each miss takes the first slot of the last list, if it is nearer."""
    lists, base = _lists(heads, links), num_device + len(nodes)
    for i in np.flatnonzero((source >= num_device) & (source < base)):
        slot = int(source[i]) - num_device
        lists[links[slot, LIST]].remove(slot)
        lists[uses[i]].insert(0, slot)
        links[slot, LIST] = uses[i]
    admits = []
    for i in np.flatnonzero(source >= base):
        last = max((number for number, slots in enumerate(lists) if slots), default=-1)
        if uses[i] < last:
            slot = lists[last].pop(0)
            lists[uses[i]].insert(0, slot)
            if nodes[slot] >= 0:
                place[nodes[slot]] = -1
            nodes[slot], place[ids[i]], rows[slot] = ids[i], num_device + slot, source[i] - base
            if slot not in admits:
                admits.append(slot)
    _hang(lists, heads, links)
    links[admits, FILLED] = item
    admit_slots[: len(admits)] = admits
    admit_rows[: len(admits)] = rows[admits]
    return len(admits)


def histogram(values: Ints, place: Ints, out: Longs) -> None:
    """Count values of the placeless."""
    np.add.at(out, values[place < 0], 1)


def histogram_of(ids: Ids, values: Ints, place: Ints, out: Longs) -> None:
    """The same over some ids."""
    np.add.at(out, values[ids[place[ids] < 0]], 1)


def select_top(counts: Ints, place: Ints, threshold: int, num_ties: int, out: Longs) -> int:
    """Above the threshold, and the first ties."""
    above = np.flatnonzero((place < 0) & (counts > threshold))
    ties = np.flatnonzero((place < 0) & (counts == threshold))[:num_ties]
    found = np.union1d(above, ties)
    out[: len(found)] = found
    return len(found)


def mark_blocks(ids: Ids, row_bytes: int, block_bytes: int, needed: NDArray[np.uint8]) -> None:
    """Every block of every row."""
    for node in ids.tolist():
        needed[node * row_bytes // block_bytes : ((node + 1) * row_bytes - 1) // block_bytes + 1] = 1


def tally(ids: Ids, table: Ints) -> None:
    """One more for each."""
    np.add.at(table, ids, 1)


def split_shared(missing: Ids, table: Ints, shared_ids: Ids, found: int) -> int:
    """Number what is seen for the first time."""
    for node in missing.tolist():
        if table[node] > 1:
            table[node], shared_ids[found] = -2 - found, node
            found += 1
    return found


def min_hashes(missing: Ids, table: Ints, first_rank: int, second_rank: int, first: Ints, second: Ints) -> None:
    """Lower the hashes of shared rows."""
    numbers = -2 - table[missing]
    numbers = numbers[numbers >= 0]
    first[numbers] = np.minimum(first[numbers], first_rank)
    second[numbers] = np.minimum(second[numbers], second_rank)


def split_item(
    missing: Ids, table: Ints, position: Longs, shift: int, private: Ids, private_rows: Ints, keys: Longs
) -> int:
    """Private rows as they come, shared ones as keys."""
    numbers = -2 - table[missing]
    own, shared = np.flatnonzero(numbers < 0), np.flatnonzero(numbers >= 0)
    private[: len(own)], private_rows[: len(own)] = missing[own], own
    keys[: len(shared)] = (position[numbers[shared]] << shift) | shared
    return len(own)


def page_runs(positions: Longs, row_bytes: int, page: int, gap: int, runs: Longs, offsets: Longs) -> int:
    """Mark pages, close small gaps, cut into runs."""
    if len(positions) == 0:
        return 0
    starts = positions * row_bytes
    wanted = sorted({p for s in starts.tolist() for p in range(s // page, (s + row_bytes - 1) // page + 1)})
    pages = [wanted[0]]
    for number in wanted[1:]:
        pages += range(pages[-1] + 1, number) if number - pages[-1] - 1 <= gap else []
        pages.append(number)
    cuts = np.split(np.array(pages), np.flatnonzero(np.diff(pages) > 1) + 1)
    for n, run in enumerate(cuts):
        runs[n] = run[0], len(run)
    offsets[: len(positions)] = [pages.index(s // page) * page + s % page for s in starts.tolist()]
    return len(cuts)
