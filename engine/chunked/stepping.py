"""The optimizer step of one rank: gradients summed over parts, clipped by the norm over stages, for its own weights.

A batch norm's running statistics are averaged over parts at every step: evaluations and checkpoints have one set.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.transport import Transport, gather_all
from penstock.engine.optim import build_optimizer, set_learning_rate
from penstock.engine.trainer import TrainConfig


class StageOptimizer:
    """Steps the parameters named in `owned`. All parts of a stage end with the same bits, as do any number of
    stages."""

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
        part = self._layout.part_of(self._transport.rank)
        stage = self._layout.stage_of(self._transport.rank)
        with torch.no_grad():
            if self._layout.parts > 1:
                peers = [self._layout.rank(p, stage) for p in range(self._layout.parts)]
                self._sum(peers, [_gradient(parameter) for parameter in self._parameters])
                self._sum(peers, self._statistics)
                for tensor in self._statistics:
                    tensor.div_(self._layout.parts)
            if self._clip_norm is not None:
                self._clip(self._clip_norm, [self._layout.rank(part, s) for s in range(self._layout.stages)])
        if self.optimizer is not None:
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)

    def _sum(self, ranks: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Make every tensor the sum of those of all `ranks`, added in the order of the parts."""
        if not tensors:
            return
        total = torch.zeros_like(flat := torch.cat([tensor.reshape(-1) for tensor in tensors]))
        for part in gather_all(self._transport, ranks, flat):
            total += part
        at = 0
        for tensor in tensors:
            tensor.copy_(total[at : at + tensor.numel()].view_as(tensor))
            at += tensor.numel()

    def _clip(self, limit: float, ranks: Sequence[int]) -> None:
        """Scale by the norm over all stages, added up per parameter in the model's order."""
        squares = torch.zeros(len(self._all), dtype=torch.float64)
        for n, (_, is_owned, parameter) in enumerate(self._all):
            if is_owned and parameter.grad is not None:
                squares[n] = parameter.grad.double().square().sum().cpu()
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
