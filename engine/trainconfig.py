"""How to train."""

from typing import Annotated, Literal

from pydantic import Field

from penstock.engine.metrics import MetricName
from penstock.engine.optim import OptimConfig


class TrainConfig(OptimConfig):
    """How to train.

    Every `evaluate_every` epochs (0: never) the model is evaluated; the weights of the best valid `metric` are kept and
    are the result. Training stops early after `patience` epochs without a better one. `metric` micro_f1 is the accuracy
    where a node has one label; ties go to the lower loss. float16 needs a CUDA device.

    An optimizer step takes the mean gradient over the seeds of `accumulate` consecutive items of an epoch, on however
    many replicas they are dealt to.
    """

    epochs: Annotated[int, Field(ge=1)] = 10
    seed: Annotated[int, Field(ge=0)] = 0
    accumulate: Annotated[int, Field(ge=1)] = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    metric: MetricName = "micro_f1"
    patience: Annotated[int, Field(ge=1)] | None = None
    evaluate_every: Annotated[int, Field(ge=0)] = 1
    checkpoint_items: Annotated[int, Field(ge=1)] | None = None
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = 10.0
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    log_every: Annotated[int, Field(ge=1)] = 10
    threads: Annotated[int, Field(ge=1)] | None = None
    device: str = "cpu"
