"""Draw the mini-batches of whole epochs ahead of time: a graph store in, a trace out.

`itemwise` and `hopwise` give the same bytes; which one works is a matter of speed and memory. A trace is sampled
window by window, and a killed run goes on at the window it was in.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from penstock.sampler.footprint import payload_share, topology_bytes
from penstock.sampler.hopwise import sample_hopwise
from penstock.sampler.itemwise import sample_itemwise
from penstock.storage.budget import Size, available_memory, num_threads, parse_memory
from penstock.storage.deal import Deal
from penstock.storage.graph import GraphStore, SeedSet
from penstock.storage.paths import AnyPath
from penstock.storage.progress import Progress, silent
from penstock.storage.trace import (
    Trace,
    TraceMeta,
    WindowIndex,
    has_window,
    is_complete,
    is_current,
    open_trace,
    publish_trace,
    read_window_index,
)
from penstock.storage.trace_writer import TraceWindowWriter, begin_trace, read_trace_head

Method = Literal["uniform", "labor"]
SampleMode = Literal["auto", "item", "hop"]
MAX_FANOUT = 2**31 - 1  # offsets of a block are int32
_MAX_WINDOW_ITEMS = 64  # enough for packs to share rows; more only makes a killed run redo more


def check_fanouts(value: tuple[int, ...]) -> tuple[int, ...]:
    """Pass fanouts on; ValueError where there are none, or nothing can be drawn by one of them."""
    if not value:
        raise ValueError("fanouts are empty; give one per layer, for example 10,15,20")
    for fanout in value:
        if fanout == 0 or fanout < -1 or fanout > MAX_FANOUT:
            raise ValueError(
                f"a fanout of {fanout} in {list(value)} is not possible; use 1 to {MAX_FANOUT}, or -1 for all"
            )
    return value


class SampleConfig(BaseModel):
    """How to sample: one of `fanouts` (DGL's order, last for the seeds) and `num_neighbors` (PyG's, first for them).

    -1 takes all neighbours. With `weighted` neighbours are drawn in proportion to their edges' weights, and blocks also
    say what each draw counts, to estimate weighted sums over all of them (see `kernels.weigh`). `mode` never changes
    the items; `window_items` None is chosen from memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fanouts: tuple[int, ...] | None = None
    num_neighbors: tuple[int, ...] | None = None
    method: Method = "uniform"
    replace: bool = False
    weighted: bool = False
    batch_size: int = Field(default=1024, ge=1, lt=1 << 31)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    degrees: bool = False
    mode: SampleMode = "auto"
    window_items: int | None = Field(default=None, ge=1)

    @field_validator("fanouts", "num_neighbors")
    @classmethod
    def _check_fanouts(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if value is None else check_fanouts(value)

    @model_validator(mode="after")
    def _check_combination(self) -> "SampleConfig":
        if (self.fanouts is None) == (self.num_neighbors is None):
            given = "both" if self.fanouts is not None else "neither"
            raise ValueError(
                f"{given} of fanouts (last entry for the seeds) and num_neighbors (first entry for the seeds) "
                "given; give one of them"
            )
        if self.method == "labor" and self.replace:
            raise ValueError("method=labor draws without replacement; set replace=false or method=uniform")
        return self

    @property
    def layer_fanouts(self) -> tuple[int, ...]:
        """Fanouts in DGL's order, whichever way they were given."""
        return self.fanouts if self.fanouts is not None else tuple(reversed(self.num_neighbors or ()))


def count_items(graph: GraphStore, split: SeedSet, batch_size: int) -> int:
    """Items of an epoch of a split, or of all nodes, the last one perhaps smaller."""
    return -(-graph.num_seeds(split) // batch_size)


def make_trace_meta(
    graph: GraphStore,
    config: SampleConfig,
    split: SeedSet = "train",
    num_epochs: int = 1,
    *,
    shuffle: bool = True,
    host_memory: int | None = None,
    deal: Deal | None = None,
) -> TraceMeta:
    """Resolve what a trace will hold: all items, or those that a `deal` gives. ValueError where the graph cannot be
    sampled so."""
    if graph.num_seeds(split) == 0:
        raise ValueError(f"{graph.path} has no nodes in its {split} split; choose another split or ingest one")
    if num_epochs < 1:
        raise ValueError(f"num_epochs={num_epochs} samples nothing; use at least 1")
    if config.weighted and graph.edge_weights is None:
        raise ValueError(f"weighted=true, but {graph.path} has no edge weights; ingest them, or set weighted=false")
    items_per_epoch = count_items(graph, split, config.batch_size)
    assert deal is None or deal.epoch_items == items_per_epoch, (deal, items_per_epoch)
    meta = TraceMeta(
        graph=graph.fingerprint,
        num_nodes=graph.num_nodes,
        seed=config.seed,
        fanouts=config.layer_fanouts,
        method=config.method,
        replace=config.replace,
        weighted=config.weighted,
        batch_size=config.batch_size,
        split=split,
        num_epochs=num_epochs,
        items_per_epoch=items_per_epoch if deal is None else deal.own_per_epoch,
        window_items=config.window_items or _MAX_WINDOW_ITEMS,
        degrees=config.degrees,
        shuffle=shuffle,
        deal=deal,
    )
    if config.window_items is None:
        meta = replace(meta, window_items=_choose_window_items(graph, meta, host_memory or available_memory()))
    return meta


def _first_bytes(graph: GraphStore, meta: TraceMeta, host_memory: int) -> int:
    """Size of the first item's payload."""
    return len(next(sample_itemwise(graph, meta, 0, 1, host_memory=host_memory, threads=1)))


def _choose_window_items(graph: GraphStore, meta: TraceMeta, host_memory: int) -> int:
    """As many as fit a share of memory, judged by the first item; never by the number of threads."""
    first_bytes = _first_bytes(graph, meta, host_memory)
    return max(1, min(_MAX_WINDOW_ITEMS, meta.num_items, payload_share(host_memory) // first_bytes))


def estimate_trace_bytes(
    graph: GraphStore, config: SampleConfig, split: SeedSet, num_epochs: int, *, host_memory: int
) -> int:
    """What a trace will take on disk, judged by its first item."""
    config = config.model_copy(update={"window_items": 1})
    meta = make_trace_meta(graph, config, split, num_epochs, shuffle=False)
    return meta.num_items * _first_bytes(graph, meta, host_memory)


def choose_mode(graph: GraphStore, config: SampleConfig, host_memory: int) -> Literal["item", "hop"]:
    """Resolve `auto`: hop by hop where random access to the topology would go to the disk."""
    if config.mode != "auto":
        return config.mode
    return "hop" if topology_bytes(graph) > min(host_memory, available_memory()) else "item"


def sample_window(
    graph: GraphStore,
    out: Path,
    config: SampleConfig,
    meta: TraceMeta,
    window: int,
    *,
    host_memory: int,
    threads: int,
) -> WindowIndex:
    """Sample one window into `out`, or read its index if it is finished. DoesNotFit where the disk is full."""
    if has_window(out, window) and is_current(found := read_window_index(out, window), meta):
        return found
    out.mkdir(parents=True, exist_ok=True)
    sample = sample_hopwise if choose_mode(graph, config, host_memory) == "hop" else sample_itemwise
    first, stop = meta.window_range(window)
    with TraceWindowWriter(out, meta, window) as writer:
        for payload in sample(graph, meta, first, stop, host_memory=host_memory, threads=max(1, threads)):
            writer.append(payload)
    assert writer.index is not None
    return writer.index


def sample_trace(
    graph: GraphStore,
    out: AnyPath,
    config: SampleConfig,
    *,
    split: SeedSet = "train",
    shuffle: bool = True,
    num_epochs: int = 1,
    deal: Deal | None = None,
    host_memory: Size = "1GiB",
    threads: int | None = None,
    progress: Progress = silent,
) -> Trace:
    """Sample `num_epochs` epochs of a split into the trace folder `out`; finished windows are kept.

    With a `deal` only the items of one replica.

    DataError where `out` holds a trace of other settings, naming them; ValueError before anything is written where
    the graph cannot be sampled so.
    """
    out, host_memory, threads = Path(out), parse_memory(host_memory), threads or num_threads()
    begun = read_trace_head(out)
    if begun is not None and config.window_items is None:
        config = config.model_copy(update={"window_items": begun.window_items})  # memory may differ, windows may not
    meta = make_trace_meta(graph, config, split, num_epochs, shuffle=shuffle, host_memory=host_memory, deal=deal)
    begin_trace(out, meta)
    if is_complete(out, meta):
        return open_trace(out)
    num_edges = 0
    for window in range(meta.num_windows):
        progress("sample", window * meta.window_items, meta.num_items, "items", edges=num_edges)
        index = sample_window(graph, out, config, meta, window, host_memory=host_memory, threads=threads)
        num_edges += sum(index.num_edges)
    progress("sample", meta.num_items, meta.num_items, "items", edges=num_edges)
    return publish_trace(out, meta)
