"""What torch rounds by the number of threads, and whole models made of it, have the same bits on any number."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock.engine.fixed_order import BatchNorm, LayerNorm, binary_cross_entropy, elu, rows_of, sigmoid
from penstock.engine.metrics import node_loss
from penstock.engine.minibatch import Block
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.optim import OptimConfig, build_optimizer
from penstock.engine.products import torch_threads

THREADS = (1, 2, 3, 4, 8)
Shape = tuple[int, int]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with torch_threads(None):
        yield


def make(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_threads(compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What all numbers of threads give, to the last bit."""
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append(compute())
    for threads, others in zip(THREADS[1:], found[1:], strict=True):
        differing = [n for n, (a, b) in enumerate(zip(found[0], others, strict=True)) if not torch.equal(a, b)]
        assert not differing, f"{threads} threads: tensors {differing} differ"
    return found[0]


def values_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, make(9, *out.shape))


def times_rows(x: Tensor, factor: Tensor) -> Tensor:
    return x * rows_of(factor, len(x))


def times_one(x: Tensor, factor: Tensor) -> Tensor:
    return x * rows_of(factor.expand(x.shape[1]), len(x))


FUNCTIONS: dict[
    str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[Shape], list[Shape | tuple[int, ...]]]]
] = {
    "elu": (elu, nn.functional.elu, lambda shape: [shape]),
    "sigmoid": (sigmoid, torch.sigmoid, lambda shape: [shape]),
    "bias": (lambda x, b: x + rows_of(b, len(x)), torch.add, lambda shape: [shape, shape[1:]]),
    "factors": (times_rows, torch.mul, lambda shape: [shape, shape[1:]]),
    "one factor": (times_one, torch.mul, lambda shape: [shape, ()]),
}


@pytest.mark.parametrize("shape", [(70_001, 1), (20_011, 13), (1000, 128), (1, 5), (0, 4)], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, shape: Shape) -> None:
    ours, theirs, shapes = FUNCTIONS[name]
    inputs = [make(n, *one) for n, one in enumerate(shapes(shape))]
    found = on_threads(lambda: values_and_gradients(ours, *inputs))
    for a, b in zip(found, values_and_gradients(theirs, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_of_several_labels(reduction: str) -> None:
    logits, labels = make(0, 5003, 17), (make(1, 5003, 17) > 0).float()
    loss, grad = on_threads(lambda: values_and_gradients(lambda x: binary_cross_entropy(x, labels, reduction), logits))
    wanted = nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction=reduction)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
    assert grad.shape == logits.shape and grad.count_nonzero() > 0


@pytest.mark.parametrize("shape", [(50_001, 1), (20_011, 13), (1000, 128), (2, 5)], ids=str)
@pytest.mark.parametrize("kind", [LayerNorm, BatchNorm])
def test_norms(kind: type[LayerNorm] | type[BatchNorm], shape: Shape) -> None:
    x, width = make(0, *shape) * 3 + 2, shape[1]
    theirs = (nn.LayerNorm if kind is LayerNorm else nn.BatchNorm1d)(width)
    with torch.no_grad():
        theirs.weight.copy_(make(1, width))
        theirs.bias.copy_(make(2, width))

    def compute(module: nn.Module) -> tuple[Tensor, ...]:
        module.zero_grad()
        out, grad_x = values_and_gradients(module, x)
        module(x).backward(make(9, *shape))
        grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        return out, grad_x, *(grad.clone() for grad in grads), *(b.clone().float() for b in module.buffers())

    def fresh() -> tuple[Tensor, ...]:
        ours = kind(width)
        ours.load_state_dict(theirs.state_dict())
        return compute(ours)

    found = on_threads(fresh)
    wanted = compute(theirs)
    assert len(found) == len(wanted) == (4 if kind is LayerNorm else 7)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-3 * max(1.0, float(b.abs().max())))


def test_a_batch_norm_leaves_statistics_alone_when_told() -> None:
    norm = BatchNorm(3)
    norm.track_running_stats = False
    norm(make(0, 8, 3))
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="more than 1 value"):
        norm(make(0, 1, 3))


def block(num_src: int, num_dst: int, seed: int) -> Block:
    draw = torch.Generator().manual_seed(seed)
    degrees = torch.randint(0, 8, (num_dst,), generator=draw)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), degrees.cumsum(0)]).int()
    indices = torch.randint(0, num_src, (int(indptr[-1]),), generator=draw, dtype=torch.int32)
    whole = torch.randint(1, 20, (num_src,), generator=draw, dtype=torch.int32)
    return Block(num_src=num_src, num_dst=num_dst, indptr=indptr, indices=indices, src_degrees=whole)


MODELS: dict[str, dict[str, Any]] = {
    "sage": {"norm": "batch", "residual": True},
    "sage max": {"kind": "sage", "aggregator": "max", "norm": "layer", "activation": "elu"},
    "gcn": {"norm": "layer", "residual": True},
    "gat": {"heads": 4, "attention_dropout": 0.1, "activation": "elu"},
    "gin": {"norm": "batch"},
    "gcnii": {},
    "resgcn": {"activation": "elu"},
    "dagnn": {},
}


@pytest.mark.parametrize("several", [False, True], ids=["one label", "several labels"])
@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str, several: bool) -> None:
    """Three steps with dropout, clipping and Adam: losses and weights."""
    config = ModelConfig.model_validate(
        {"kind": name, "num_layers": 2, "hidden": 64, "input_dropout": 0.1, **MODELS[name]}
    )
    blocks, x = [block(3000, 1500, 1), block(1500, 701, 2)], make(0, 3000, 40)
    labels = (make(3, 701, 50) > 0).float() if several else torch.randint(0, 50, (701,))

    def compute() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        model = build_model(config, 40, 50)
        optimizer = build_optimizer(model.parameters(), OptimConfig(lr=0.01))
        losses = []
        for _ in range(3):
            loss = node_loss(model(blocks, x), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses), *(tensor.detach().clone() for tensor in model.state_dict().values())

    losses, *_ = on_threads(compute)
    assert losses[2] < losses[0]
