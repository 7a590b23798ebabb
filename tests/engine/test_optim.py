import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from penstock.engine.optim import (
    OptimConfig,
    OptimizerName,
    build_optimizer,
    flatten_state,
    learning_rate,
    restore_state,
    set_learning_rate,
)
from penstock.storage.errors import FormatError


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, stop: int) -> None:
    for step in range(first, stop):
        torch.manual_seed(step)
        set_learning_rate(optimizer, 0.01 / (step + 1))
        optimizer.zero_grad(set_to_none=True)
        model(torch.randn(16, 5)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", get_args(OptimizerName))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_restored_state_continues_bit_for_bit(name: OptimizerName, momentum: float, tmp_path: Path) -> None:
    config = OptimConfig(optimizer=name, lr=0.01, weight_decay=0.1, momentum=momentum)
    torch.manual_seed(0)
    whole = nn.Linear(5, 3)
    optimizer = build_optimizer(whole.parameters(), config)
    _steps(whole, optimizer, 0, 4)
    weights = {key: value.clone() for key, value in whole.state_dict().items()}
    state = {key: value.clone() for key, value in flatten_state(optimizer).items()}
    _steps(whole, optimizer, 4, 9)

    resumed = nn.Linear(5, 3)
    resumed.load_state_dict(weights)
    again = build_optimizer(resumed.parameters(), config)
    restore_state(again, state)
    _steps(resumed, again, 4, 9)
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)
    assert not torch.equal(whole.weight, weights["weight"])


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_matches_plain_pytorch(name: OptimizerName) -> None:
    classes = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
    }
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    _steps(ours, build_optimizer(ours.parameters(), OptimConfig(optimizer=name, weight_decay=0.1)), 0, 5)
    _steps(theirs, classes[name](theirs.parameters(), lr=0.003, weight_decay=0.1), 0, 5)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-7)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(5, 3)
    model.bias.requires_grad_(False)
    assert len(build_optimizer(model.parameters(), OptimConfig()).param_groups[0]["params"]) == 1


def test_state_of_another_optimizer_is_refused() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2).parameters(), OptimConfig())
    with pytest.raises(FormatError, match="'weight'"):
        restore_state(optimizer, {"weight": torch.zeros(2)})


def test_schedules() -> None:
    def rates(**options: object) -> list[float]:
        config = OptimConfig.model_validate({"lr": 1.0, **options})
        return [learning_rate(config, step, items_per_epoch=5, epochs=4) for step in range(20)]

    assert rates() == [1.0] * 20
    assert rates(schedule="linear") == pytest.approx([1 - step / 20 for step in range(20)])
    cosine = rates(schedule="cosine", warmup_steps=4)
    assert cosine[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert cosine[12] == pytest.approx(0.5) and cosine[19] == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert rates(schedule="step", decay=0.1, decay_epochs=2) == pytest.approx([1.0] * 10 + [0.1] * 10)


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"optimizer": "lion"}, {"grad_clip": -1}, {"learning_rate": 0.1}])
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        OptimConfig.model_validate(wrong)
