"""Twins of `compact`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.reference_rng import mix


def gather_flat(values, positions, lo, hi, out):  # type: ignore[no-untyped-def]
    """Gather."""
    out[lo:hi] = values[positions[lo:hi]]


def scatter_runs(values, offsets, targets, lo, hi, out):  # type: ignore[no-untyped-def]
    """Copy runs."""
    for i in range(lo, hi):
        run = values[offsets[i] : offsets[i + 1]]
        out[targets[i] : targets[i] + len(run)] = run


def fill_table(nodes, lo, hi, table):  # type: ignore[no-untyped-def]
    """Number nodes by their place."""
    table[nodes[lo:hi]] = np.arange(lo, hi)


def clear_table(nodes, lo, hi, table):  # type: ignore[no-untyped-def]
    """Forget nodes."""
    table[nodes[lo:hi]] = -1


def compact_table(ids, lo, hi, table, nodes, num_nodes, local):  # type: ignore[no-untyped-def]
    """Number ids in the order of first appearance."""
    for e in range(lo, hi):
        if table[ids[e]] < 0:
            table[ids[e]] = num_nodes
            nodes[num_nodes] = ids[e]
            num_nodes += 1
        local[e] = table[ids[e]]
    return num_nodes


def _find(node: Any, hash_ids: NDArray[Any]) -> int:
    slot = mix(node) % len(hash_ids)
    while hash_ids[slot] not in (node, -1):
        slot = (slot + 1) % len(hash_ids)
    return slot


def fill_hash(nodes, lo, hi, hash_ids, hash_locals):  # type: ignore[no-untyped-def]
    """Number nodes by their place."""
    for i in range(lo, hi):
        slot = _find(nodes[i], hash_ids)
        hash_ids[slot], hash_locals[slot] = nodes[i], i


def compact_hash(ids, lo, hi, hash_ids, hash_locals, nodes, num_nodes, local):  # type: ignore[no-untyped-def]
    """Number ids in the order of first appearance."""
    for e in range(lo, hi):
        slot = _find(ids[e], hash_ids)
        if hash_ids[slot] < 0:
            hash_ids[slot], hash_locals[slot] = ids[e], num_nodes
            nodes[num_nodes] = ids[e]
            num_nodes += 1
        local[e] = hash_locals[slot]
    return num_nodes
