"""What stage 0 reads: the features of a chunk's own rows, and of its halo where layer 0 aggregates them.

In memory every chunk's rows are gathered once and handed out as they are; from packs they are streamed by the same feed
as sampled mini-batches, in the order in which the schedule loads chunks.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine.chunked.spec import FeatureSpec
from penstock.engine.feed import open_pack_feed
from penstock.engine.minibatch import MiniBatch
from penstock.storage.chunks import PartChunks
from penstock.storage.graph import GraphStore
from penstock.storage.rows import RowDtype, RowFormat, decode_rows
from penstock.storage.table import FeatureTable

_PIECE_BYTES = 16 << 20  # of features gathered at once: two reads of the table
TRAIN_SHARE = 0.6  # of the feed's memory; the rest is for exact passes, whose packs have no tier


class FeatureSource(Protocol):
    """Hands out the features of chunks."""

    def begin(self, epoch: int | None) -> None:
        """Start the loads of an epoch, or of an exact pass (None)."""

    def load(self, chunk: int) -> Tensor:
        """Features [rows, F] of the next chunk, valid until the next load."""


def _node_ids(part: PartChunks, chunk: int, halo: bool) -> NDArray[np.int64]:
    found = part.chunk(chunk)
    return np.concatenate([found.node_ids, found.halo_ids]) if halo else np.array(found.node_ids)


def _gather(table: FeatureTable, row_format: RowFormat, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Rows of any ids, in pieces: beside them little memory is taken, also where one chunk is the whole graph."""
    rows = np.empty((len(ids), row_format.width), np.float32)
    order = np.argsort(ids, kind="stable")
    step = max(1, _PIECE_BYTES // max(1, rows.strides[0]))
    for lo in range(0, len(ids), step):
        piece = order[lo : lo + step]
        raw = np.empty((len(piece), row_format.row_bytes), np.uint8)
        table.gather(ids[piece], raw)
        rows[piece] = decode_rows(raw, row_format)
    return rows


class MemoryFeatures:
    """Every chunk's features, gathered once: (1 + halo replication) x N x F values where layer 0 reads the halo."""

    def __init__(
        self,
        graph: GraphStore,
        part: PartChunks,
        *,
        halo: bool,
        dtype: torch.dtype,
        device: torch.device,
        row_dtype: RowDtype | None = None,
    ) -> None:
        self._chunks: list[Tensor] = []
        row_format = RowFormat(dtype=row_dtype or graph.meta.feature_dtype, width=graph.meta.num_features)
        with FeatureTable(graph, row_format) as table:
            for c in range(part.num_chunks):
                rows = _gather(table, row_format, _node_ids(part, c, halo))
                self._chunks.append(torch.from_numpy(rows).to(device, dtype))

    def begin(self, epoch: int | None) -> None:
        """Any order will do."""

    def load(self, chunk: int) -> Tensor:
        """See FeatureSource."""
        return self._chunks[chunk]


class PackFeatures:
    """Features streamed from packs; every load has to be the one that the trace has next."""

    def __init__(
        self,
        spec: FeatureSpec,
        graph: GraphStore,
        part: PartChunks,
        *,
        host_memory: int,
        threads: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._spec, self._graph, self._part = spec, graph, part
        self._host_memory, self._threads, self._dtype, self._device = host_memory, threads, dtype, device
        self._train, self._exact = ExitStack(), ExitStack()
        self._train_batches: Iterator[MiniBatch] = iter(())
        self._batches = self._train_batches
        self._next_epoch = -1

    def _open(self, stack: ExitStack, path: Path | None, start: int, stop: int, share: float) -> Iterator[MiniBatch]:
        assert path is not None, "packs were not prepared"
        feed = open_pack_feed(
            path,
            self._graph,
            start_step=start,
            stop_step=stop,
            host_memory=int(self._host_memory * share),
            device=self._device,
            threads=self._threads,
        )
        return iter(stack.enter_context(feed))

    def begin(self, epoch: int | None) -> None:
        """See FeatureSource. The feed of the epochs stays open over exact passes, with its tier."""
        self._exact.close()
        spec, size = self._spec, self._spec.items_per_epoch
        if epoch is None:
            self._batches = self._open(self._exact, spec.exact_packs, 0, self._part.num_chunks, 1 - TRAIN_SHARE)
            return
        if epoch != self._next_epoch:
            self._train.close()
            steps = (epoch * size, spec.num_epochs * size)
            self._train_batches = self._open(self._train, spec.packs, *steps, TRAIN_SHARE)
        self._batches, self._next_epoch = self._train_batches, epoch + 1

    def load(self, chunk: int) -> Tensor:
        """See FeatureSource. RuntimeError where the packs have another chunk next."""
        batch = next(self._batches, None)
        ids = self._part.chunk(chunk).node_ids
        if batch is None or batch.num_seeds != len(ids) or int(batch.input_ids[0]) != int(ids[0]):
            raise RuntimeError(f"the packs of {self._spec.packs} do not have chunk {chunk} next; pack again (--force)")
        return batch.features.to(self._dtype)

    def close(self) -> None:
        """Stop reading."""
        self._exact.close()
        self._train.close()


@contextmanager
def open_features(
    spec: FeatureSpec,
    graph: GraphStore,
    part: PartChunks,
    *,
    halo: bool,
    host_memory: int,
    threads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[FeatureSource]:
    """Open what `spec` says, for one part."""
    if spec.kind == "memory":
        yield MemoryFeatures(graph, part, row_dtype=spec.row_dtype, halo=halo, dtype=dtype, device=device)
        return
    packs = PackFeatures(spec, graph, part, host_memory=host_memory, threads=threads, dtype=dtype, device=device)
    try:
        yield packs
    finally:
        packs.close()
