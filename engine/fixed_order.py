"""Functions of torch whose bits depend on the number of threads, made so that they do not; on a CPU only.

| function | what torch does |
|---|---|
| gradients of biases, of factors of all rows | sums to one number are cut by threads |
| gradients of a layer norm's weights, all of a batch norm | partial sums per thread |
| elu, sigmoid, binary cross entropy | where a thread's part ends, the last few values are rounded in another way |

On other devices everything is torch's own. Losses, gates and batch norms run on one thread; the rest runs on all.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine.products import in_tiles, sum_rows, torch_threads


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, num_rows: int) -> Tensor:
        return parameter.detach().expand(num_rows, *parameter.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return sum_rows(grads[0]), None


def rows_of(parameter: Tensor, num_rows: int) -> Tensor:
    """View a parameter [...] as `num_rows` equal rows [M, ...], to add it to rows or multiply them by it."""
    if parameter.device.type != "cpu":
        return parameter.expand(num_rows, *parameter.shape)
    return _Rows.apply(parameter, num_rows)  # type: ignore[no-untyped-call, no-any-return]


class _OnOneThread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[1:]
        with torch_threads(1), torch.set_grad_enabled(any(needed)):
            ctx.inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
            ctx.out = function(*ctx.inputs)
        return ctx.out.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch_threads(1):
            found = iter(torch.autograd.grad(ctx.out, [x for x in ctx.inputs if x.requires_grad], grads[0]))
        return None, *(next(found) if x.requires_grad else None for x in ctx.inputs)


def on_one_thread(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Apply a function, and its backward pass, on one thread."""
    if inputs[0].device.type != "cpu":
        return function(*inputs)
    return _OnOneThread.apply(function, *inputs)  # type: ignore[no-untyped-call, no-any-return]


def sigmoid(x: Tensor) -> Tensor:
    """torch's, for a column of gates."""
    return on_one_thread(torch.sigmoid, x)


def binary_cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """torch's, of logits."""
    loss = nn.functional.binary_cross_entropy_with_logits
    return on_one_thread(lambda x: loss(x, labels, reduction=reduction), logits)


class _Elu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = in_tiles(nn.functional.elu, x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        return out.clamp(max=0).add_(1).mul_(grads[0])  # the slope is 1 above zero, exp(x) = out + 1 below


def elu(x: Tensor) -> Tensor:
    """torch's, of rows [M, F]."""
    if x.device.type != "cpu" or x.ndim != 2:
        return nn.functional.elu(x)
    return _Elu.apply(x)  # type: ignore[no-untyped-call, no-any-return]


class _LayerNorm(torch.autograd.Function):
    """Rows have mean 0 and variance 1: rows are torch's own in both passes, sums over rows are ours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, mean, inverse = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, inverse, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, mean, inverse, weight, bias) = grads, ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad, x, weight.shape, mean, inverse, weight, bias, [True, False, False]
            )[0]
        normed = (x - mean).mul_(inverse)
        return grad_x, sum_rows(normed.mul_(grad)), sum_rows(grad), None


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` of rows, with weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        """[M, F] to [M, F]."""
        if x.device.type != "cpu":
            return super().forward(x)
        out: Tensor = _LayerNorm.apply(x.to(self.weight.dtype), self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        return out.to(x.dtype)


class BatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` of rows, with weight, bias and running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """[M, F] to [M, F]. ValueError for a single row in training."""
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum, eps = self.momentum or 0.0, self.eps

        def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return nn.functional.batch_norm(x, *running, weight, bias, True, momentum, eps)

        return on_one_thread(norm, x, self.weight, self.bias)
