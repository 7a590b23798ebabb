"""What a user may ask of ingest."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from penstock.storage.graph import FeatureNorm
from penstock.storage.rows import RowDtype


class IngestOptions(BaseModel):
    """How tables become a graph store. Columns whose names are not set may be absent, but features, src and dst."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    undirected: bool = False
    """Add the reverse of every edge and merge duplicates, as DGL and PyG do."""
    self_loops: Literal["keep", "add", "remove"] = "keep"
    """`add`: every node has exactly one, of weight 1, in place of those it had."""
    deduplicate: bool = False
    """Merge edges with equal ends; their weights are added up."""
    feature_dtype: RowDtype = "float32"
    """How features are stored; a value that overflows is refused."""
    feature_norm: FeatureNorm = "none"
    """`row` divides a row by the sum of its magnitudes; `standard` makes every column mean 0 and deviation 1."""
    feature_norm_from: Path | None = None
    """A graph store: normalise as it was, with its constants, to score this graph by a model trained on that one."""
    null_features: Literal["refuse", "zero"] = "refuse"
    """`zero`: a feature that is null or NaN becomes 0, before normalisation."""
    remap_labels: bool | None = None
    """Number the labels that occur, in order; `infer` writes them as given. Default: where they are strings."""
    id_column: str = "id"
    """Node ids, integers or strings; without it nodes are numbered by row. This and all columns: of Parquet tables."""
    feature_column: str = "feature"
    """One column of lists, or of numbers for a single feature."""
    feature_columns: tuple[str, ...] | None = None
    """Several columns of numbers instead, as age,income."""
    feature_prefix: str | None = None
    """Or all columns that begin so."""
    label_column: str = "label"
    """Integers 0..C-1, null or -1 for unknown, or lists of 0 and 1."""
    split_column: str = "split"
    """train, valid (val, validation), test, none or null; without it masks: train_mask, valid_mask, test_mask."""
    src_column: str = "src"
    """Source of an edge."""
    dst_column: str = "dst"
    """Destination of an edge."""
    weight_column: str = "weight"
    """Weight of an edge, at least 0."""
    split_fractions: tuple[float, float, float] | None = None
    """Draw train, valid and test among the labelled nodes, where the input has no split: 0.6,0.2,0.2."""
    split_seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of that draw."""

    @field_validator("split_fractions", "feature_columns", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "IngestOptions":
        given = [name for name in ("feature_columns", "feature_prefix") if getattr(self, name) is not None]
        if "feature_column" in self.model_fields_set:
            given.append("feature_column")
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(given)}: each says where the features are")
        if self.split_fractions is not None:
            if not all(0 <= part <= 1 for part in self.split_fractions) or sum(self.split_fractions) > 1 + 1e-9:
                raise ValueError(f"split_fractions={self.split_fractions} must be at least 0 and add up to at most 1")
        return self

    def check_source(self, kind: str) -> None:
        """ValueError where an option that was set says nothing of a source of this kind."""
        columns = [
            name for name in self.model_fields_set if name.startswith("feature_column") or name.endswith("_column")
        ]
        columns += [name for name in ("feature_prefix",) if name in self.model_fields_set]
        if kind != "parquet" and columns:
            raise ValueError(
                f"{', '.join(sorted(columns))} name columns of Parquet tables, this source is {kind}; drop them"
            )
        if "split_seed" in self.model_fields_set and self.split_fractions is None:
            raise ValueError("split_seed is the seed of split_fractions, which is not set; set both or neither")

    @property
    def merges(self) -> bool:
        """Whether edges with equal ends become one."""
        return self.deduplicate or self.undirected
