"""Linear maps whose weight gradients can wait: backward gives the gradient of the input, `flush` those of the weights.

The gradient of the input is what the stage before waits for; the weight's is as much work and nobody waits for it until
the optimizer steps, so it may fill a pipeline's bubble. This is the split of zero-bubble schedules (Qi et al., ICLR
2024, section 2), here for matrices only: biases and other parameters get their gradients in backward. On a CPU the
bits of all products are those of `products`: they do not depend on threads, and waiting changes none.
"""

import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from penstock.engine.products import product, sum_rows, transposed_product

Record = Callable[[Tensor, Tensor], None]


class WeightGradients:
    """Collects weight gradients that are due; `with` it around a forward pass, `flush` it after the backward pass.

    Which collector is meant is settled in the forward pass, per thread, so several may be open at a time. Inputs and
    output gradients are held, not copied, until then: their memory must not be written to before `flush`.
    """

    def __init__(self) -> None:
        self._due: list[tuple[Tensor, Tensor, Tensor]] = []
        self._outer: list[WeightGradients | None] = []

    def __enter__(self) -> "WeightGradients":
        self._outer.append(_current())
        _here.collector = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _here.collector = self._outer.pop()

    def record(self, weight: Tensor, x: Tensor, grad: Tensor) -> None:
        """Note that weight.grad lacks grad^T x, for `weight` [H, F], `x` [M, F], `grad` [M, H]."""
        self._due.append((weight, x, grad))

    def flush(self) -> None:
        """Add what is due to the weights' gradients, in the order in which backward came to it."""
        due, self._due = self._due, []
        for weight, x, grad in due:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.add_(_weight_gradient(grad.to(weight.dtype), x.to(weight.dtype)))

    @property
    def num_bytes(self) -> int:
        """Memory that is held for what is due; storage that several inputs share counts once."""
        held = [tensor.untyped_storage() for _, x, grad in self._due for tensor in (x, grad)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


class _Here(threading.local):
    collector: WeightGradients | None = None


_here = _Here()


def _current() -> WeightGradients | None:
    return _here.collector


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.device.type == "cpu":
        return product(x, matrix, bias)
    return x @ matrix if bias is None else torch.addmm(bias, x, matrix)


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return transposed_product(grad, x) if x.device.type == "cpu" else grad.t() @ x


class _Linear(torch.autograd.Function):
    """x W^T + b; where there is a `record`, it is told of the weight's gradient, which waits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, record: Record | None) -> Tensor:
        ctx.record = record
        ctx.save_for_backward(x, weight)
        return _product(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        grad_weight = None
        if ctx.record is not None:
            ctx.record(x.detach(), grad.detach())
        elif ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, x)
        grad_x = _product(grad, weight) if ctx.needs_input_grad[0] else None
        grad_bias = sum_rows(grad) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for `x` [M, F], `weight` [H, F], `bias` [H]; the weight's gradient waits if a collector is active."""
    collector = _current()
    waits = torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf
    record = partial(collector.record, weight) if collector is not None and waits else None
    device = x.device.type
    if x.ndim != 2 or (record is None and device != "cpu"):
        return nn.functional.linear(x, weight, bias)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Linear.apply(x, weight, bias, record)  # type: ignore[no-untyped-call, no-any-return]


class Linear(nn.Linear):
    """`nn.Linear` whose weight gradient can wait."""

    def forward(self, x: Tensor) -> Tensor:
        """[M, F] to [M, H]."""
        return linear(x, self.weight, self.bias)
