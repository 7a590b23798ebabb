import threading

import pytest
import torch
from torch import Tensor, nn

from penstock.engine.deferred import Linear, WeightGradients, linear


def make(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def weight() -> Tensor:
    return make(1, 3, 5).requires_grad_()


@pytest.fixture
def bias() -> Tensor:
    return make(2, 3).requires_grad_()


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def test_only_the_weight_waits_and_all_equal_autograd(weight: Tensor, bias: Tensor) -> None:
    x, grad = make(0, 7, 5).requires_grad_(), make(3, 7, 3)
    wanted = torch.autograd.grad(nn.functional.linear(x, weight, bias), (x, weight, bias), grad)
    with WeightGradients() as due:
        out = linear(x, weight, bias)
    assert torch.equal(out, nn.functional.linear(x, weight, bias))
    out.backward(grad)  # type: ignore[no-untyped-call]
    assert weight.grad is None and due.num_bytes == 8 * (7 * 5 + 7 * 3)
    torch.testing.assert_close(grad_of(x), wanted[0])
    torch.testing.assert_close(grad_of(bias), wanted[2])
    due.flush()
    torch.testing.assert_close(grad_of(weight), wanted[1])
    assert due.num_bytes == 0
    due.flush()
    torch.testing.assert_close(grad_of(weight), wanted[1])


def test_tied_weights_and_chunks_accumulate_in_the_order_of_flushes(weight: Tensor) -> None:
    collectors, inputs = [WeightGradients() for _ in range(2)], [make(n, 4, 5) for n in range(2)]
    for collector, x in zip(collectors, inputs, strict=True):
        with collector:
            out = linear(x, weight) + linear(2 * x, weight)
        out.sum().backward()  # type: ignore[no-untyped-call]
    for collector in collectors:
        collector.flush()
    first = grad_of(weight).clone()
    ones = torch.ones(3, 4, dtype=torch.float64)
    torch.testing.assert_close(first, sum(3 * ones @ x for x in inputs))
    weight.grad = None
    for collector, x in zip(collectors, inputs, strict=True):
        with collector:
            out = linear(x, weight) + linear(2 * x, weight)
        out.sum().backward()  # type: ignore[no-untyped-call]
        collector.flush()  # at once instead of at the end: the same bits
    assert torch.equal(grad_of(weight), first)


def test_the_collector_is_that_of_the_forward_pass_and_of_the_thread(weight: Tensor) -> None:
    outer, inner, x = WeightGradients(), WeightGradients(), make(0, 4, 5)
    elsewhere: list[Tensor] = []
    with outer:
        first = linear(x, weight)
        with inner:
            second = linear(x, weight)
            thread = threading.Thread(target=lambda: elsewhere.append(linear(x, weight)))
            thread.start()
            thread.join()
        third = linear(x, weight)
    with inner:
        (first + third).sum().backward()  # type: ignore[no-untyped-call]
    assert outer.num_bytes and not inner.num_bytes
    second.sum().backward()  # type: ignore[no-untyped-call]
    assert inner.num_bytes and weight.grad is None
    elsewhere[0].sum().backward()
    assert weight.grad is not None


def test_nothing_waits_without_need(weight: Tensor, bias: Tensor) -> None:
    x = make(0, 4, 5).requires_grad_()
    with WeightGradients() as due:
        frozen = linear(x, weight.detach(), bias)
        with torch.no_grad():
            linear(x, weight)
        product = linear(x, 2 * weight)  # no leaf: its gradient has to flow on
        three = linear(x[None], weight)
    for out in (frozen, product, three):
        out.sum().backward()  # type: ignore[no-untyped-call]
    assert due.num_bytes == 0 and weight.grad is not None and x.grad is not None
    WeightGradients().flush()


def test_shared_inputs_count_once(weight: Tensor) -> None:
    x = make(0, 6, 5)
    with WeightGradients() as due:
        out = linear(x, weight) + linear(x, weight)
        (out.sum() + linear(x[:2], weight).sum()).backward()  # type: ignore[no-untyped-call]
    held = 8 * x.numel()
    assert held < due.num_bytes <= held + 8 * 3 * (6 + 6 + 2)


def test_the_module_is_nn_linear_but_for_the_wait() -> None:
    torch.manual_seed(0)
    ours = Linear(5, 3)
    torch.manual_seed(0)
    theirs = nn.Linear(5, 3)
    x = torch.randn(4, 5)
    assert torch.equal(ours(x), theirs(x)) and list(ours.state_dict()) == list(theirs.state_dict())
    with WeightGradients() as due:
        ours(x).sum().backward()
    theirs(x).sum().backward()
    assert ours.weight.grad is None and torch.equal(grad_of(ours.bias), grad_of(theirs.bias))
    due.flush()
    torch.testing.assert_close(grad_of(ours.weight), grad_of(theirs.weight))
