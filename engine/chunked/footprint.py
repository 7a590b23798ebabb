"""What a split of a run over ranks takes: seconds, bytes sent and bytes kept by every rank for every chunk.

Volumes are those of gnnpipe.md, section 1.7; memory is what `stage`, `blocks` and the history tables keep. A profile
of one chunk is scaled to the others, so what does not grow with a chunk (a call's overhead) is charged as if it did.
Letters: N nodes, K chunks, W parts, S stages, L hidden layers, H width of hidden rows, alpha halo rows over N.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.simulate import Costs
from penstock.storage.directio import PAGE

_EDGE_BYTES = 16  # sources of a block and of its transpose, int32, with the edges' places
_ROW_BYTES = 32  # per own or halo row: id, degree, offsets, and what addresses its gradient
_SEND_BYTES = 12  # per row that another chunk reads
_STATE_COPIES = 4  # weights, gradients, two moments
_LOADED_CHUNKS = 2  # one computed with, one read ahead
_BUFFERS = 4  # transfers of histories on disk under way: two written, two read


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFacts:
    """A graph in K chunks. `own_rows`, `halo_rows` and `edges` are per logical chunk, int64 [K], of one part.

    `part_alpha` is mirror rows over N, for every number of parts that was looked at.
    """

    own_rows: NDArray[np.int64]
    halo_rows: NDArray[np.int64]
    edges: NDArray[np.int64]
    part_alpha: Mapping[int, float]

    @property
    def num_nodes(self) -> int:
        return int(self.own_rows.sum())

    @property
    def num_edges(self) -> int:
        return int(self.edges.sum())

    @property
    def num_chunks(self) -> int:
        return len(self.own_rows)

    @property
    def alpha(self) -> float:
        """Halo rows of all chunks over N."""
        return float(self.halo_rows.sum()) / self.num_nodes

    def in_one_chunk(self) -> "GraphFacts":
        """The same graph uncut: no halo but what parts mirror."""
        return GraphFacts(
            own_rows=np.array([self.num_nodes]),
            halo_rows=np.array([0]),
            edges=np.array([self.num_edges]),
            part_alpha=self.part_alpha,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model: L hidden layers of H columns of `itemsize` bytes, features of `num_features`, a node's `label_bytes`.

    `uses_initial`: the rows that entered travel along, and every wire carries 2 H columns.
    """

    hidden_layers: int
    width: int
    num_features: int
    parameter_bytes: int
    uses_initial: bool = False
    itemsize: int = 4
    label_bytes: int = 8

    @property
    def state_bytes(self) -> int:
        """Bytes of one row between stages."""
        return self.width * self.itemsize * (2 if self.uses_initial else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a sample chunk of `rows` own and `halo` other rows and `edges` took, by unit: `enter`, hidden layers, head.

    `backward_s` leaves out weight gradients, `weight_s`. `kept_bytes` is what a tape keeps, `gradient_bytes` what a
    backward pass holds beside that. `load_s` is how long the chunk's features are waited for. `bytes_per_s` and
    `latency_s` are of the transport between two ranks, `disk_bytes_per_s` is one rank's share of the disk.
    """

    rows: int
    halo: int
    edges: int
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    weight_s: tuple[float, ...]
    kept_bytes: tuple[int, ...]
    gradient_bytes: tuple[int, ...]
    load_s: float = 0.0
    bytes_per_s: float
    latency_s: float
    disk_bytes_per_s: float

    def unit_costs(self) -> list[float]:
        """Seconds of `enter` and of every hidden layer, all passes; the head's are the last layer's."""
        costs = [sum(unit) for unit in zip(self.forward_s, self.backward_s, self.weight_s, strict=True)]
        return [*costs[:-2], costs[-2] + costs[-1]]


def pipeline_bytes(num_nodes: int, stages: int, state_bytes: int) -> int:
    """Bytes between stages in an epoch, all ranks together: every row forward and its gradient back."""
    return 2 * (stages - 1) * num_nodes * state_bytes


def mirror_bytes(num_nodes: int, layers: int, part_alpha: float, row_bytes: int) -> float:
    """Bytes between parts in an epoch, all ranks together: mirrors forward and gradients back, at every layer."""
    return 2 * layers * part_alpha * num_nodes * row_bytes


def reduce_bytes(parts: int, parameter_bytes: int) -> int:
    """Bytes to sum weight gradients over parts: each sends its own to every other, so that sums have one order."""
    return parts * (parts - 1) * parameter_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One way to run: a grid of ranks, whether activations are recomputed, and whether histories are in memory.

    `units` are those of every stage: 0 is `enter`, then the hidden layers.
    """

    layout: Layout
    units: tuple[range, ...]
    recompute: bool
    in_memory: bool

    @property
    def layers(self) -> NDArray[np.int64]:
        """Hidden layers of every rank, [ranks]."""
        return np.array([len(unit) - (unit.start == 0) for unit in self.units] * self.layout.parts)

    @property
    def stages(self) -> NDArray[np.int64]:
        """The stage of every rank, [ranks]."""
        return np.arange(self.layout.num_ranks) % self.layout.stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows and edges of every chunk that one part has, float64 [K]. Halo rows that several parts read count once."""

    own: NDArray[np.float64]
    halo: NDArray[np.float64]
    mirrors: NDArray[np.float64]
    edges: NDArray[np.float64]


def cut_pieces(facts: GraphFacts, parts: int) -> Piece:
    """Share chunks evenly among parts. KeyError where `facts` do not know so many parts."""
    own = facts.own_rows / parts
    mirrors = facts.part_alpha[parts] * own if parts > 1 else np.zeros(facts.num_chunks)
    return Piece(own=own, halo=facts.halo_rows / parts + mirrors, mirrors=mirrors, edges=facts.edges / parts)


def _history_itemsize(model: ModelFacts, config: ChunkedConfig) -> int:
    return 2 if config.history_dtype == "bfloat16" and model.itemsize == 4 else model.itemsize


def _has_messages(split: Split, config: ChunkedConfig) -> bool:
    return config.gradient_mode != "drop" or split.layout.parts > 1  # parts send mirror gradients in every mode


def _keeps_entries(split: Split) -> NDArray[np.int64]:
    """Whether a rank stores the rows that enter its stage; the first loads features again instead."""
    return (split.recompute & (split.stages > 0)).astype(np.int64)


def history_bytes(split: Split, piece: Piece, model: ModelFacts, config: ChunkedConfig) -> NDArray[np.float64]:
    """Bytes of every rank's history tables, [ranks], wherever they are.

    Two buffers of runs and one of messages per hidden layer, two stores of own rows for exact passes, and one to
    recompute from; stores are never in half precision.
    """
    itemsize = _history_itemsize(model, config)
    runs = (2 + _has_messages(split, config)) * split.layers * piece.halo.sum() * model.width * itemsize
    stores = (2 + _keeps_entries(split)) * piece.own.sum() * model.state_bytes
    return np.asarray(runs + stores)


def resident_history_bytes(split: Split, piece: Piece, model: ModelFacts, config: ChunkedConfig) -> NDArray[np.float64]:
    """Memory that every rank's histories take, [ranks]: all of them, or transfer buffers of those on disk."""
    if split.in_memory:
        return history_bytes(split, piece, model, config)
    row_bytes = model.width * model.itemsize
    widest = max(piece.halo.max() * row_bytes, piece.own.max() * model.state_bytes)
    region = widest + len(piece.own) * PAGE  # runs lie on pages of their own
    return np.full(split.layout.num_ranks, _BUFFERS * region)


def _traffic_bytes(split: Split, piece: Piece, model: ModelFacts, config: ChunkedConfig) -> NDArray[np.float64]:
    """Bytes of history that are written or read for every chunk in an epoch, [ranks, K]."""
    itemsize = _history_itemsize(model, config)
    passes = 2 + split.recompute + 2 * _has_messages(split, config)
    runs = np.outer(passes * split.layers, piece.halo * model.width * itemsize)
    entries = np.outer(2 * _keeps_entries(split), piece.own * model.state_bytes)
    return np.asarray(runs + entries)


def _constant_bytes(split: Split, piece: Piece, model: ModelFacts, config: ChunkedConfig) -> NDArray[np.int64]:
    topology = (piece.edges * _EDGE_BYTES + piece.own * _ROW_BYTES + piece.halo * (_ROW_BYTES + _SEND_BYTES)).sum()
    features = _LOADED_CHUNKS * (piece.own + piece.halo).max() * model.num_features * model.itemsize
    history = resident_history_bytes(split, piece, model, config)
    constant = topology + features * (split.stages == 0) + history + _STATE_COPIES * model.parameter_bytes
    constant = constant + piece.own.sum() * model.label_bytes * (split.stages == split.layout.stages - 1)
    return np.asarray(constant.round(), np.int64)


def split_costs(split: Split, facts: GraphFacts, model: ModelFacts, profile: Profile, config: ChunkedConfig) -> Costs:
    """Scale a profile to every rank and chunk of a split. Histories on disk are read ahead and written behind.

    KeyError where `facts` do not know so many parts.
    """
    layout, piece = split.layout, cut_pieces(facts, split.layout.parts)
    work = (piece.own + piece.edges) / (profile.rows + profile.edges)
    rows = (piece.own + piece.halo) / (profile.rows + profile.halo)
    row_bytes, peers = model.width * model.itemsize, layout.parts - 1
    step_bytes = peers * model.parameter_bytes // layout.stages

    def by_unit(values: Sequence[float], scale: NDArray[np.float64]) -> NDArray[np.float64]:
        """[ranks, K]: the sum over a rank's units, the head with the last, times the size of a chunk."""
        sums = [sum(values[unit.start : unit.stop]) for unit in split.units]
        sums[-1] += values[-1]
        return np.outer(sums * layout.parts, scale)

    def most(values: Sequence[int], unit: range) -> int:
        """Of a rank's units, one after the other; the head is the last rank's."""
        return max((*values[unit.start : unit.stop], values[-1] if unit.stop == split.units[-1].stop else 0))

    forward, backward = by_unit(profile.forward_s, work), by_unit(profile.backward_s, work)
    if not split.in_memory:  # half of the traffic in each direction; of computing and the disk the slower one shows
        io_s = _traffic_bytes(split, piece, model, config) / profile.disk_bytes_per_s / 2
        forward, backward = np.maximum(forward, io_s), np.maximum(backward, io_s)
    gradients = [most(profile.gradient_bytes, unit) for unit in split.units]
    exchanged = np.outer(split.layers, piece.mirrors * row_bytes)
    return Costs(
        load_s=np.outer(np.ones(layout.num_ranks), profile.load_s * rows),
        forward_s=forward,
        backward_s=backward,
        weight_s=by_unit(profile.weight_s, work),
        recompute_s=by_unit(profile.forward_s, work),
        # messages to all peers are under way at once: one latency per layer
        exchange_s=exchanged / profile.bytes_per_s + split.layers[:, None] * min(1, peers) * profile.latency_s,
        step_s=step_bytes / profile.bytes_per_s + min(1, peers) * profile.latency_s,
        latency_s=profile.latency_s,
        bytes_per_s=profile.bytes_per_s,
        wire_bytes=_bytes(np.outer(np.ones(layout.num_ranks), piece.own * model.state_bytes)),
        exchange_bytes=_bytes(exchanged),
        step_bytes=step_bytes,
        activation_bytes=_bytes(by_unit(profile.kept_bytes, rows)),
        input_bytes=np.zeros((layout.num_ranks, facts.num_chunks), np.int64),  # in the history tables: constant
        gradient_bytes=_bytes(np.outer(gradients * layout.parts, rows)),
        deferred_bytes=_bytes(np.outer(split.layers, 2 * piece.own * row_bytes)),
        constant_bytes=_constant_bytes(split, piece, model, config),
    )


def _bytes(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return values.round().astype(np.int64)
