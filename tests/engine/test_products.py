"""Products and sums have the same bits on any number of threads; torch's own do not."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from penstock.engine.deferred import WeightGradients, linear
from penstock.engine.products import product, sum_rows, torch_threads, transposed_product

THREADS = (1, 2, 3, 4, 8)
SHAPES = [  # M, F, H
    (0, 8, 3),
    (1, 1, 1),
    (3, 128, 128),
    (1000, 128, 256),
    (1023, 7, 1),
    (4097, 65, 33),
    (8192, 256, 16),
    (20_001, 127, 64),
    (30_000, 1, 47),
    (66_000, 64, 1),
    (300, 1100, 1030),
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with torch_threads(None):
        yield


def make(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same_on_any_threads(compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append(compute())
        assert torch.get_num_threads() == threads
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
    return found[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_layer_and_its_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, features, outputs = shape
    x, grad = make(0, rows, features, dtype=dtype), make(1, rows, outputs, dtype=dtype)
    weight, bias = make(2, outputs, features, dtype=dtype), make(3, outputs, dtype=dtype)

    def compute() -> tuple[Tensor, ...]:
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        out = linear(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    found = assert_same_on_any_threads(compute)
    wanted = (x.double() @ weight.double().t() + bias, grad.double() @ weight.double(), grad.double().t() @ x.double())
    for ours, exact in zip(found, (*wanted, grad.double().sum(0)), strict=True):
        error = (ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)
        assert error < {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.02}[dtype]


def test_rows_that_lie_anywhere() -> None:
    """Slices that begin at any address, every second column, rows of a transposed matrix, one row for all."""
    base = make(0, 5000, 130)
    grad = make(1, 4000, 32)
    views = (base[1:4001, 1:66], base[:4000, ::2], make(2, 65, 4000).t(), make(3, 1, 65).expand(4000, 65))
    for x in views:
        found = assert_same_on_any_threads(lambda x=x: (product(x, grad[:65]), transposed_product(grad, x)))  # type: ignore[misc]
        torch.testing.assert_close(found[0], x @ grad[:65], rtol=1e-4, atol=1e-4)
        assert all(
            torch.equal(a, b)
            for a, b in zip(found, (product(x.clone(), grad[:65]), transposed_product(grad, x.clone())), strict=True)
        )


def test_waiting_changes_no_bit() -> None:
    x, grad = make(0, 9000, 40), make(1, 9000, 24)
    weight, late = (make(2, 24, 40).requires_grad_() for _ in range(2))
    linear(x, weight).backward(grad)  # type: ignore[no-untyped-call]
    with WeightGradients() as due:
        linear(x, late).backward(grad)  # type: ignore[no-untyped-call]
    assert late.grad is None and weight.grad is not None
    due.flush()
    assert torch.equal(weight.grad, late.grad)  # type: ignore[arg-type]  # mypy still thinks it is None


@pytest.mark.parametrize("shape", [(70_001, 1), (40_000, 3), (1, 1), (50_000, 2, 1), (3, 0)], ids=str)
def test_sums_over_rows(shape: tuple[int, ...]) -> None:
    x = make(0, *shape)
    (found,) = assert_same_on_any_threads(lambda: (sum_rows(x),))
    torch.testing.assert_close(found, x.double().sum(0).float(), rtol=1e-4, atol=1e-3)


def test_autocast_computes_in_half_and_gives_gradients_of_the_parameters_type() -> None:
    x, layer = make(0, 5000, 16), nn.Linear(16, 8)

    def compute() -> tuple[Tensor, ...]:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = linear(x, layer.weight, layer.bias)
        out.float().square().sum().backward()  # type: ignore[no-untyped-call]
        assert layer.weight.grad is not None and layer.bias.grad is not None
        return out.detach(), layer.weight.grad.clone(), layer.bias.grad.clone()

    out, weight, bias = assert_same_on_any_threads(compute)
    assert (out.dtype, weight.dtype, bias.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_inference_mode_and_errors_leave_threads_alone() -> None:
    torch.set_num_threads(3)
    x, weight = make(0, 9000, 16), make(1, 4, 16)
    with torch.inference_mode():
        assert torch.equal(linear(x, weight), product(x, weight.t()))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, make(1, 4, 15))
    assert torch.get_num_threads() == 3
