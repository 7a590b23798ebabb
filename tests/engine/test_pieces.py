"""The path of other devices and types, on the CPU: sums in float32, never a row per edge, the same in any pieces."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.engine import aggregate, pieces
from penstock.engine.aggregate import (
    aggregate_max,
    aggregate_mean,
    aggregate_sum,
    aggregate_weighted,
    aggregate_weighted_mean,
    edge_softmax,
)
from penstock.engine.blockcache import BlockCache
from penstock.engine.exact import exact_embeddings
from penstock.engine.minibatch import Block
from penstock.engine.models import ModelConfig, build_model
from penstock.storage.budget import MIB
from penstock.storage.graph import GraphStore

HALF = [torch.float16, torch.bfloat16]


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU do as a GPU does."""
    monkeypatch.setattr(aggregate, "_is_native", lambda x: False)


def star(edges: int, *, turned: bool = False) -> Block:
    """One destination with many sources, or many destinations with one source."""
    if turned:
        indptr, indices = torch.arange(edges + 1), torch.zeros(edges)
        return Block(num_src=edges, num_dst=edges, indptr=indptr.int(), indices=indices.int())
    indices = torch.arange(1, edges + 1)
    return Block(
        num_src=edges + 1, num_dst=1, indptr=torch.tensor([0, edges], dtype=torch.int32), indices=indices.int()
    )


def random_block(seed: int, num_dst: int = 40, num_src: int = 60) -> Block:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 9, (num_dst,), generator=generator)
    counts[3], counts[num_dst - 1] = 50, 0
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    indices = torch.randint(0, num_src, (int(indptr[-1]),), generator=generator).int()
    return Block(num_src=num_src, num_dst=num_dst, indptr=indptr, indices=indices, cache=BlockCache())


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("edges", [300, 1000, 5000])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, edges: int) -> None:
    x = torch.ones(edges + 1, 4, dtype=dtype)
    assert (aggregate_mean(star(edges), x) == 1).all()
    assert (aggregate_weighted_mean(star(edges), x, torch.full((edges,), 0.25)) == 1).all()
    scores = torch.zeros(edges + 1, 1, dtype=dtype)
    alpha = edge_softmax(star(edges), scores, scores[:1])
    assert alpha.dtype == dtype and float(alpha.float().sum()) == pytest.approx(1, abs=0.01)
    leaf = torch.ones(edges, 4, dtype=dtype, requires_grad=True)
    out = aggregate_sum(star(edges, turned=True), leaf)
    out.sum(dtype=torch.float32).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None and leaf.grad.dtype == out.dtype == dtype
    assert (leaf.grad[0] == torch.tensor(edges).to(dtype)).all() and (leaf.grad[1:] == 0).all()


def calls(block: Block) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    torch.manual_seed(5)
    x, weights = torch.randn(block.num_src, 6), torch.rand(block.num_edges, 3)
    src, dst = torch.rand(block.num_src), torch.rand(block.num_dst)
    return {
        "sum": (lambda x: aggregate_sum(block, x, src_scale=src, dst_scale=dst, own_scale=dst + 1), [x]),
        "weighted": (lambda x, w: aggregate_weighted(block, x, w), [x, weights]),
        "weighted mean": (lambda x, w: aggregate_weighted_mean(block, x, w[:, 0]), [x, weights]),
        "max": (lambda x: aggregate_max(block, x), [x.round()]),
    }


@pytest.mark.parametrize("name", ["sum", "weighted", "weighted mean", "max"])
@pytest.mark.parametrize("num_bytes", [1, 100, 1000])
def test_any_pieces_give_what_the_kernels_give(name: str, num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their gradients; a hub's edges are cut too."""
    function, inputs = calls(random_block(1))[name]

    def run() -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in inputs]
        out = function(*leaves)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    wanted = run()
    monkeypatch.setattr(aggregate, "_is_native", lambda x: False)
    monkeypatch.setattr(pieces, "_HOST_BYTES", num_bytes)
    for ours, theirs in zip(run(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("no_kernels")
def test_a_nan_is_not_lost() -> None:
    x = torch.tensor([[1.0], [torch.nan], [3.0]])
    block = Block(num_src=3, num_dst=2, indptr=torch.tensor([0, 2, 3]).int(), indices=torch.tensor([1, 2, 2]).int())
    for leaf in (x, x.clone().requires_grad_()):
        assert torch.equal(aggregate_max(block, leaf).isnan(), torch.tensor([[True], [False]]))


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Notes the bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.num_bytes = max(self.num_bytes, value.untyped_storage().nbytes())
        return out


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("kind", ["sage", "max", "weighted", "gcn", "gat", "gin"])
def test_no_layer_holds_a_row_per_edge(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does its backward pass, but for maxima, which have their own rows."""
    monkeypatch.setattr(pieces, "_HOST_BYTES", 1 << 16)
    nodes, edges, width = 200, 60_000, 32
    indices = torch.randint(0, nodes, (edges,), generator=torch.Generator().manual_seed(1)).int()
    block = Block(
        num_src=nodes,
        num_dst=nodes,
        indptr=torch.arange(0, edges + 1, edges // nodes).int(),
        indices=indices,
        edge_weights=torch.ones(edges),
        src_degrees=torch.full((nodes,), edges // nodes, dtype=torch.int32),
    )
    special: dict[str, dict[str, Any]] = {"max": {"aggregator": "max"}, "weighted": {"edge_weights": True}}
    options = special.get(kind, {})
    config = ModelConfig(kind="sage" if options else kind, num_layers=1, hidden=width, heads=1, **options)  # type: ignore[arg-type]
    model, x = build_model(config, width, width), torch.randn(nodes, width, requires_grad=True)
    with Largest() as largest:
        model([block], x).sum().backward()
    assert 0 < largest.num_bytes <= 9 * edges < 4 * edges * width // 8


@pytest.mark.usefixtures("no_kernels")
def test_exact_tables_keep_the_budget(tiny_graph: GraphStore, tmp_path: Path) -> None:
    model = build_model(ModelConfig(kind="gcn", num_layers=2, hidden=512), 20, 4)
    with Largest() as largest:
        table = exact_embeddings(model, tiny_graph, tmp_path / "a", host_memory=5 * MIB, threads=1)
    assert largest.num_bytes <= max(pieces._HOST_BYTES, 5 * MIB)
    wanted = exact_embeddings(model, tiny_graph, tmp_path / "b", host_memory=64 * MIB, threads=1)
    torch.testing.assert_close(torch.from_numpy(table.open().copy()), torch.from_numpy(wanted.open().copy()))
