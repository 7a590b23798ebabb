"""Models over blocks: stacks of `layers`, deep ones (see `deep_models`), or a user's own module by import path.

A model is called as `model(blocks, x)`, x [M, F] features of the input nodes, to [B, C] scores of the seeds. Layer by
layer inference calls `model.layer_forward(l, block, x)`: layer l with all that belongs to it, in the order dropout of
the input, layer, residual, norm, activation; the last layer has neither norm nor activation. Dropout draws from
torch's global generator, which the trainer reseeds every step, or as a block's `draws` say.

Letters: L layers, M input nodes, B seeds, F features, H hidden, C classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from penstock.engine.deep_models import DAGNN, GCNII, ResGCN
from penstock.engine.deferred import Linear
from penstock.engine.dropout import dropout
from penstock.engine.fixed_order import BatchNorm, LayerNorm, elu
from penstock.engine.layers import Aggregator, GATConv, GCNConv, GINConv, SAGEConv
from penstock.engine.minibatch import Block
from penstock.engine.usermodule import load_class, make_module

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": nn.functional.relu, "elu": elu}
_NORMS: dict[str, Callable[[int], nn.Module]] = {"none": nn.Identity, "batch": BatchNorm, "layer": LayerNorm}
_OR_SAMPLED = "or evaluate and infer by sampling (evaluate.mode=sampled, penstock infer --sampled)"
_DEEP = ("gcnii", "resgcn", "dagnn")


class ModelConfig(BaseModel):
    """What to train. On samples, `num_layers` has to equal the number of fanouts.

    `module` and `kwargs` are for kind custom, `alpha` and `theta` for gcnii. The deep kinds gcnii, resgcn and dagnn
    have their own residuals; resgcn takes a norm, layer norm unless another is named.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["sage", "gcn", "gat", "gin", "gcnii", "resgcn", "dagnn", "custom"] = "sage"
    num_layers: int = Field(default=3, ge=1)
    hidden: int = Field(default=128, ge=1)
    aggregator: Aggregator = "mean"
    edge_weights: bool = False
    heads: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    input_dropout: float = Field(default=0.0, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    norm: Literal["none", "batch", "layer"] = "none"
    residual: bool = False
    activation: Literal["relu", "elu"] = "relu"
    alpha: float = Field(default=0.1, ge=0, le=1)
    theta: float = Field(default=0.5, gt=0)
    module: str | None = None
    kwargs: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, value: Any) -> Any:
        is_resgcn = isinstance(value, dict) and value.get("kind") == "resgcn"
        return {"norm": "layer", **value} if is_resgcn else value

    @model_validator(mode="after")
    def _is_consistent(self) -> "ModelConfig":
        if (self.kind == "custom") != (self.module is not None):
            raise ValueError(f"kind={self.kind} with module={self.module!r}: kind custom and a module go together")
        if self.kwargs and self.kind != "custom":
            raise ValueError(f"kwargs {sorted(self.kwargs)} are for kind custom, not {self.kind}; remove them")
        if self.kind == "gat" and self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is no multiple of heads={self.heads}; change one of them")
        if self.edge_weights and (self.kind, self.aggregator) != ("sage", "mean"):
            raise ValueError("edge_weights is for kind sage with aggregator mean only; turn it off")
        if self.residual and self.kind in _DEEP:
            raise ValueError(f"residual is part of what kind {self.kind} is, in its own way; leave it off")
        if self.norm != "none" and self.kind in ("gcnii", "dagnn"):
            raise ValueError(f"norm={self.norm}, but kind {self.kind} has no norms; leave it none, or use resgcn")
        return self


def needs_degrees(config: ModelConfig) -> bool:
    """Whether items must carry whole-graph in-degrees; a custom module says so by an attribute `needs_degrees`."""
    if config.kind == "custom":
        return bool(getattr(load_class(config.module or ""), "needs_degrees", False))
    return config.kind in ("gcn", "gin", *_DEEP)


def _make_layer(config: ModelConfig, in_features: int, out_features: int, is_last: bool) -> nn.Module:
    if config.kind == "gcn":
        return GCNConv(in_features, out_features)
    if config.kind == "gin":
        return GINConv(in_features, out_features)
    if config.kind == "gat":  # the last layer averages its heads, as in the paper
        options: dict[str, Any] = {"heads": config.heads, "attention_dropout": config.attention_dropout}
        return GATConv(in_features, out_features, concat=not is_last, **options)
    return SAGEConv(in_features, out_features, aggregator=config.aggregator, edge_weights=config.edge_weights)


class GraphModel(nn.Module):
    """A stack of L layers of one kind; `layers`, `norms` and `skips` hold what belongs to each."""

    def __init__(self, config: ModelConfig, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.needs_degrees = needs_degrees(config)
        widths = [num_features, *[config.hidden] * (config.num_layers - 1), num_classes]
        last = config.num_layers - 1
        self.layers, self.norms, self.skips = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for layer, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
            self.layers.append(_make_layer(config, fan_in, fan_out, layer == last))
            if layer < last:
                self.norms.append(_NORMS[config.norm](fan_out))
                if config.residual:
                    same = fan_in == fan_out
                    self.skips.append(nn.Identity() if same else Linear(fan_in, fan_out, bias=False))

    def layer_forward(self, layer: int, block: Block, x: Tensor) -> Tensor:
        """Apply one layer with its dropout (in training), residual, norm and activation."""
        config = self.config
        x = dropout(x, config.dropout if layer else config.input_dropout, self.training, block)
        out: Tensor = self.layers[layer](block, x)
        if layer == len(self.layers) - 1:
            return out
        if config.residual:
            out = out + self.skips[layer](x[: block.num_dst])
        return _ACTIVATIONS[config.activation](self.norms[layer](out))

    def forward(self, blocks: Sequence[Block], x: Tensor) -> Tensor:
        """Scores [B, C] of the seeds. ValueError unless there is one block per layer."""
        if len(blocks) != len(self.layers):
            raise ValueError(
                f"the item has {len(blocks)} blocks, the model {len(self.layers)} layers; "
                "set num_layers to the number of fanouts"
            )
        for layer, block in enumerate(blocks):
            x = self.layer_forward(layer, block, x)
        return x


def _build_deep(config: ModelConfig, num_features: int, num_classes: int) -> nn.Module:
    options: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden": config.hidden,
        "dropout": config.dropout,
        "input_dropout": config.input_dropout,
        "activation": _ACTIVATIONS[config.activation],
    }
    if config.kind == "gcnii":
        return GCNII(num_features, num_classes, alpha=config.alpha, theta=config.theta, **options)
    if config.kind == "resgcn":
        return ResGCN(num_features, num_classes, norm=_NORMS[config.norm], **options)
    return DAGNN(num_features, num_classes, **options)


def build_model(config: ModelConfig, num_features: int, num_classes: int, num_layers: int | None = None) -> nn.Module:
    """Make the model; a user's class is called with `num_features`, `num_classes` and `kwargs`.

    ValueError where `num_layers`, the number of fanouts, is given and is not the config's.
    """
    if config.kind == "custom":
        options = {"num_features": num_features, "num_classes": num_classes, **config.kwargs}
        return make_module(load_class(config.module or ""), options)
    if num_layers not in (None, config.num_layers):
        raise ValueError(f"num_layers={config.num_layers}, but there are {num_layers} fanouts; make them equal")
    if config.kind in _DEEP:
        return _build_deep(config, num_features, num_classes)
    return GraphModel(config, num_features, num_classes)


def layer_forward(model: nn.Module, layer: int, block: Block, x: Tensor) -> Tensor:
    """Apply one layer of any model: its own `layer_forward`, or `model.layers[layer](block, x)` where it has none.

    The latter is right only where `forward` does nothing between the layers; `check_layer_forward` finds out.
    """
    own = getattr(model, "layer_forward", None)
    if own is not None:
        return own(layer, block, x)  # type: ignore[no-any-return]
    layers = getattr(model, "layers", None)
    if layers is None:
        raise ValueError(
            f"{type(model).__name__} has neither layer_forward(layer, block, x) nor layers, so it cannot be computed "
            f"layer by layer; add one of them, {_OR_SAMPLED}"
        )
    return layers[layer](block, x)  # type: ignore[no-any-return]


def count_layers(model: nn.Module) -> int:
    """L; ValueError where the model cannot be computed layer by layer because it has no `layers`."""
    layers = getattr(model, "layers", None)
    if layers is None:
        raise ValueError(
            f"{type(model).__name__} has no `layers`, so it cannot be computed layer by layer; give it `layers` and "
            f"layer_forward(layer, block, x), {_OR_SAMPLED}"
        )
    return len(layers)


def check_layer_forward(model: nn.Module, blocks: Sequence[Block], x: Tensor) -> None:
    """Raise ValueError unless the layers one by one, as many as blocks, give what `model(blocks, x)` gives, in
    evaluation mode."""
    if count_layers(model) != len(blocks):
        raise ValueError(
            f"{type(model).__name__} has {count_layers(model)} `layers` for {len(blocks)} blocks, so it cannot be "
            f"computed layer by layer; give it as many as there are fanouts, {_OR_SAMPLED}"
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole, by_layer = model(blocks, x), x
            for layer, block in enumerate(blocks):
                by_layer = layer_forward(model, layer, block, by_layer)
    finally:
        model.train(was_training)
    if whole.shape != by_layer.shape or not torch.allclose(whole, by_layer, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{type(model).__name__} does not give layer by layer what it gives as a whole; add a method "
            f"layer_forward(layer, block, x) with all that forward does for that layer, {_OR_SAMPLED}"
        )
