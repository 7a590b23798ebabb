"""Accuracy, F1 and loss counted on the device, and the JSON-lines file that numbers go to.

Legend: B rows, C classes. Counts stay on the device until `Counts.metrics`, so that a GPU need not wait per batch.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from penstock.engine.fixed_order import binary_cross_entropy
from penstock.storage.errors import full_disk_is_clear

MetricName = Literal["accuracy", "micro_f1", "macro_f1", "loss"]
Listener = Callable[[dict[str, Any]], None]


def node_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss: cross entropy for labels int64 [B] (-1 is left out), binary cross entropy for float32 [B, C]."""
    if labels.ndim == 2:
        return binary_cross_entropy(logits.float(), labels)
    total = functional.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Results over `num_nodes` labelled nodes; in a multi-label task accuracy counts nodes with all labels right."""

    accuracy: float
    micro_f1: float
    macro_f1: float
    loss: float
    num_nodes: int

    def to_json(self, prefix: str = "") -> dict[str, float]:
        """As a flat dictionary, each key after `prefix`."""
        return {f"{prefix}{name}": value for name, value in asdict(self).items()}


class Counts:
    """Running counts of right and wrong predictions."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self._right = torch.zeros((), dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._nodes = torch.zeros((), dtype=torch.int64, device=device)
        # rows: true positives, predicted, present
        self._classes = torch.zeros((3, num_classes), dtype=torch.int64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [B, C], labels int64 [B] or float32 [B, C]."""
        if not len(labels):
            return
        if labels.ndim == 2:
            predicted, present = logits > 0, labels > 0.5
            self._right += (predicted == present).all(dim=1).sum()
            self._classes += torch.stack([(predicted & present).sum(0), predicted.sum(0), present.sum(0)])
            self._count(len(labels), logits, labels)
            return
        known = labels >= 0
        best = logits.argmax(dim=1)
        right = (best == labels) & known
        self._right += right.sum()
        # scatter_add and not bincount or boolean indexing: those wait for the device to learn a size
        self._classes[0].scatter_add_(0, best, right.long())
        self._classes[1].scatter_add_(0, best, known.long())
        self._classes[2].scatter_add_(0, labels.clamp(min=0), known.long())
        self._count(known.sum(), logits, labels)

    def _count(self, count: Tensor | int, logits: Tensor, labels: Tensor) -> None:
        self._nodes += count
        self._loss += node_loss(logits, labels).double() * count

    def export(self) -> dict[str, Any]:
        """The counts as plain numbers, to be added to those of other processes."""
        return {
            "right": int(self._right),
            "loss": float(self._loss),
            "nodes": int(self._nodes),
            "classes": self._classes.tolist(),
        }

    def add(self, exported: dict[str, Any]) -> None:
        """Add what another `Counts` of as many classes exported."""
        self._right += exported["right"]
        self._loss += exported["loss"]
        self._nodes += exported["nodes"]
        self._classes += torch.tensor(exported["classes"], dtype=torch.int64, device=self._classes.device)

    def metrics(self) -> Metrics:
        """Read the counts. Macro F1 is the mean over the classes that are present or were predicted."""
        hits, predicted, present = self._classes.double().cpu()
        total = predicted + present
        seen = total > 0
        num_nodes = int(self._nodes)
        return Metrics(
            accuracy=int(self._right) / max(1, num_nodes),
            micro_f1=float(2 * hits.sum() / total.sum().clamp(min=1)),
            macro_f1=float((2 * hits[seen] / total[seen]).mean()) if bool(seen.any()) else 0.0,
            loss=float(self._loss) / max(1, num_nodes),
            num_nodes=num_nodes,
        )


class MetricsWriter:
    """Append one JSON object per line to a file; a context manager.

    Opening cuts the file to its first `keep_bytes`: a resumed run passes what its checkpoint recorded, so that no step
    is in the file twice. `listeners` get every record that is written; they must return fast.
    """

    def __init__(self, path: Path, *, keep_bytes: int = 0, listeners: Sequence[Listener] = ()) -> None:
        self.path, self._listeners = path, listeners
        with full_disk_is_clear(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")
            self._file.truncate(min(keep_bytes, os.fstat(self._file.fileno()).st_size))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._file.close()

    @property
    def num_bytes(self) -> int:
        """Length of the file so far."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, record: dict[str, Any]) -> None:
        """Add a line and hand it to the operating system. ValueError where a number is not finite."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with full_disk_is_clear(self.path):
            self._file.write(line.encode())
            self._file.flush()
        for listener in self._listeners:
            listener(record)
