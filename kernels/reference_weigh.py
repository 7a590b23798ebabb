"""The twin of `weigh`: Des Raj's estimators one by one."""

from typing import Any

import numpy as np

from penstock.kernels.reference_rng import draw, fold, unit


def copy_number(indices: Any, start: int, position: int) -> int:
    """Count equal sources right before a position; in-neighbours are ascending."""
    others = np.flatnonzero(np.asarray(indices[start:position]) != indices[position])
    return int(position - start - (others[-1] + 1 if len(others) else 0))


def weigh_draws(  # type: ignore[no-untyped-def]
    indices, weights, nodes, slots, keys, starts, degrees, offsets, lo, hi, by_source, replace, by_position, in_order,
    places, positions, out,
):  # fmt: skip
    """Mix the coefficients of every t_j."""
    for i in range(lo, hi):
        start, end = int(starts[i]), int(starts[i] + degrees[i])
        picks = positions[offsets[i] : offsets[i + 1]].astype(int)
        around = weights[start:end].astype(np.float64)
        total, positive = around.sum(), int((around > 0).sum())
        scale = min(1.0, float(np.finfo(np.float32).max) / max(1e-300, total))
        if replace:
            out[offsets[i] : offsets[i + 1]] = scale * total / max(1, len(picks))
            continue
        if len(picks) == positive:
            out[offsets[i] : offsets[i + 1]] = weights[picks]
            continue
        key = keys[slots[i]]
        if by_source:
            bits = [draw(fold(key, indices[p]), copy_number(indices, start, p)) for p in picks]
        else:
            bits = [draw(fold(key, nodes[i]), p - start) for p in picks]
        order = np.argsort([-np.log(unit(b)) / weights[p] for b, p in zip(bits, picks, strict=True)], kind="stable")
        mixture = 1 / (positive - np.arange(len(picks), dtype=np.float64)) ** 2
        found = np.zeros(len(picks))
        for j, share in enumerate(mixture / mixture.sum()):
            earlier, weight = order[:j], weights[picks].astype(np.float64)
            found[earlier] += share * weight[earlier]
            found[order[j]] += share * (total - weight[earlier].sum())
        out[offsets[i] : offsets[i + 1]] = scale * found
