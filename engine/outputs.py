"""What the outputs of a model mean, and what it was fed: facts of the graph that it was trained on.

They are kept in `model.json`, since a model may score another graph: one without labels, or whose classes are numbered
otherwise, or whose features were normalised by other constants.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.storage.errors import DataError
from penstock.storage.export import ColumnType
from penstock.storage.graph import GraphStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """`class_values` are the user's labels of the classes, None for 0..C-1; `features` is their normalisation."""

    multi_label: bool
    class_values: list[int] | list[str] | None
    features: str

    @classmethod
    def of(cls, graph: GraphStore) -> "Outputs":
        """Those of a model that is trained on `graph`."""
        return cls(multi_label=graph.meta.multi_label, class_values=graph.class_values, features=graph.norm_identity)

    @classmethod
    def from_json(cls, value: dict[str, Any] | None, graph: GraphStore) -> "Outputs":
        """Those that a model was saved with, or of `graph` where it was saved without."""
        return cls.of(graph) if value is None else cls(**value)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def column(self, num_classes: int) -> ColumnType:
        """Type of the column of predictions."""
        if self.multi_label:
            return "uint8", num_classes
        return ("string" if self.class_values and isinstance(self.class_values[0], str) else "int64"), 0

    def predictions(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        """The best class [n] as the user's label, or whether each label applies uint8 [n, C]."""
        if self.multi_label:
            flags: NDArray[np.uint8] = (logits > 0).astype(np.uint8)
            return flags
        best: NDArray[np.int64] = logits.argmax(axis=1).astype(np.int64)
        if self.class_values is None:
            return best
        values = np.array(self.class_values, object if isinstance(self.class_values[0], str) else np.int64)
        named: NDArray[Any] = values[best]
        return named

    def check_features(self, graph: GraphStore) -> None:
        """DataError where the features of a graph do not mean what those meant that the model was trained on."""
        if graph.norm_identity != self.features:
            kind = self.features.split(" ")[0]
            remedy = (
                "ingest it without feature_norm"
                if kind == "none"
                else "ingest it with --set feature_norm_from=G, where G is the graph that the model was trained on"
            )
            raise DataError(
                f"{graph.path} was ingested with feature_norm={graph.meta.feature_norm}, the model was trained on "
                f"feature_norm={kind}{' with other constants' if kind == graph.meta.feature_norm else ''}; {remedy}"
            )
