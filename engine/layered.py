"""Take any model apart into an encoder, layers over blocks and a head, for training that goes layer by layer.

A model joins by attributes:

- `layers`, a sequence of modules: `layer(block, x)`, x [S, H] rows of the block's sources, to rows [R, H].
- `encoder`, optional: `encoder(features)` of one node each. With `encoder.takes_block = True` it is called
  `encoder(block, features)`, the rows those of the block's first sources, so that it can use `NodeDropout`. Without an
  encoder, layer 0 reads the features.
- `head`, optional: `head(h)` to scores. It sees no block; dropout before it belongs into the last layer.
- `uses_initial = True`, optional: something of each node goes with it through the layers, as wide as its hidden row.
  Layers are then called `layer(block, x, initial)`, initial [R, H], and may return (rows, new initial). The encoder (or
  layer 0, called with None) may return (rows, initial), else the rows are the initial ones too. The head is called
  `head(h, initial)`.

Nothing may be done between the parts. `LayeredModel` makes `forward` and `layer_forward` of them. A model with its own
`layer_forward(layer, block, x)` and no encoder is used through that, and what it does between layers is done there.

Letters: S sources, R destinations of a block, H width of hidden rows, C classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine.minibatch import Block

_ENCODER = 1 << 32  # the layer that an encoder draws as: it must not share masks with layer 0
Rows = tuple[Tensor, Tensor | None]


def uses_initial(model: nn.Module) -> bool:
    """Whether an initial representation goes through the layers."""
    return bool(getattr(model, "uses_initial", False))


def first_hidden(model: nn.Module) -> int:
    """The first layer that reads hidden rows: 0 after an encoder, else 1."""
    return 0 if _encoder(model) is not None else 1


def _encoder(model: nn.Module) -> Any:
    return getattr(model, "encoder", None)


def _layers(model: nn.Module) -> Any:
    return model.layers


def _is_direct(model: nn.Module) -> bool:
    """Whether `layers` are called themselves, not through the model's own `layer_forward`."""
    own = getattr(type(model), "layer_forward", None)
    return _encoder(model) is not None or uses_initial(model) or own in (None, LayeredModel.layer_forward)


def _encode(model: nn.Module, block: Block, features: Tensor) -> Rows:
    encoder = _encoder(model)
    if not getattr(encoder, "takes_block", False):
        found = encoder(features)
    else:
        draws = block.draws and replace(block.draws, layer=_ENCODER)
        found = encoder(replace(block, draws=draws), features)
    h, initial = found if isinstance(found, tuple) else (found, found)
    return h, initial if uses_initial(model) else None


def enter(model: nn.Module, block: Block, features: Tensor) -> Rows:
    """Make hidden rows [R, H] and initial ones (or None) of features: by the encoder, or by layer 0 over the block.

    `features` [S, F] are of the block's sources; an encoder takes the destinations' only, the first R.
    """
    if _encoder(model) is not None:
        return _encode(model, block, features[: block.num_dst])
    return apply_layer(model, 0, block, features, None)


def apply_layer(model: nn.Module, layer: int, block: Block, x: Tensor, initial: Tensor | None) -> Rows:
    """Apply one layer, x [S, H] to [R, H]; `initial` [R, H] comes back as it is where the layer leaves it alone."""
    if not _is_direct(model):
        own: Any = model.layer_forward
        return own(layer, block, x), None
    module = _layers(model)[layer]
    if not uses_initial(model):
        return module(block, x), None
    found = module(block, x, initial)
    if isinstance(found, tuple):
        return found
    return found, found if initial is None else initial


def leave(model: nn.Module, h: Tensor, initial: Tensor | None) -> Tensor:
    """Make scores [R, C] of what the last layer gave."""
    head = getattr(model, "head", None)
    if head is None or not _is_direct(model):
        return h
    return head(h, initial) if uses_initial(model) else head(h)  # type: ignore[no-any-return]


class LayeredModel(nn.Module):
    """A model that is its encoder, layers and head; subclasses make them."""

    def layer_forward(self, layer: int, block: Block, x: Tensor) -> Tensor:
        """Apply one layer to the state [S, H], or [S, 2 H] with initial rows beside the hidden ones.

        Layer 0 takes features; the last gives scores.
        """
        h, initial = self._begin(block, x) if layer == 0 else self._split(x)
        h, initial = self._step(layer, block, h, initial)
        if layer == len(_layers(self)) - 1:
            return leave(self, h, initial)
        return h if initial is None else torch.cat([h, initial], dim=1)

    def forward(self, blocks: Sequence[Block], x: Tensor) -> Tensor:
        """Scores [B, C] of the seeds. ValueError unless there is one block per layer."""
        if len(blocks) != len(_layers(self)):
            raise ValueError(
                f"the item has {len(blocks)} blocks, the model {len(_layers(self))} layers; "
                "set num_layers to the number of fanouts"
            )
        h, initial = self._begin(blocks[0], x)
        for layer, block in enumerate(blocks):
            h, initial = self._step(layer, block, h, initial)
        return leave(self, h, initial)

    def _begin(self, block: Block, x: Tensor) -> Rows:
        return (x, None) if _encoder(self) is None else _encode(self, block, x)

    def _split(self, state: Tensor) -> Rows:
        if not uses_initial(self):
            return state, None
        h, initial = state.chunk(2, dim=1)
        return h, initial

    def _step(self, layer: int, block: Block, h: Tensor, initial: Tensor | None) -> Rows:
        return apply_layer(self, layer, block, h, None if initial is None else initial[: block.num_dst])


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Leave running statistics of batch norms alone; in training mode they still normalise by the batch's own.

    For a forward pass that is run again for its gradients. Not for several threads on one model.
    """
    found: list[Any] = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    for module in found:
        module.track_running_stats = False  # torch: then it neither updates nor, in training, reads them
    try:
        yield
    finally:
        for module in found:
            module.track_running_stats = True


def boundary_widths(model: nn.Module, num_features: int) -> tuple[list[int], int]:
    """Widths of the rows that enter layers `first_hidden` to the last, and of initial rows (0 without)."""
    block, x = _probe(model, num_features)
    widths, initial_width = [], 0
    with torch.no_grad(), _evaluating(model):
        h, initial = enter(model, block, x)
        for layer in range(first_hidden(model), len(_layers(model))):
            widths.append(h.shape[1])
            initial_width = 0 if initial is None else initial.shape[1]
            h, initial = apply_layer(model, layer, block, h, initial)
    return widths, initial_width


_PROBES = 5


def _probe(model: nn.Module, num_features: int) -> tuple[Block, Tensor]:
    """A few nodes in a ring, and features for them."""
    like = next(model.parameters(), torch.zeros(0))
    indices = torch.arange(_PROBES, dtype=torch.int32, device=like.device).roll(1)
    block = Block(
        num_src=_PROBES,
        num_dst=_PROBES,
        indptr=torch.arange(_PROBES + 1, dtype=torch.int32, device=like.device),
        indices=indices,
        edge_weights=torch.ones(_PROBES, device=like.device),
        src_degrees=torch.ones(_PROBES, dtype=torch.int32, device=like.device),
    )
    x = torch.linspace(-1, 1, _PROBES * num_features, dtype=like.dtype, device=like.device)
    return block, x.view(_PROBES, num_features)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_chunkable(model: nn.Module, num_features: int | None = None) -> None:
    """Raise ValueError, with the remedy, unless the model can be trained chunk by chunk.

    With `num_features`, a few nodes are run through: the parts have to give what the model gives as a whole, and all
    hidden rows, and initial ones, have to be of one width.
    """
    name = type(model).__name__
    layers = getattr(model, "layers", None)
    if layers is None or not len(layers):
        raise ValueError(
            f"{name} has no `layers`, so it cannot be trained chunk by chunk; give it a sequence of modules "
            "layer(block, x), or train it on samples"
        )
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            raise ValueError(
                f"{name}.{path} is {type(module).__name__}(p={module.p}), whose mask would depend on chunks, stages "
                f"and threads; use penstock.engine.dropout.NodeDropout({module.p}), called (block, x)"
            )
    if num_features is not None:
        _check_parts(model, num_features)


def _check_parts(model: nn.Module, num_features: int) -> None:
    name = type(model).__name__
    block, x = _probe(model, num_features)
    num_layers = len(_layers(model))
    with torch.no_grad(), _evaluating(model):
        whole = model([block] * num_layers, x)
        h, initial = enter(model, block, x)
        for layer in range(first_hidden(model), num_layers):
            h, initial = apply_layer(model, layer, block, h, initial)
        parts = leave(model, h, initial)
    if whole.shape != parts.shape or not torch.allclose(whole, parts, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"the encoder, layers and head of {name}, one after another, do not give what {name} gives; move what is "
            "done between them into the layers, or add layer_forward(layer, block, x) and no encoder"
        )
    widths, initial_width = boundary_widths(model, num_features)
    if len({*widths, initial_width or (widths or [0])[0]}) > 1:
        raise ValueError(f"hidden rows of {name} are {widths} wide, initial ones {initial_width}; make them all equal")
