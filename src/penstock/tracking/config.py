"""What is tracked."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator

TrackerName = Literal["tensorboard", "mlflow", "wandb"]


class TrackConfig(BaseModel):
    """Trackers that get every record of `metrics.jsonl`, and the steps of which a timeline is written.

    `trace_steps` (first, stop) makes `timeline.json`, for Perfetto or chrome://tracing: items of sampled training, or
    epochs of full-graph training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trackers: tuple[TrackerName, ...] = ()
    trace_steps: tuple[int, int] | None = None

    @field_validator("trace_steps")
    @classmethod
    def _check(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] < value[1]:
            raise ValueError(f"trace_steps={value} holds no step; give first:stop with 0 <= first < stop")
        return value
