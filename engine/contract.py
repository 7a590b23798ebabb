"""The contract of a model, tried on a block of two nodes before any work is done for it."""

import logging
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine.metrics import node_loss
from penstock.engine.minibatch import Block
from penstock.engine.models import check_layer_forward
from penstock.engine.usermodule import CONTRACT

logger = logging.getLogger(__name__)


def _block(degrees: bool, weighted: bool) -> Block:
    """Two nodes, each the other's neighbour."""
    return Block(
        num_src=2,
        num_dst=2,
        indptr=torch.tensor([0, 1, 2], dtype=torch.int32),
        indices=torch.tensor([1, 0], dtype=torch.int32),
        edge_weights=torch.ones(2) if weighted else None,
        src_degrees=torch.ones(2, dtype=torch.int32) if degrees else None,
    )


def check_model(
    model: nn.Module,
    *,
    num_layers: int,
    num_features: int,
    num_classes: int,
    multi_label: bool,
    degrees: bool,
    weighted: bool,
    by_layer: bool,
    device: str = "cpu",
) -> None:
    """Run a model forward and backward on two nodes, and layer by layer.

    ValueError with the contract where it does not keep it, `by_layer` also where its layers one by one do not give the
    same; errors that a user's own code raises pass as they are.
    """
    model = model.to(device)
    blocks = [_block(degrees, weighted).to(device) for _ in range(num_layers)]
    x = torch.linspace(-1, 1, 2 * num_features, device=device).reshape(2, num_features)
    labels = torch.zeros((2, num_classes), device=device) if multi_label else torch.zeros(2, dtype=torch.long)
    name = type(model).__name__
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{name} has no parameter to train; {CONTRACT}")
    scores = _forward(model, blocks, x)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (2, num_classes) or not scores.is_floating_point():
        got = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise ValueError(f"{name} returned {got} for 2 seeds and {num_classes} classes; {CONTRACT}")
    if not scores.requires_grad:
        raise ValueError(f"the scores of {name} depend on none of its parameters, so it learns nothing; {CONTRACT}")
    node_loss(scores, labels.to(device)).backward()  # type: ignore[no-untyped-call]
    try:
        check_layer_forward(model, blocks, x)
    except Exception as error:
        if by_layer:
            raise
        logger.warning("penstock infer will need --sampled for this model: %s", error)


def goes_by_layer(model: nn.Module, *, num_layers: int, num_features: int, degrees: bool, weighted: bool) -> bool:
    """Whether a model gives layer by layer what it gives as a whole, on two nodes."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    x = torch.linspace(-1, 1, 2 * num_features, device=device).reshape(2, num_features)
    try:
        check_layer_forward(model, [_block(degrees, weighted).to(device) for _ in range(num_layers)], x)
    except Exception:  # whatever it is that a user's module raises there, it does not go
        return False
    return True


def _forward(model: nn.Module, blocks: list[Block], x: Tensor) -> Any:
    """Call the model. What libraries make of arguments that they do not understand breaks the contract; an error that
    the module's own code raises is its own."""
    try:
        return model(blocks, x)
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        own = type(model).__module__.partition(".")[0]
        where = [frame for frame in frames if str(frame.f_globals.get("__name__")).partition(".")[0] == own]
        raised_there = where and where[-1] is frames[-1] and not isinstance(error, TypeError | AttributeError)
        if own == "penstock" or raised_there:
            raise
        at = f" (at {Path(where[-1].f_code.co_filename).name}, line {where[-1].f_lineno})" if where else ""
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{type(model).__name__} failed on two nodes{at} with {said}; {CONTRACT}") from error
