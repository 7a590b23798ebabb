"""How full-graph training is split, scheduled and approximated."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

GradientMode = Literal["stale", "surrogate", "gnnpipe", "drop", "mix"]
BackendName = Literal["threads", "processes", "ray"]

GNNPIPE_PERIOD = 23  # epochs; REVERSE_PERIOD in the authors' code


class ChunkedConfig(BaseModel):
    """Full-graph training over `chunks`, in `stages` times `parts` ranks.

    `gradient_mode` says what backward sees of chunks that it has not done yet: last epoch's gradients (`stale`),
    nothing (`surrogate`), nothing but twice what it has done (`gnnpipe`), `mix_beta` times last epoch's (`mix`), or no
    gradient from any other chunk (`drop`), which alone allows several `updates_per_epoch`. Histories start `exact` or
    `zero`, stay as they are for `history_period` epochs, and are made exact every `refresh_every` epochs (0: never).
    `gnnpipe` starts from zero and keeps histories for 23 epochs unless told otherwise. `cycle_orders` distinct chunk
    orders are cycled. `light` checkpoints have no histories and start from exact ones. `devices` (ranks in all) lets
    the planner choose stages and parts. A rank whose peer is silent for `timeout_s` fails; a rank that died or failed
    so ends the run, or, up to `retries` times, all ranks start anew from the newest checkpoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    chunks: Annotated[int, Field(ge=1)] = 32
    stages: Annotated[int, Field(ge=1)] = 1
    parts: Annotated[int, Field(ge=1)] = 1
    devices: Annotated[int, Field(ge=1)] | None = None
    backend: BackendName = "threads"
    partition: Literal["auto", "metis", "ldg", "fennel", "random"] = "auto"
    partition_seed: Annotated[int, Field(ge=0)] = 0
    gradient_mode: GradientMode = "stale"
    mix_beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    updates_per_epoch: Annotated[int, Field(ge=1)] = 1
    history_period: Annotated[int, Field(ge=1)] | None = None
    history_init: Literal["exact", "zero"] | None = None
    history_dtype: Literal["float32", "bfloat16"] = "float32"
    history_storage: Literal["auto", "memory", "mmap", "disk"] = "auto"
    push: Literal["copy", "ema"] = "copy"
    ema_gamma: Annotated[float, Field(gt=0, le=1)] = 0.9
    refresh_every: Annotated[int, Field(ge=0)] = 0
    recompute: Literal["auto", "always", "never"] = "auto"
    defer_weights: bool = True
    shuffle_chunks: bool = True
    cycle_orders: Annotated[int, Field(ge=1)] = 4
    checkpoint: Literal["full", "light"] = "full"
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    retries: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _is_consistent(self) -> "ChunkedConfig":
        if self.updates_per_epoch > 1 and self.gradient_mode != "drop":
            raise ValueError(
                f"updates_per_epoch={self.updates_per_epoch} with gradient_mode={self.gradient_mode}: gradients "
                "between chunks need one set of weights per epoch; use gradient_mode drop, or one update"
            )
        if self.updates_per_epoch > self.chunks:
            raise ValueError(f"updates_per_epoch={self.updates_per_epoch} exceeds chunks={self.chunks}; lower it")
        if (
            self.devices is not None
            and (self.stages, self.parts) != (1, 1)
            and self.stages * self.parts != self.devices
        ):
            raise ValueError(
                f"devices={self.devices} is not stages={self.stages} x parts={self.parts}; give one or the other"
            )
        return self

    @property
    def period(self) -> int:
        """Epochs for which a history stays as it is."""
        return self.history_period or (GNNPIPE_PERIOD if self.gradient_mode == "gnnpipe" else 1)

    @property
    def starts_exact(self) -> bool:
        """Whether histories are filled by an exact pass before the first epoch."""
        return (self.history_init or ("zero" if self.gradient_mode == "gnnpipe" else "exact")) == "exact"

    @property
    def staleness_bound(self) -> int:
        """Oldest age in epochs that a historical row may have when it is read."""
        return self.period

    def message_weights(self) -> tuple[float, float]:
        """Factors of gradients from chunks that are done in this epoch, and of last epoch's from the others."""
        table: dict[str, tuple[float, float]] = {
            "stale": (1.0, 1.0),
            "surrogate": (1.0, 0.0),
            "gnnpipe": (2.0, 0.0),
            "drop": (0.0, 0.0),
            "mix": (1.0, self.mix_beta),
        }
        return table[self.gradient_mode]

    def resolved(self, stages: int, parts: int) -> "ChunkedConfig":
        """The same with the ranks that the planner chose."""
        update: dict[str, Any] = {"stages": stages, "parts": parts, "devices": None}
        return self.model_copy(update=update)
