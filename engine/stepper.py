"""Forward, backward and the optimizer step of a group of items, whoever computes which of them.

The gradient of a step is the mean over the seeds of its group. Items are weighed by their seeds, summed pairwise (see
`reduce`) and divided at the end; running statistics of batch norms are averaged over the group in the same way, each
item starting from those of the last step, so they do not depend on the number of replicas either. A group of one item
on one replica is an ordinary step: nothing is summed.

Accumulating gradients locally before they are averaged: LiGNN (arXiv 2402.11139).
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from penstock.engine.metrics import node_loss
from penstock.engine.minibatch import MiniBatch
from penstock.engine.optim import OptimConfig, build_optimizer, set_learning_rate
from penstock.engine.reduce import PairwiseSum
from penstock.engine.trainstate import seed_step
from penstock.storage.spans import TRACE

SumOver = Callable[[Tensor], None]


class Stepper:
    """Owns the gradients of a model and its optimizer. `grouped` sums items, otherwise every item is a step."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        *,
        device: torch.device,
        autocast: torch.dtype | None,
        scaled: bool,
        seed: int,
        grouped: bool,
    ) -> None:
        self.model, self.device = model, device
        self.optimizer = build_optimizer(model.parameters(), config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.scaler.scale(torch.zeros(1, device=device))  # a replica may have a step before it has an item
        self.reduce_s = 0.0
        self._clip, self._autocast, self._seed, self._grouped = config.grad_clip, autocast, seed, grouped
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._statistics, self._counters = _statistics(model)
        self._before = [tensor.clone() for tensor in self._statistics] if grouped else []
        size = sum(tensor.numel() for tensor in (*self._parameters, *self._statistics)) + 1
        self._like = torch.empty(size if grouped else 0, device=device)
        self._sums = PairwiseSum()

    def begin_group(self) -> None:
        """Note what every item of the group starts from."""
        for before, tensor in zip(self._before, self._statistics, strict=False):
            before.copy_(tensor)

    def add(self, batch: MiniBatch, step: int) -> Tensor:
        """Compute the gradients of item `step` and take them into the group; returns its mean loss, detached."""
        if batch.features.device.type != self.device.type:
            batch = batch.to(self.device)
        seed_step(self._seed, step, self.device)
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            logits = self.model(batch.blocks, batch.features)
        loss = node_loss(logits, batch.labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self._grouped:
            self._take(batch.num_seeds)
        return loss.detach()

    def _take(self, num_seeds: int) -> None:
        """Add an item's gradients and statistics, weighed by its seeds; weighing the loss would overflow float16."""
        vector = self._sums.buffer(self._like)
        at = 0
        for parameter in self._parameters:
            piece = vector[at : (at := at + parameter.numel())]
            if parameter.grad is None:
                piece.zero_()
            else:
                torch.mul(parameter.grad.reshape(-1), num_seeds, out=piece)
        for before, tensor in zip(self._before, self._statistics, strict=True):
            torch.mul(tensor.reshape(-1), num_seeds, out=vector[at : (at := at + tensor.numel())])
            tensor.copy_(before)
        for counted, counter in self._counters:
            counter.copy_(counted)
        vector[at] = num_seeds
        self._sums.add(vector)

    def step(self, rate: float, sum_over: SumOver | None = None) -> None:
        """Move the weights by what was added since the last step, and by what `sum_over` adds from other replicas."""
        if self._grouped:
            self._finish_group(sum_over)
        set_learning_rate(self.optimizer, rate)
        if self._clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _finish_group(self, sum_over: SumOver | None) -> None:
        total = self._sums.total()
        vector = self._sums.buffer(self._like).zero_() if total is None else total
        if sum_over is not None:
            began = time.perf_counter()
            sum_over(vector)
            ended = time.perf_counter()
            self.reduce_s += ended - began
            TRACE.add("reduce", "gradients", began, ended)
        vector[:-1].div_(vector[-1].clone())
        at = 0
        for parameter in self._parameters:
            piece = vector[at : (at := at + parameter.numel())].view_as(parameter)
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(piece)
        for tensor in self._statistics:
            tensor.copy_(vector[at : (at := at + tensor.numel())].view_as(tensor))
        for before, tensor in self._counters:
            tensor.copy_(before.add_(1))
        self._sums.recycle(vector)

    def restored(self) -> None:
        """Take note that the model's buffers were replaced."""
        for before, tensor in self._counters:
            before.copy_(tensor)


def _statistics(model: nn.Module) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Running means and variances of batch norms, and their counters of steps, each with a copy of its value."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    floats = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    return floats, [(tensor.clone(), tensor) for tensor in counters]
