"""Optimizers, and learning rates as pure functions of the step, so that a schedule has no state to restore."""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from penstock.storage.errors import FormatError

OptimizerName = Literal["adam", "adamw", "sgd", "rmsprop", "adagrad"]
ScheduleName = Literal["none", "cosine", "step", "linear"]


class OptimConfig(BaseModel):
    """How weights move.

    `momentum` concerns sgd and rmsprop only. The rate rises linearly over `warmup_steps`, then `cosine` and `linear`
    bring it to zero at the last step, and `step` multiplies it by `decay` every `decay_epochs` epochs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer: OptimizerName = "adam"
    lr: Annotated[float, Field(gt=0)] = 0.003
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    schedule: ScheduleName = "none"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    decay_epochs: Annotated[int, Field(ge=1)] = 30
    grad_clip: Annotated[float, Field(gt=0)] | None = None


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Make the optimizer, in its fused form where there is one: elementwise, so its bits do not depend on threads."""
    params = [parameter for parameter in parameters if parameter.requires_grad]
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "adam":
        return torch.optim.Adam(params, lr=lr, weight_decay=decay, fused=True)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=decay, fused=True)
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, lr=lr, weight_decay=decay, momentum=config.momentum, fused=True)
    if config.optimizer == "adagrad":
        return torch.optim.Adagrad(params, lr=lr, weight_decay=decay, foreach=True)
    return torch.optim.RMSprop(params, lr=lr, weight_decay=decay, momentum=config.momentum, foreach=True)


def learning_rate(config: OptimConfig, step: int, items_per_epoch: int, epochs: int) -> float:
    """The rate of training step `step`, counted from zero over all epochs."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "none":
        return config.lr
    if config.schedule == "step":
        return float(config.lr * config.decay ** (step // (items_per_epoch * config.decay_epochs)))
    done = (step - config.warmup_steps) / max(1, items_per_epoch * epochs - config.warmup_steps)
    return config.lr * (1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def flatten_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state under the name `<parameter number>.<state name>`."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{n}.{name}": value for n, values in state.items() for name, value in values.items() if value is not None}


def restore_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Undo `flatten_state`; FormatError where the names are not those of such an optimizer."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        if not number.isdigit() or not name:
            raise FormatError(f"optimizer state has an entry {key!r}; the checkpoint is not of this optimizer")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
