"""What a user may ask of ingest."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from penstock.storage.rows import RowDtype


class IngestOptions(BaseModel):
    """How tables become a graph store.

    `undirected` adds the reverse of every edge and merges duplicates, as DGL and PyG do. `deduplicate` merges edges
    with equal ends; the weights of merged edges are added up. `self_loops` keeps them as they are, removes all, or
    adds: then every node has exactly one, of weight 1, in place of those it had. `split_fractions` draws train, valid
    and test where the input has no split. Column names apply to Parquet; columns whose names are not set may be
    absent, but for features, src and dst.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    undirected: bool = False
    self_loops: Literal["keep", "add", "remove"] = "keep"
    deduplicate: bool = False
    feature_dtype: RowDtype = "float32"
    id_column: str = "id"
    feature_column: str = "feature"
    feature_columns: tuple[str, ...] | None = None
    feature_prefix: str | None = None
    label_column: str = "label"
    split_column: str = "split"
    src_column: str = "src"
    dst_column: str = "dst"
    weight_column: str = "weight"
    split_fractions: tuple[float, float, float] | None = None
    split_seed: int = Field(default=0, ge=0, lt=1 << 63)

    @model_validator(mode="after")
    def _check(self) -> "IngestOptions":
        given = [name for name in ("feature_columns", "feature_prefix") if getattr(self, name) is not None]
        if "feature_column" in self.model_fields_set:
            given.append("feature_column")
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(given)}: each says where the features are")
        if self.split_fractions is not None:
            if min(self.split_fractions) < 0 or sum(self.split_fractions) > 1 + 1e-9:
                raise ValueError(f"split_fractions={self.split_fractions} must be at least 0 and add up to at most 1")
        return self

    @property
    def merges(self) -> bool:
        """Whether edges with equal ends become one."""
        return self.deduplicate or self.undirected
