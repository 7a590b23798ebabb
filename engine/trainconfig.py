"""How to train."""

from typing import Annotated, Any, Literal

from pydantic import Field

from penstock.engine.metrics import MetricName
from penstock.engine.optim import OptimConfig

# Weights do not depend on these, so training may go on with others.
_MAY_CHANGE = {"checkpoint_items", "checkpoint_minutes", "keep_checkpoints", "log_every", "threads"}


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

    @property
    def knows_its_end(self) -> bool:
        """Whether the learning rate of a step depends on how many epochs there will be."""
        return self.schedule in ("cosine", "linear")

    def identity(self) -> dict[str, Any]:
        """What must be equal for training to go on (JSON); the number of epochs only where the rate knows it."""
        value = {key: item for key, item in self.model_dump(mode="json").items() if key not in _MAY_CHANGE}
        if not self.knows_its_end:
            del value["epochs"]
        return {**value, "device": self.device.partition(":")[0]}
