"""Synthetic graphs of any size, written front to back under a memory budget.

See `kernels.synthetic` for the model. Nothing is remembered between chunks but the file position, so memory depends on
the budget and not on the size, and the bytes do not depend on the budget.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from penstock.kernels.parallel import parallel_for
from penstock.kernels.rng import fold
from penstock.kernels.synthetic import (
    draw_centroids,
    draw_degrees,
    draw_features,
    draw_labels,
    draw_sources,
    draw_splits,
    scatter_keys,
)
from penstock.storage.budget import Size, num_threads, parse_memory, require_free_disk
from penstock.storage.errors import DoesNotFit
from penstock.storage.graph import FEATURES, SPLITS, GraphMeta, GraphStore, id_dtype
from penstock.storage.manifest import FileEntry
from penstock.storage.npyfile import NpyWriter, drop_pages, open_npy
from penstock.storage.paths import AnyPath
from penstock.storage.progress import Progress, silent
from penstock.storage.resumable import StoreBuild, begin_build
from penstock.storage.rows import RowDtype, RowFormat, encode_rows

_CENTROID_NORM = 4.0  # in units of the noise: two types are told apart from one row with 0.2 % error
_MAX_DEGREE = 1 << 17  # bounds the buffer of one node's sources, whatever the size of the graph
_MIN_MEMORY = 4 << 20
_CHUNK_BYTES = 32 << 20  # larger chunks are not faster


class GenerateConfig(BaseModel):
    """What to generate. Degrees follow d^-exponent, in and out; a source has its destination's class as hidden type
    with probability `homophily`; the rest of the nodes after the three fractions is in no split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_nodes: int = Field(default=100_000, ge=8)
    avg_degree: float = Field(default=16.0, ge=1.0)
    num_features: int = Field(default=128, ge=1)
    num_classes: int = Field(default=8, ge=2, le=1 << 16)
    exponent: float = Field(default=2.5, gt=2.05, le=8.0)
    homophily: float = Field(default=0.6, ge=0.0, lt=1.0)
    noise: float = Field(default=1.0, ge=0.0)
    train: float = Field(default=0.1, ge=0.0, le=1.0)
    valid: float = Field(default=0.02, ge=0.0, le=1.0)
    test: float = Field(default=0.05, ge=0.0, le=1.0)
    feature_dtype: RowDtype = "float32"
    seed: int = Field(default=0, ge=0, lt=1 << 63)

    @model_validator(mode="after")
    def _check(self) -> "GenerateConfig":
        if self.train + self.valid + self.test > 1 + 1e-9:
            raise ValueError(
                f"train + valid + test = {self.train + self.valid + self.test:g} exceeds 1; lower one of them"
            )
        if self.num_classes * 4 > self.num_nodes:
            raise ValueError(
                f"num_classes={self.num_classes} needs at least {4 * self.num_classes} nodes, not num_nodes="
                f"{self.num_nodes}; use as many or more, or num_classes={self.num_nodes // 4} or fewer"
            )
        if self.avg_degree > self.max_degree / 2:
            raise ValueError(
                f"avg_degree={self.avg_degree:g} exceeds {self.max_degree / 2:g}, half the largest degree of "
                f"num_nodes={self.num_nodes}; use a smaller avg_degree, or more nodes"
            )
        return self

    @property
    def max_degree(self) -> int:
        """The largest in-degree that is drawn."""
        return min(_MAX_DEGREE, self.num_nodes // 2)


def smallest_degree(average: float, exponent: float, largest: int) -> float:
    """Find x so that floor(x * u^(-1/(exponent-1))), cut at `largest`, has this mean for uniform u."""
    k = np.arange(1, largest + 1, dtype=np.float64)
    low, high = 0.0, float(largest)
    for _ in range(60):
        middle = (low + high) / 2
        mean = np.minimum(1.0, (middle / k) ** (exponent - 1.0)).sum()
        low, high = (middle, high) if mean < average else (low, middle)
    return high


class _Generator:
    """Writes the files of one store; `chunk_bytes` bounds each buffer."""

    def __init__(self, build: StoreBuild, config: GenerateConfig, chunk_bytes: int, progress: Progress) -> None:
        self.build, self.config, self.chunk_bytes, self.progress = build, config, chunk_bytes, progress
        self.threads = num_threads()
        self.key = np.uint64(fold(np.uint64(0), np.uint64(config.seed)))
        self.keys = np.empty(6, np.uint64)
        scatter_keys(self.key, config.num_nodes, self.keys)

    def _stream(
        self, name: str, writer: NpyWriter, row_bytes: int, fill: Callable[[int, int], NDArray[Any]]
    ) -> FileEntry:
        """Append `fill(lo, hi)` over all nodes, in chunks of as many rows as the budget holds."""
        total = self.config.num_nodes
        rows = max(1, min(total, self.chunk_bytes // row_bytes))
        with writer:
            for lo in range(0, total, rows):
                hi = min(total, lo + rows)
                writer.append(fill(lo, hi))
                self.progress(f"generate {name}", hi, total, "rows")
        assert writer.entry is not None
        return writer.entry

    def write_indptr(self) -> tuple[dict[str, Any], tuple[FileEntry, ...]]:
        config, total = self.config, 0
        smallest = smallest_degree(config.avg_degree, config.exponent, config.max_degree)
        power = 1.0 / (config.exponent - 1.0)
        buffer = np.empty(max(1, min(config.num_nodes, self.chunk_bytes // 8)), np.int64)

        def fill(lo: int, hi: int) -> NDArray[np.int64]:
            nonlocal total
            out = buffer[: hi - lo]
            draw_degrees(self.key, smallest, power, config.max_degree, lo, hi, out)
            np.cumsum(out, out=out)
            out += total
            total = int(out[-1])
            return out

        writer = NpyWriter(self.build.out / "indptr.npy", np.int64, (config.num_nodes + 1,))
        with writer:
            writer.append(np.zeros(1, np.int64))
            for lo in range(0, config.num_nodes, len(buffer)):
                writer.append(fill(lo, min(config.num_nodes, lo + len(buffer))))
        assert writer.entry is not None
        return {"num_edges": total}, (writer.entry,)

    def write_indices(self, num_edges: int) -> tuple[dict[str, Any], tuple[FileEntry, ...]]:
        config = self.config
        indptr = open_npy(self.build.out / "indptr.npy")
        dtype = id_dtype(config.num_nodes)
        buffer = np.empty(max(self.chunk_bytes // dtype.itemsize, config.max_degree), dtype)
        power = 1.0 / (1.0 - 1.0 / (config.exponent - 1.0))
        num_nodes = config.num_nodes
        with NpyWriter(self.build.out / "indices.npy", dtype, (num_edges,)) as writer:
            lo = 0
            while lo < num_nodes:
                base = int(indptr[lo])
                hi = int(np.searchsorted(indptr, base + len(buffer), side="right")) - 1
                hi = min(max(hi, lo + 1), num_nodes)

                def fill(first: int, last: int, lo: int = lo, base: int = base) -> None:
                    draw_sources(
                        *(self.key, num_nodes, config.num_classes, config.homophily, power, self.keys),
                        *(indptr, base, lo + first, lo + last, buffer),
                    )

                parallel_for(fill, hi - lo, self.threads)
                done = int(indptr[hi])
                writer.append(buffer[: done - base])
                drop_pages(indptr)  # else its pages would be memory that grows with the graph
                lo = hi
                self.progress("generate edges", done, num_edges, "edges")
        assert writer.entry is not None
        return {}, (writer.entry,)

    def write_features(self) -> tuple[dict[str, Any], tuple[FileEntry, ...]]:
        config = self.config
        row_format = RowFormat(dtype=config.feature_dtype, width=config.num_features)
        centroids = np.empty((config.num_classes, config.num_features), np.float32)
        draw_centroids(self.key, _CENTROID_NORM, centroids)
        row_bytes = 4 * config.num_features
        buffer = np.empty((max(1, min(config.num_nodes, self.chunk_bytes // row_bytes)), config.num_features), "<f4")

        def fill(lo: int, hi: int) -> NDArray[Any]:
            def part(first: int, last: int) -> None:
                out = buffer[first:last]
                draw_features(
                    self.key, config.num_nodes, centroids, config.noise, self.keys, lo + first, lo + last, out
                )

            parallel_for(part, hi - lo, self.threads)
            return encode_rows(buffer[: hi - lo], row_format)

        shape = (config.num_nodes, row_format.array_width)
        writer = NpyWriter(self.build.out / FEATURES, row_format.array_dtype, shape, blocks=True)
        entry = self._stream("features", writer, row_bytes, fill)
        assert writer.sums_entry is not None
        return {}, (entry, writer.sums_entry)

    def write_labels(self) -> tuple[dict[str, Any], tuple[FileEntry, ...]]:
        def fill(lo: int, hi: int) -> NDArray[np.int64]:
            out = np.empty(hi - lo, np.int64)
            draw_labels(self.key, self.config.num_classes, lo, hi, out)
            return out

        writer = NpyWriter(self.build.out / "labels.npy", np.int64, (self.config.num_nodes,))
        return {}, (self._stream("labels", writer, 8, fill),)

    def write_splits(self) -> tuple[dict[str, Any], tuple[FileEntry, ...]]:
        """Two passes per split, one to count and one to write: ids stream too."""
        return {}, tuple(self._write_split(code) for code in range(len(SPLITS)))

    def _write_split(self, code: int) -> FileEntry:
        config = self.config
        rows = max(1, min(config.num_nodes, self.chunk_bytes // 16))
        codes = np.empty(rows, np.int8)

        def members(lo: int) -> NDArray[np.int64]:
            hi = min(config.num_nodes, lo + rows)
            draw_splits(self.key, config.train, config.valid, config.test, lo, hi, codes[: hi - lo])
            return np.flatnonzero(codes[: hi - lo] == code) + lo

        starts = range(0, config.num_nodes, rows)
        count = sum(len(members(lo)) for lo in starts)
        dtype = id_dtype(config.num_nodes)
        with NpyWriter(self.build.out / f"{SPLITS[code]}_ids.npy", dtype, (count,)) as writer:
            for lo in starts:
                writer.append(members(lo).astype(dtype))
        assert writer.entry is not None
        return writer.entry


_PLAIN = GenerateConfig()


def _store_bytes(config: GenerateConfig) -> int:
    row_format = RowFormat(dtype=config.feature_dtype, width=config.num_features)
    edge_bytes = config.avg_degree * id_dtype(config.num_nodes).itemsize
    return int(config.num_nodes * (row_format.row_bytes + edge_bytes + 8 + 8 + 8))


def generate_graph(
    out: AnyPath,
    config: GenerateConfig = _PLAIN,
    *,
    host_memory: Size = "1GiB",
    progress: Progress = silent,
) -> GraphStore:
    """Write a synthetic graph store, or return it where it is there already.

    The bytes depend on `config` alone. ValueError where `out` holds something else; DoesNotFit where `host_memory` is
    below 4 MiB plus one row, or the disk is too small, before anything is written.
    """
    out, host_memory = Path(out), parse_memory(host_memory)
    needed = _MIN_MEMORY + 4 * (4 * config.num_features)
    if host_memory < needed:
        raise DoesNotFit(
            f"host_memory={host_memory} is too small to generate this graph; use --host-memory {needed} or more"
        )
    identity = {"kind": "generate", "version": 1, "config": config.model_dump(mode="json")}
    build = begin_build(out, identity)
    if isinstance(build, GraphStore):
        return build
    require_free_disk(out, _store_bytes(config), "this graph")
    writer = _Generator(build, config, min(_CHUNK_BYTES, host_memory // 4), progress)
    num_edges = int(build.step("indptr", writer.write_indptr)["num_edges"])
    build.step("indices", lambda: writer.write_indices(num_edges))
    build.step("features", writer.write_features)
    build.step("labels", writer.write_labels)
    build.step("splits", writer.write_splits)
    meta = GraphMeta(
        num_nodes=config.num_nodes,
        num_edges=num_edges,
        num_features=config.num_features,
        feature_dtype=config.feature_dtype,
        num_classes=config.num_classes,
        multi_label=False,
        has_edge_weights=False,
        original_ids="dense",
        source=f"generated with seed {config.seed}",
    )
    return build.publish(meta)
