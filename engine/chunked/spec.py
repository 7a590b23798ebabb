"""What a rank is told when it starts, and what it answers: plain values that cross threads, pipes and Ray alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.layout import Layout
from penstock.engine.models import ModelConfig
from penstock.engine.trainer import TrainConfig
from penstock.storage.graph import Split
from penstock.storage.rows import RowDtype


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpec:
    """Where stage 0 of one part reads features from: all of its rows in memory, through `row_dtype`, or packs.

    `packs` have the chunks of `cycle_orders` epochs in the order in which they are loaded, `exact_packs`
    all chunks in order.
    """

    kind: Literal["memory", "packs"]
    row_dtype: RowDtype | None = None
    packs: Path | None = None
    exact_packs: Path | None = None
    items_per_epoch: int = 0
    num_epochs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """One rank of a run. `units` are those of every stage: 0 is what reads features, then one per hidden layer.

    `history_memory` and `feed_memory` are bytes for this rank. `weights` is a safetensors file that all ranks start
    from.
    """

    rank: int
    layout: Layout
    units: tuple[tuple[int, int], ...]
    first_hidden: int
    graph: Path
    chunks: Path
    scratch: Path
    weights: Path
    model: ModelConfig
    train: TrainConfig
    chunked: ChunkedConfig
    features: FeatureSpec
    recompute: bool
    history_memory: int
    feed_memory: int
    threads: int = 1
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    poison: bool = False

    @property
    def timeout_s(self) -> float:
        """Seconds after which silence is an error."""
        return self.chunked.timeout_s

    @property
    def place(self) -> str:
        """The rank's name, like `rank 3 (stage 1 of 0..1, part 1 of 0..1)`, and its replica where there are several."""
        layout = self.layout
        stage, part, replica = layout.stage_of(self.rank), layout.part_of(self.rank), layout.replica_of(self.rank)
        name = f"rank {self.rank} (stage {stage} of 0..{layout.stages - 1}, part {part} of 0..{layout.parts - 1}"
        return name + (f", replica {replica} of 0..{layout.replicas - 1})" if layout.replicas > 1 else ")")

    @property
    def torch_dtype(self) -> torch.dtype:
        """What activations are computed in."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def replica(self) -> int:
        """The replica that this rank is of."""
        return self.layout.replica_of(self.rank)

    @property
    def first_unit(self) -> int:
        """The first unit of this rank's stage."""
        return self.units[self.layout.stage_of(self.rank)][0]

    @property
    def last_unit(self) -> int:
        """The unit past the last of this rank's stage."""
        return self.units[self.layout.stage_of(self.rank)][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What a rank did in one epoch. Spans are seconds since the rank began it, one per action.

    `loss` is the sum over the rank's own training nodes, already divided as the gradient was.
    """

    rank: int
    loss: float
    kinds: tuple[str, ...]
    chunks: tuple[int, ...]
    spans: NDArray[np.float64]
    bytes_sent: int
    wait_s: float
    history_read_bytes: int
    history_written_bytes: int
    history_stall_s: float
    oldest_row: int
    mean_age: float
    peak_rss_bytes: int
    host: str = ""

    @property
    def busy_s(self) -> float:
        """Seconds in actions, less what was spent waiting for others."""
        return float((self.spans[:, 1] - self.spans[:, 0]).sum()) - self.wait_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactReport:
    """What a rank found in an exact pass: counts by split (last stage only), and how far histories were off by
    layer."""

    rank: int
    counts: dict[Split, dict[str, Any]]
    history_errors: dict[int, float]
    bytes_sent: int
