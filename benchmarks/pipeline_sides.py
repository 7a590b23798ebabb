"""The sides of `penstock bench pipeline`: the same training, spread over ranks in some way, timed for one epoch.

Every turn starts the ranks anew, as processes, from the same weights and cold histories, so that only one side's memory
is taken at a time. The first epochs of a turn warm up: they compile kernels, transpose blocks and grow the heap; the
last is timed.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from penstock.engine.chunked.backend import Backend, OpenBackend
from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.processes import open_processes
from penstock.engine.chunked.schedule import chunk_order, plan_epoch
from penstock.engine.chunked.setup import make_specs
from penstock.engine.chunked.spec import FeatureSpec, RankReport, RankSpec
from penstock.engine.chunked.trainer import initial_weights
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.trainer import TrainConfig
from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.write import write_chunks
from penstock.storage.budget import GIB, available_memory
from penstock.storage.chunks import ChunkStore
from penstock.storage.graph import GraphStore

_EPOCHS = 3  # of a turn: the heap still grows in the second
_turns = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the timed epoch of a turn came to, and the weights after it."""

    epoch_s: float
    reports: tuple[RankReport, ...]
    weights: dict[str, Tensor]

    @property
    def sent_bytes(self) -> int:
        """Between all ranks, the sums of weight gradients over parts among them."""
        return sum(report.bytes_sent for report in self.reports)

    @property
    def peak_rss_bytes(self) -> int:
        """The largest resident size of a rank so far."""
        return max(report.peak_rss_bytes for report in self.reports)

    @property
    def moved_bytes(self) -> tuple[int, int]:
        """Bytes of history read from disk and written to it."""
        reports = self.reports
        return sum(r.history_read_bytes for r in reports), sum(r.history_written_bytes for r in reports)


@contextmanager
def kept_heap() -> Iterator[None]:
    """Let processes that start meanwhile keep the memory that they free.

    glibc maps what is above 32 MiB anew every time: the rows of a part of the graph, but not those of a chunk. It made
    graph parallel a fifth slower, and has nothing to do with it.
    """
    names = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all sides of a case share. `hidden` is also the width of histories."""

    graph: GraphStore
    folder: Path
    layers: int = 16
    hidden: int = 64
    open_backend: OpenBackend = field(default=open_processes)

    @property
    def model(self) -> ModelConfig:
        """GCN with residuals and layer norms, its first layer on features and `layers` on hidden rows.

        Without dropout, which takes the same time per row on every side.
        """
        kind: dict[str, Any] = {"kind": "gcn", "residual": True, "norm": "layer", "dropout": 0.0}
        return ModelConfig(num_layers=self.layers + 1, hidden=self.hidden, **kind)

    def cut(self, chunks: int, parts: int = 1) -> ChunkStore:
        """Cut the graph, once."""
        config = PartitionConfig(chunks=chunks, parts=parts)
        out = self.folder / f"chunks-{self.graph.num_nodes}-{chunks}x{parts}"
        return write_chunks(self.graph, out, config, host_memory=available_memory() // 2, threads=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One way to train: chunks, stages, parts, and where histories lie. `history_memory` is bytes per rank."""

    setting: Setting
    chunks: int
    stages: int = 1
    parts: int = 1
    recompute: bool = False
    history_memory: int = 64 * GIB

    def store(self) -> ChunkStore:
        """The chunks."""
        return self.setting.cut(self.chunks, self.parts)

    def specs(self, scratch: Path) -> list[RankSpec]:
        """One per rank; each has one thread."""
        setting, graph = self.setting, self.setting.graph
        torch.manual_seed(0)
        model = build_model(setting.model, graph.meta.num_features, graph.meta.num_classes)
        return make_specs(
            graph=graph,
            chunks=self.store(),
            scratch=scratch,
            weights=initial_weights(scratch / "initial.safetensors", model),
            model=model,
            model_config=setting.model,
            train=TrainConfig(epochs=_EPOCHS, lr=1e-3),
            chunked=ChunkedConfig(chunks=self.chunks, stages=self.stages, parts=self.parts),
            features=[FeatureSpec(kind="memory")] * self.parts,
            recompute=self.recompute,
            history_memory=self.history_memory,
        )

    def turn(self) -> Turn:
        """Start the ranks, train, and end them."""
        specs = self.specs(self.setting.folder / f"turn-{next(_turns):03d}")
        with self.setting.open_backend(specs) as ranks:
            ranks.call("start_cold")
            for epoch in range(_EPOCHS):
                began = perf_counter()
                reports = _train_epoch(ranks, specs, epoch)
                epoch_s = perf_counter() - began
            weights: dict[str, Tensor] = {}
            for part in ranks.call("weights", [(False,)] * len(specs)):
                weights |= part
        return Turn(epoch_s=epoch_s, reports=tuple(reports), weights=weights)


def _train_epoch(ranks: Backend, specs: Sequence[RankSpec], epoch: int) -> list[RankReport]:
    config = specs[0].chunked
    plan = plan_epoch(
        specs[0].layout,
        epoch=epoch,
        order=chunk_order(0, epoch, config.chunks, config.cycle_orders),
        updates=1,
        gradient_mode=config.gradient_mode,
        recompute=specs[0].recompute,
        defer_weights=config.defer_weights,
    )
    found: list[RankReport] = ranks.call("train_epoch", [(plan, (specs[0].train.lr,))] * len(specs))
    return found
