"""Planning: who reads a row next, and which rows the host tier keeps.

The rule is Belady's MIN (IBM Systems Journal 5(2), 1966) at the grain of an item and with bypass: after item t the tier
keeps those H rows of (tier + item) whose next use is nearest. That is optimal: a stay between two uses is an interval,
at most H of them may overlap, and dropping the one that ends last is the classic greedy. Ginex (PVLDB 15, 2022)
computes such change sets with a moving threshold; here every slot hangs in the list of its next use, so that an item
costs time linear in its inputs and in the number of lists.

`place` int32 [N] says where a row is: -1 nowhere, c < D device slot c, else host slot c - D.
`links` int32 [H, 4] per host slot: next and previous slot in its list (-1 none), its list, the item that filled it.
`heads` int32 [lists]: first slot of the rows next used at that time; the last list holds slots that are free or whose
row is never used again.
"""

import numpy as np
from numba import njit

from penstock.kernels.prefetch import prefetch

NEXT, PREVIOUS, LIST, FILLED = 0, 1, 2, 3
_AHEAD = 16  # iterations between asking for a line and using it


@njit(cache=True, nogil=True)
def count_accesses(ids, item, never, counts, first):  # type: ignore[no-untyped-def]
    """Add one access per id; `first` takes `item` where it is still `never`."""
    for i in range(len(ids)):
        if i + _AHEAD < len(ids):
            prefetch(counts, ids[i + _AHEAD])
            prefetch(first, ids[i + _AHEAD])
        node = ids[i]
        counts[node] += 1
        if first[node] == never:
            first[node] = item


@njit(cache=True, nogil=True)
def next_uses(ids, item, table, out):  # type: ignore[no-untyped-def]
    """Take each id's next use from `table` and leave `item` there; called for the items from last to first."""
    for i in range(len(ids)):
        if i + _AHEAD < len(ids):
            prefetch(table, ids[i + _AHEAD])
        node = ids[i]
        out[i] = table[node]
        table[node] = item


@njit(cache=True, nogil=True)
def look_up(ids, place, shift, source, keys):  # type: ignore[no-untyped-def]
    """Copy each id's place to `source`; of those without one write `id << shift | position` to `keys`, and count."""
    misses = 0
    for i in range(len(ids)):
        if i + _AHEAD < len(ids):
            prefetch(place, ids[i + _AHEAD])
        node = ids[i]
        source[i] = place[node]
        if place[node] < 0:
            keys[misses] = (np.int64(node) << shift) | i
            misses += 1
    return misses


@njit(cache=True, nogil=True)
def rank_misses(keys, shift, base, source, missing):  # type: ignore[no-untyped-def]
    """Number the misses: the n-th of the sorted `keys` becomes extent row n, code `base + n`."""
    mask = (np.int64(1) << shift) - 1
    for n in range(len(keys)):
        missing[n] = keys[n] >> shift
        source[keys[n] & mask] = base + n


@njit(cache=True, nogil=True, inline="always")
def _link(slot, bucket, heads, links):  # type: ignore[no-untyped-def]
    follower = heads[bucket]
    links[slot, NEXT] = follower
    links[slot, PREVIOUS] = -1
    links[slot, LIST] = bucket
    if follower >= 0:
        links[follower, PREVIOUS] = slot
    heads[bucket] = slot


@njit(cache=True, nogil=True, inline="always")
def _unlink(slot, heads, links):  # type: ignore[no-untyped-def]
    before, after = links[slot, PREVIOUS], links[slot, NEXT]
    if before >= 0:
        links[before, NEXT] = after
    else:
        heads[links[slot, LIST]] = after
    if after >= 0:
        links[after, PREVIOUS] = before


@njit(cache=True, nogil=True)
def hang_slots(order, uses, heads, links):  # type: ignore[no-untyped-def]
    """Rebuild all lists: slot `order[n]` goes to the front of list `uses[order[n]]`, for n = 0, 1, ..."""
    for bucket in range(len(heads)):
        heads[bucket] = -1
    for n in range(len(order)):
        _link(order[n], uses[order[n]], heads, links)
        links[order[n], FILLED] = -1


@njit(cache=True, nogil=True)
def keep_nearest(  # type: ignore[no-untyped-def]
    item, ids, uses, source, num_device, place, nodes, heads, links, rows, admit_rows, admit_slots
):
    """Bring the tier from before `item` to after it; fill the admissions that last, and count them.

    `uses` int32 [M] next use of each input; `source` codes of them, misses ranked; `nodes` int64 [H] row in each slot;
    `rows` int32 [H] scratch. Hits move to the list of their next use first; then every miss takes the slot of the
    farthest row if its own next use is nearer. A tie keeps what is there.
    """
    num_host = len(nodes)
    base = num_device + num_host
    if num_host == 0:
        return 0
    for i in range(len(ids)):
        if i + _AHEAD < len(ids):
            ahead = source[i + _AHEAD] - num_device
            if 0 <= ahead < num_host:
                prefetch(links, ahead * 4)
        if num_device <= source[i] < base:
            slot = source[i] - num_device
            _unlink(slot, heads, links)
            _link(slot, uses[i], heads, links)
    farthest = len(heads) - 1
    admits = 0
    for i in range(len(ids)):
        if source[i] < base:
            continue
        while heads[farthest] < 0:  # some list is not empty, as there are slots
            farthest -= 1
        if uses[i] >= farthest:
            continue
        slot = heads[farthest]
        _unlink(slot, heads, links)
        if nodes[slot] >= 0:
            place[nodes[slot]] = -1
        nodes[slot] = ids[i]
        place[ids[i]] = num_device + slot
        rows[slot] = source[i] - base
        _link(slot, uses[i], heads, links)
        if links[slot, FILLED] != item:
            links[slot, FILLED] = item
            admit_slots[admits] = slot
            admits += 1
    for n in range(admits):
        admit_rows[n] = rows[admit_slots[n]]
    return admits


@njit(cache=True, nogil=True)
def histogram(values, place, out):  # type: ignore[no-untyped-def]
    """Count how often each value occurs among nodes that have no place."""
    for node in range(len(values)):
        if place[node] < 0:
            out[values[node]] += 1


@njit(cache=True, nogil=True)
def histogram_of(ids, values, place, out):  # type: ignore[no-untyped-def]
    """The same over some ids only."""
    for i in range(len(ids)):
        if i + _AHEAD < len(ids):
            prefetch(values, ids[i + _AHEAD])
            prefetch(place, ids[i + _AHEAD])
        if place[ids[i]] < 0:
            out[values[ids[i]]] += 1


@njit(cache=True, nogil=True)
def select_top(counts, place, threshold, num_ties, out):  # type: ignore[no-untyped-def]
    """Fill `out` with placeless nodes above `threshold` and the first `num_ties` at it, ascending; count them."""
    found = 0
    for node in range(len(counts)):
        if place[node] >= 0 or counts[node] < threshold:
            continue
        if counts[node] == threshold:
            if num_ties == 0:
                continue
            num_ties -= 1
        out[found] = node
        found += 1
    return found


@njit(cache=True, nogil=True)
def mark_blocks(ids, row_bytes, block_bytes, needed):  # type: ignore[no-untyped-def]
    """Mark every block of the feature table that holds a byte of one of the rows."""
    for i in range(len(ids)):
        start = np.int64(ids[i]) * row_bytes
        for block in range(start // block_bytes, (start + row_bytes - 1) // block_bytes + 1):
            needed[block] = 1


@njit(cache=True, nogil=True)
def tally(ids, table):  # type: ignore[no-untyped-def]
    """Add one per id."""
    for i in range(len(ids)):
        table[ids[i]] += 1


@njit(cache=True, nogil=True)
def split_shared(missing, table, shared_ids, found):  # type: ignore[no-untyped-def]
    """Number the rows that several items miss: a tally above 1 becomes -2 - n, n in the order of first sight.

    `found` rows are numbered already; the new total is returned and their ids are in `shared_ids`.
    """
    for i in range(len(missing)):
        node = missing[i]
        if table[node] > 1:
            table[node] = -2 - found
            shared_ids[found] = node
            found += 1
    return found


@njit(cache=True, nogil=True)
def min_hashes(missing, table, first_rank, second_rank, first, second):  # type: ignore[no-untyped-def]
    """Lower both min-hashes of every shared row to this item's ranks in two permutations of the window's items."""
    for i in range(len(missing)):
        n = -2 - table[missing[i]]
        if n >= 0:
            first[n] = min(first[n], first_rank)
            second[n] = min(second[n], second_rank)


@njit(cache=True, nogil=True)
def split_item(missing, table, position, shift, private, private_rows, keys):  # type: ignore[no-untyped-def]
    """Part an item's missing rows: ids and old extent rows of private ones, `position << shift | old row` of shared."""
    num_private, num_shared = 0, 0
    for i in range(len(missing)):
        n = -2 - table[missing[i]]
        if n >= 0:
            keys[num_shared] = (np.int64(position[n]) << shift) | i
            num_shared += 1
        else:
            private[num_private] = missing[i]
            private_rows[num_private] = i
            num_private += 1
    return num_private


@njit(cache=True, nogil=True)
def page_runs(positions, row_bytes, page, gap, runs, offsets):  # type: ignore[no-untyped-def]
    """Cover rows at ascending `positions` by page runs, joined over at most `gap` unread pages; count the runs.

    `offsets` gets the byte of each row within the runs laid end to end.
    """
    num_runs = 0
    laid = np.int64(0)  # bytes of the runs before the last one
    for i in range(len(positions)):
        start = np.int64(positions[i]) * row_bytes
        first, last = start // page, (start + row_bytes - 1) // page
        if num_runs and first <= runs[num_runs - 1, 0] + runs[num_runs - 1, 1] + gap:
            runs[num_runs - 1, 1] = max(runs[num_runs - 1, 1], last + 1 - runs[num_runs - 1, 0])
        else:
            if num_runs:
                laid += runs[num_runs - 1, 1] * page
            runs[num_runs, 0], runs[num_runs, 1] = first, last + 1 - first
            num_runs += 1
        offsets[i] = laid + start - runs[num_runs - 1, 0] * page
    return num_runs
