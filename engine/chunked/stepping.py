"""The optimizer step of one rank: gradients summed over parts, averaged over replicas, clipped by the norm over stages.

A batch norm's running statistics are averaged over parts and replicas at every step: evaluations and checkpoints have
one set. All sums are made in the order of the ranks, so that all replicas end every step with the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.transport import Transport, gather_all
from penstock.engine.optim import build_optimizer, set_learning_rate
from penstock.engine.products import sum_rows
from penstock.engine.trainer import TrainConfig


class StageOptimizer:
    """Steps the parameters named in `owned`. All parts and replicas of a stage end with the same bits, as do
    any number of stages."""

    def __init__(
        self, model: nn.Module, owned: set[str], train: TrainConfig, layout: Layout, transport: Transport
    ) -> None:
        self._all = [(name, name in owned, parameter) for name, parameter in model.named_parameters()]
        self._parameters = [parameter for _, is_owned, parameter in self._all if is_owned and parameter.requires_grad]
        self._statistics = _running_statistics(model, owned)
        self._clip_norm, self._layout, self._transport = train.grad_clip, layout, transport
        self.optimizer = build_optimizer(self._parameters, train) if self._parameters else None

    @property
    def names(self) -> dict[int, str]:
        """Names of the model's parameters by their id()."""
        return {id(parameter): name for name, _, parameter in self._all}

    def step(self, rate: float) -> None:
        """Sum, clip, step and forget the gradients. Raises PeerLost."""
        layout, rank = self._layout, self._transport.rank
        with torch.no_grad():
            if layout.parts > 1:
                self._combine(layout.same_stage(rank), gradients_by=1, statistics_by=layout.parts)
            if layout.replicas > 1:
                self._combine(layout.same_place(rank), gradients_by=layout.replicas, statistics_by=layout.replicas)
            if self._clip_norm is not None:
                place = layout.part_of(rank), layout.replica_of(rank)
                self._clip(self._clip_norm, [layout.rank(place[0], s, place[1]) for s in range(layout.stages)])
        if self.optimizer is not None:
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)

    def _combine(self, ranks: Sequence[int], *, gradients_by: int, statistics_by: int) -> None:
        """Sum gradients and running statistics over `ranks`, and divide them."""
        gradients = [_gradient(parameter) for parameter in self._parameters]
        for tensors, divisor in ((gradients, gradients_by), (self._statistics, statistics_by)):
            self._sum(ranks, tensors)
            for tensor in tensors if divisor > 1 else ():
                tensor.div_(divisor)

    def _sum(self, ranks: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Make every tensor the sum of those of all `ranks`, added in their order."""
        if not tensors:
            return
        total = torch.zeros_like(flat := torch.cat([tensor.reshape(-1) for tensor in tensors]))
        for found in gather_all(self._transport, ranks, flat):
            total += found
        at = 0
        for tensor in tensors:
            tensor.copy_(total[at : at + tensor.numel()].view_as(tensor))
            at += tensor.numel()

    def _clip(self, limit: float, ranks: Sequence[int]) -> None:
        """Scale by the norm over all stages, added up per parameter in the model's order."""
        squares = torch.zeros(len(self._all), dtype=torch.float64)
        for n, (_, is_owned, parameter) in enumerate(self._all):
            if is_owned and parameter.grad is not None:
                squares[n] = sum_rows(parameter.grad.double().square().reshape(-1)).cpu()
        total = torch.stack(gather_all(self._transport, ranks, squares)).sum(0).sum().sqrt()
        scale = min(1.0, limit / (float(total) + 1e-6))
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)


def _running_statistics(model: nn.Module, owned: set[str]) -> list[Tensor]:
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    found = [(f"{name}.{key}", getattr(m, key)) for name, m in norms for key in ("running_mean", "running_var")]
    return [tensor for name, tensor in found if name in owned and tensor is not None]


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
