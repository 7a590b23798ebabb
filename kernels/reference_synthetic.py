"""The kernels of `synthetic`, in Python integers: slow, and nothing wraps around by accident."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.synthetic import (
    SALT_CENTROID,
    SALT_DEGREE,
    SALT_LABEL,
    SALT_NOISE,
    SALT_SOURCE,
    SALT_SPLIT,
)

_WORD = (1 << 64) - 1
_GOLDEN, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ROUNDS = 12


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * _M1 & _WORD
    x = (x ^ (x >> 27)) * _M2 & _WORD
    return x ^ (x >> 31)


def _fold(key: int, value: int) -> int:
    return _mix((int(key) + _GOLDEN + int(value) * _M2) & _WORD)


def _draw(key: int, k: int) -> int:
    return _mix((int(key) + (k + 1) * _GOLDEN) & _WORD)


def _unit(bits: int) -> float:
    return ((bits >> 11) + 0.5) / (1 << 53)


def _label(key: int, node: int, num_classes: int) -> int:
    return (_draw(_fold(key, SALT_LABEL), node) >> 32) * num_classes >> 32


def scatter_keys(key: int, num_nodes: int, out: NDArray[np.uint64]) -> None:
    bits = max(2, (num_nodes - 1).bit_length())
    odds = [_draw(key, n) | 1 for n in range(2)]
    out[:] = [(1 << bits) - 1, (bits + 1) // 2, *odds, *(pow(odd, -1, 1 << 64) for odd in odds)]


def scatter(rank: int, num_nodes: int, keys: NDArray[np.uint64]) -> int:
    mask, shift, first, second, _, _ = map(int, keys)
    x = rank
    while True:
        x = x * first & mask
        x ^= x >> shift
        x = x * second & mask
        x ^= x >> shift
        if x < num_nodes:
            return x


def unscatter(node: int, num_nodes: int, keys: NDArray[np.uint64]) -> int:
    mask, shift, _, _, first, second = map(int, keys)
    x = node
    while True:
        x = (x ^ (x >> shift)) * second & mask
        x = (x ^ (x >> shift)) * first & mask
        if x < num_nodes:
            return x


def draw_labels(key: int, num_classes: int, lo: int, hi: int, out: NDArray[np.int64]) -> None:
    out[: hi - lo] = [_label(key, v, num_classes) for v in range(lo, hi)]


def draw_splits(key: int, train: float, valid: float, test: float, lo: int, hi: int, out: NDArray[np.int8]) -> None:
    ends = np.array([train, train + valid, train + valid + test])
    units = np.array([_unit(_draw(_fold(key, SALT_SPLIT), v)) for v in range(lo, hi)])
    out[: hi - lo] = np.array([0, 1, 2, -1])[np.searchsorted(ends, units, side="right")]


def draw_degrees(
    key: int, smallest: float, power: float, largest: int, lo: int, hi: int, out: NDArray[np.int64]
) -> None:
    units = np.array([_unit(_draw(_fold(key, SALT_DEGREE), v)) for v in range(lo, hi)])
    out[: hi - lo] = np.minimum(smallest * units**-power, largest)


def draw_sources(
    key: int,
    num_nodes: int,
    num_classes: int,
    homophily: float,
    power: float,
    keys: NDArray[np.uint64],
    indptr: NDArray[np.int64],
    base: int,
    lo: int,
    hi: int,
    out: NDArray[Any],
) -> None:
    for v in range(lo, hi):
        degree, label = int(indptr[v + 1] - indptr[v]), _label(key, v, num_classes)
        node_key, chosen, count, rounds = _fold(_fold(key, SALT_SOURCE), v), set[int](), 0, 0
        while len(chosen) < degree:
            for _ in range(degree - len(chosen)):
                source = v
                while source == v:
                    bits, coin = _draw(node_key, count), _unit(_draw(node_key, count + 1))
                    count += 2
                    if rounds >= _ROUNDS:
                        source = int(_unit(bits) * num_nodes)
                        continue
                    others = [kind for kind in range(num_classes) if kind != label]
                    pick = int((coin - homophily) / (1 - homophily) * len(others))
                    kind = label if coin < homophily else others[min(pick, len(others) - 1)]
                    members = len(range(kind, num_nodes, num_classes))
                    rank = min(int(members * _unit(bits) ** power), members - 1) * num_classes + kind
                    source = scatter(rank, num_nodes, keys)
                chosen.add(source)
            rounds += 1
        out[indptr[v] - base : indptr[v + 1] - base] = sorted(chosen)


def draw_centroids(key: int, norm: float, out: NDArray[np.float32]) -> None:
    for c in range(out.shape[0]):
        row_key = _fold(_fold(key, SALT_CENTROID), c)
        row = np.array([2 * _unit(_draw(row_key, f)) - 1 for f in range(out.shape[1])])
        out[c] = row / np.sqrt((row**2).sum()) * norm


def draw_features(
    key: int,
    num_nodes: int,
    centroids: NDArray[np.float32],
    noise: float,
    keys: NDArray[np.uint64],
    lo: int,
    hi: int,
    out: NDArray[np.float32],
) -> None:
    num_classes, width = centroids.shape
    step, half = np.float32(noise / np.sqrt((2.0**32 - 1) / 6)), width // 2
    for v in range(lo, hi):
        row_key = _fold(_fold(key, SALT_NOISE), v)
        words = [_draw(row_key, f) for f in range(half)]
        sums = [(w & 0xFFFF) + (w >> 16 & 0xFFFF) for w in words] + [(w >> 32 & 0xFFFF) + (w >> 48) for w in words]
        if width % 2:
            last = _mix(_draw(row_key, half))
            sums.append((last & 0xFFFF) + (last >> 16 & 0xFFFF))
        deviations = (np.array(sums) - 0xFFFF).astype(np.float32) * step
        out[v - lo] = centroids[unscatter(v, num_nodes, keys) % num_classes] + deviations
