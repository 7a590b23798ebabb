"""What is said of a module that does not keep the contract, before any work is done for it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock.engine.aggregate import aggregate_mean
from penstock.engine.contract import check_model
from penstock.engine.minibatch import Block
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.usermodule import make_module

SHAPE: dict[str, Any] = {"num_layers": 2, "num_features": 5, "num_classes": 3, "multi_label": False}
TERMS: dict[str, Any] = {"degrees": False, "weighted": False, "by_layer": False}


class Own(nn.Module):
    """Keeps the contract."""

    def __init__(self, num_features: int, num_classes: int, hidden: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(num_features, hidden), nn.Linear(hidden, num_classes)

    def forward(self, blocks: Sequence[Block], x: Tensor) -> Any:
        for layer, block in zip((self.first, self.last), blocks, strict=True):
            x = layer(aggregate_mean(block, x))
        return x


def build(kind: type[nn.Module]) -> nn.Module:
    return make_module(kind, {"num_features": 5, "num_classes": 3})


class LikePyg(Own):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:  # type: ignore[override]
        return self.last(self.first(x))  # type: ignore[no-any-return]


class LikeDgl(Own):
    def forward(self, g: Any, h: Tensor) -> Tensor:
        with g.local_scope():
            return h


class OneArgument(Own):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x


class Nothing(Own):
    def forward(self, blocks: Sequence[Block], x: Tensor) -> None:
        super().forward(blocks, x)


class AllRows(Own):
    def forward(self, blocks: Sequence[Block], x: Tensor) -> Tensor:
        return torch.cat([super().forward(blocks, x)] * 2)


class Hidden(Own):
    def forward(self, blocks: Sequence[Block], x: Tensor) -> Tensor:
        return self.first(aggregate_mean(blocks[0], x))  # type: ignore[no-any-return]


class Detached(Own):
    def forward(self, blocks: Sequence[Block], x: Tensor) -> Any:
        return super().forward(blocks, x).detach()


class Frozen(Own):
    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes)
        self.requires_grad_(False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (LikePyg, r"LikePyg failed on two nodes \(at test_contract.py, line \d+\) with TypeError"),
        (LikeDgl, "LikeDgl failed on two nodes .* with AttributeError"),
        (OneArgument, "with TypeError"),
        (Nothing, "returned a NoneType for 2 seeds and 3 classes"),
        (AllRows, r"returned torch.float32 \[4, 3\]"),
        (Hidden, r"returned torch.float32 \[2, 4\]"),
        (Detached, "depend on none of its parameters"),
        (Frozen, "has no parameter to train"),
    ],
)
def test_a_broken_contract_is_stated(kind: type[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*forward\(blocks, x\)"):
        check_model(build(kind), **SHAPE, **TERMS)


def test_a_layer_of_pyg_is_told_what_it_gets() -> None:
    """PyG refuses our blocks with a ValueError of its own."""
    convolution = pytest.importorskip("torch_geometric.nn").SAGEConv

    class Pyg(nn.Module):
        def __init__(self, num_features: int, num_classes: int) -> None:
            super().__init__()
            self.layer = convolution(num_features, num_classes)

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.layer(x, edge_index)

    with pytest.raises(ValueError, match=r"Pyg failed on two nodes.*forward\(blocks, x\)"):
        check_model(build(Pyg), **SHAPE, **TERMS)


def test_a_constructor_is_told_what_it_gets() -> None:
    class Wrong(nn.Module):
        def __init__(self, in_channels: int, out_channels: int) -> None:
            super().__init__()

    with pytest.raises(ValueError, match=r"Wrong cannot be made with num_features, num_classes: missing.*Class\("):
        build(Wrong)


def test_an_error_of_the_users_own_code_passes_as_it_is() -> None:
    class Buggy(Own):
        def forward(self, blocks: Sequence[Block], x: Tensor) -> Tensor:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        check_model(build(Buggy), **SHAPE, **TERMS)


def test_layers_that_do_not_add_up_are_told_where_they_are_needed(caplog: pytest.LogCaptureFixture) -> None:
    check_model(build(Own), **SHAPE, **TERMS)
    assert "penstock infer will need --sampled for this model" in caplog.text
    with pytest.raises(ValueError, match="cannot be computed layer by layer"):
        check_model(build(Own), **SHAPE, **{**TERMS, "by_layer": True})


def test_more_layers_than_blocks_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """It would give the same on two blocks, and exact passes would go through all three layers."""

    class More(Own):
        def __init__(self, num_features: int, num_classes: int) -> None:
            super().__init__(num_features, num_classes)
            self.layers = nn.ModuleList(nn.Identity() for _ in range(3))

        def layer_forward(self, layer: int, block: Block, x: Tensor) -> Tensor:
            raise AssertionError("not called")

    with pytest.raises(ValueError, match="More has 3 `layers` for 2 blocks"):
        check_model(build(More), **SHAPE, **{**TERMS, "by_layer": True})


@pytest.mark.parametrize("kind", ["sage", "gcn", "gat", "gin", "gcnii", "resgcn", "dagnn"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_our_own_kinds_keep_it(kind: Any, multi_label: bool) -> None:
    model = build_model(ModelConfig(kind=kind, num_layers=2, hidden=8, norm="none"), 5, 3)
    check_model(model, **{**SHAPE, "multi_label": multi_label}, degrees=True, weighted=True, by_layer=True)
