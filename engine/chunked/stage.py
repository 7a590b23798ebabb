"""Compute a stage's layers on a chunk, forward and backward, with rows and gradients of other chunks from tables.

Forward, layer by layer: the chunk's rows are pushed to those chunks that read them, and the rows that it reads are
pulled, fresh from chunks that came earlier in the epoch's order, historical from the others. Backward breaks the graph
at every layer: the gradient of a layer's source rows is kept for the chunk's own rows and pushed as messages to the
chunks that the other rows came from; what other chunks pushed to this one is pulled and added. With only fresh messages
this is the exact gradient of the forward pass with histories held constant.

Letters: H width of hidden rows, `own` rows of the chunk, `halo` rows that it reads, `slab` own rows and mirrors.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penstock.engine import layered, recycled
from penstock.engine.aggregate import aggregate_sum
from penstock.engine.chunked.blocks import ChunkData, ChunkTargets
from penstock.engine.chunked.exchange import MirrorExchange
from penstock.engine.deferred import WeightGradients
from penstock.engine.fixed_order import binary_cross_entropy
from penstock.storage.history import MessageTable, RunTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where an epoch is when it comes to a chunk: which writers' rows are fresh, and what dropout draws from."""

    epoch: int
    draw_key: int
    is_fresh: NDArray[np.bool_]


@dataclass(slots=True, kw_only=True, eq=False)
class _Step:
    """One layer of a tape: leaves that went in, tensors that came out. `turned`: the initial representation changed."""

    layer: int
    x: Tensor
    initial: Tensor | None
    out: Tensor
    out_initial: Tensor | None

    @property
    def turned(self) -> bool:
        return self.out_initial is not self.initial


@dataclass(slots=True, kw_only=True, eq=False)
class Tape:
    """What backward needs of one chunk: the graph of every layer, cut between layers.

    `entry` and `entry_initial` are what entered the stage: leaves, or the outputs of unit 0.
    """

    entry: Tensor
    entry_initial: Tensor | None
    steps: list[_Step] = field(default_factory=list)
    weights: WeightGradients = field(default_factory=WeightGradients)

    @property
    def last(self) -> tuple[Tensor, Tensor | None]:
        """What left the last layer, or what entered where the stage has none."""
        if not self.steps:
            return self.entry, self.entry_initial
        return self.steps[-1].out, self.steps[-1].out_initial


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


class StageCompute:
    """The layers of one stage over the chunks of one part; used by one thread.

    `histories` and `messages` are tables by hidden layer of the stage; `message_weights` are the factors of gradients
    that are of this epoch and of an earlier one, (0, 0) where none flow between chunks.
    """

    def __init__(
        self,
        model: nn.Module,
        chunks: list[ChunkData],
        *,
        hidden: range,
        enters: bool,
        leaves: bool,
        histories: Mapping[int, RunTable],
        messages: Mapping[int, MessageTable],
        message_weights: tuple[float, float],
        staleness_bound: int,
        exchange: MirrorExchange,
        targets: ChunkTargets | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.chunks, self.hidden = model, chunks, hidden
        self.enters, self.leaves, self.targets = enters, leaves, targets
        self.histories, self.messages = histories, messages
        self._weights, self._bound, self.exchange = message_weights, staleness_bound, exchange
        self.dtype, self.device = dtype, device
        self._has_statistics = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())

    def forward(
        self, chunk: int, at: Position, entry: Tensor, initial: Tensor | None, *, keep: bool
    ) -> tuple[Tape | None, Tensor | None, Tensor | None]:
        """Run a chunk's layers; `entry` are features (first stage) or rows [own, H] of the stage before.

        Returns the tape if `keep`, and what goes to the next stage, detached. Without `keep` the last stage stops at
        the last table that others read: backward computes the rest.
        """
        skip_last = self.leaves and not keep and not self._has_statistics
        tape = self._run(chunk, at, entry, initial, grad=keep, first=True, skip_last=skip_last)
        out, out_initial = tape.last
        sent = (None, None) if self.leaves else (out.detach(), None if out_initial is None else out_initial.detach())
        return (tape if keep else None), *sent

    def replay(self, chunk: int, at: Position, entry: Tensor, initial: Tensor | None) -> Tape:
        """Run a chunk's layers once more, to the same bits, for backward."""
        guard = layered.frozen_statistics(self.model) if self._has_statistics else nullcontext()
        with guard:
            return self._run(chunk, at, entry, initial, grad=True, first=False, skip_last=False)

    def _run(
        self,
        chunk: int,
        at: Position,
        entry: Tensor,
        initial: Tensor | None,
        *,
        grad: bool,
        first: bool,
        skip_last: bool,
    ) -> Tape:
        data = self.chunks[chunk]
        weights = WeightGradients()
        with torch.set_grad_enabled(grad), weights:
            if self.enters:
                h, initial = layered.enter(self.model, data.drawn(at.draw_key, 0), entry)
            else:
                h, initial = _leaf(entry), None if initial is None else _leaf(initial)
            tape = Tape(entry=h, entry_initial=initial, weights=weights)
            initial = None if initial is None else _leaf(initial)
            for layer in self.hidden:
                if first:
                    self.push(chunk, layer, h, at.epoch)
                if skip_last and layer == self.hidden[-1]:
                    break
                x = self._sources(chunk, layer, h, at)
                out, out_initial = layered.apply_layer(self.model, layer, data.drawn(at.draw_key, layer), x, initial)
                tape.steps.append(_Step(layer=layer, x=x, initial=initial, out=out, out_initial=out_initial))
                if out_initial is not initial:
                    initial = None if out_initial is None else _leaf(out_initial)
                h = out
        return tape

    def push(self, chunk: int, layer: int, h: Tensor, version: int) -> None:
        """Give the chunk's rows to those that read them; parts exchange what they mirror of each other first."""
        data = self.chunks[chunk]
        slab = self.exchange.slab(data, h.detach())
        if self.device.type != "cpu":
            rows = slab.index_select(0, data.send_rows).cpu().numpy()
            self.histories[layer].push(chunk, rows, version)
        else:
            self.histories[layer].push(chunk, slab.numpy(), version, data.send_rows.numpy())

    def _sources(self, chunk: int, layer: int, h: Tensor, at: Position) -> Tensor:
        """The layer's input [own + halo, H], a leaf."""
        data = self.chunks[chunk]
        x = recycled.empty(data.num_own + data.num_halo, h.shape[1], dtype=self.dtype)
        x[: data.num_own] = h.detach()
        halo = x[data.num_own :]
        self.histories[layer].pull(chunk, at.is_fresh, halo.numpy(), epoch=at.epoch, bound=self._bound)
        return x.to(self.device).requires_grad_()

    def loss(self, chunk: int, tape: Tape, total: int) -> tuple[float, Tensor | None, Tensor | None]:
        """Loss of the chunk's training rows over `total`, and the gradients of what left the last layer."""
        assert self.targets is not None
        out, out_initial = tape.last
        rows, labels = self.targets.of(chunk, "train")
        h, initial = _leaf(out), None if out_initial is None else _leaf(out_initial)
        with tape.weights:
            logits = layered.leave(self.model, h, initial)
        value = loss_sum(logits.index_select(0, rows), labels) / (total * (labels.shape[1] if labels.ndim == 2 else 1))
        value.backward()  # type: ignore[no-untyped-call]
        grad = torch.zeros_like(h) if h.grad is None else h.grad  # a head may read the initial rows alone
        return float(value.detach().double()), grad, None if initial is None else initial.grad

    def backward(
        self, chunk: int, tape: Tape, epoch: int, grad: Tensor | None, grad_initial: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Run a tape backward; returns the gradients of what entered the stage. Weight matrices wait in the tape."""
        for step in reversed(tape.steps):
            assert grad is not None
            outputs, grads = [step.out], [grad]
            if step.turned and step.out_initial is not None and grad_initial is not None:
                outputs.append(step.out_initial)
                grads.append(grad_initial)
            torch.autograd.backward(outputs, grads)
            found = None if step.initial is None else step.initial.grad
            if step.initial is not None:
                step.initial.grad = None
            grad_initial = found if step.turned else _add(grad_initial, found)
            assert step.x.grad is not None, f"layer {step.layer} gives its input no gradient"
            grad = self._collect(chunk, step.layer, step.x.grad, epoch)
            step.x.grad = None
        assert grad is not None
        if self.enters:
            self._backward_entry(tape, grad, grad_initial)
        return grad, grad_initial

    def _backward_entry(self, tape: Tape, grad: Tensor, grad_initial: Tensor | None) -> None:
        pairs = [(tape.entry, grad), (tape.entry_initial, grad_initial)]
        if tape.entry_initial is tape.entry and grad_initial is not None:  # one tensor in two roles
            pairs = [(tape.entry, grad + grad_initial)]
        used = [(out, g) for out, g in pairs if out is not None and g is not None and out.requires_grad]
        if used:
            torch.autograd.backward([out for out, _ in used], [g for _, g in used])

    def _collect(self, chunk: int, layer: int, grad_x: Tensor, epoch: int) -> Tensor:
        """Send gradients of halo rows to their chunks, and add what came for this chunk's own rows."""
        data = self.chunks[chunk]
        own = grad_x[: data.num_own]
        if not any(self._weights) and self.exchange.is_alone:
            return own
        table = self.messages[layer]
        table.push(chunk, grad_x[data.num_own :].cpu().numpy(), epoch)
        rows, versions = self._messages_for(chunk, table)
        scale = self._message_scale(chunk, versions, epoch)
        slab = aggregate_sum(data.messages, rows.to(self.device), src_scale=scale)
        return self.exchange.gradients(data, slab).add_(own)

    def _messages_for(self, chunk: int, table: MessageTable) -> tuple[Tensor, NDArray[np.int64]]:
        """Gradients [num_sends, H] that were sent to the chunk, valid until the next push, and versions by sender."""
        rows = table.view(chunk)
        if rows is not None:
            return torch.from_numpy(rows), table.versions
        found = recycled.empty(self.chunks[chunk].num_sends, table.layout.width, dtype=self.dtype)
        return found, table.pull(chunk, found.numpy())

    def _message_scale(self, chunk: int, versions: NDArray[np.int64], epoch: int) -> Tensor | None:
        fresh, stale = self._weights
        factors = np.where(versions == epoch, fresh, stale)
        factors[versions < 0] = 0.0  # nothing was ever sent
        factors[chunk] = 1.0  # mirrors of the chunk itself, exchanged in this very slot
        if (factors == 1.0).all():
            return None
        sizes = self.chunks[chunk].run_sizes
        return torch.repeat_interleave(torch.from_numpy(factors).to(self.dtype), sizes).to(self.device)


def join_state(h: Tensor, initial: Tensor | None) -> Tensor:
    """What travels between stages: rows [own, H], or [own, 2 H] with the initial representation."""
    return h.contiguous() if initial is None else torch.cat([h, initial], dim=1)


def split_state(state: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Undo `join_state`, into aligned tensors of their own: matrix products may round by alignment."""
    if state.shape[1] == width:
        return state, None
    return state[:, :width].contiguous(), state[:, width:].contiguous()


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses of rows: cross entropy for labels int64 [B], binary cross entropy for float [B, C]."""
    if labels.ndim == 2:
        return binary_cross_entropy(logits, labels, reduction="sum")
    return nn.functional.cross_entropy(logits, labels, reduction="sum")
