import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from penstock.engine.layers import GATConv, SAGEConv
from penstock.engine.minibatch import Block
from penstock.engine.models import (
    ModelConfig,
    build_model,
    check_layer_forward,
    layer_forward,
    needs_degrees,
)
from penstock.engine.native import transpose
from penstock.engine.usermodule import load_class

KINDS = ["sage", "gcn", "gat", "gin"]
FEATURES, CLASSES = 6, 3


def make_blocks(*sizes: int) -> list[Block]:
    """Random blocks that chain: each one's destinations are the next one's sources."""
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for num_src, num_dst in zip(sizes, sizes[1:], strict=False):
        indptr = torch.arange(0, 3 * num_dst + 1, 3, dtype=torch.int32)
        indices = torch.randint(0, num_src, (3 * num_dst,), generator=generator, dtype=torch.int32)
        degrees = torch.randint(3, 9, (num_src,), generator=generator, dtype=torch.int32)
        blocks.append(Block(num_src=num_src, num_dst=num_dst, indptr=indptr, indices=indices, src_degrees=degrees))
    return blocks


@pytest.fixture
def blocks() -> list[Block]:
    return make_blocks(40, 20, 10, 4)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(40, FEATURES, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("residual", [False, True])
def test_every_model_trains_and_works_layer_by_layer(
    kind: Any, norm: Any, residual: bool, blocks: list[Block], x: Tensor
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(kind=kind, norm=norm, residual=residual, hidden=8, dropout=0.1, activation="elu")
    model = build_model(config, FEATURES, CLASSES, num_layers=3)
    check_layer_forward(model, blocks, x)
    labels = torch.tensor([0, 1, 2, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(blocks, x), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_one_layer_and_the_layers_attribute(x: Tensor) -> None:
    model: Any = build_model(ModelConfig(num_layers=1), FEATURES, CLASSES)
    assert len(model.layers) == 1 and isinstance(model.layers[0], SAGEConv)
    assert model(make_blocks(40, 5), x).shape == (5, CLASSES)
    gat: Any = build_model(ModelConfig(kind="gat", hidden=8, heads=2, num_layers=2), FEATURES, CLASSES)
    assert isinstance(gat.layers[1], GATConv) and gat.layers[0].concat and not gat.layers[1].concat


def test_dropout_follows_torchs_seed_and_stops_in_evaluation(blocks: list[Block], x: Tensor) -> None:
    model = build_model(ModelConfig(dropout=0.5, input_dropout=0.3, hidden=8), FEATURES, CLASSES)
    torch.manual_seed(3)
    first = model(blocks, x)
    assert not torch.equal(first, model(blocks, x))
    torch.manual_seed(3)
    assert torch.equal(first, model(blocks, x))
    model.eval()
    assert torch.equal(model(blocks, x), model(blocks, x))


def test_layers_stand_alone(blocks: list[Block], x: Tensor) -> None:
    """A layer moved out of its model computes the same: nothing of the rest is needed."""
    model: Any = build_model(ModelConfig(kind="gcn", dropout=0), FEATURES, CLASSES)
    copy = type(model.layers[0])(FEATURES, 128)
    copy.load_state_dict(model.layers[0].state_dict())
    assert torch.equal(copy(blocks[0], x), model.layers[0](blocks[0], x))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"hiden": 3}, "hiden"),
        ({"kind": "gat", "hidden": 10}, "hidden=10 is no multiple of heads=4"),
        ({"kind": "custom"}, "kind custom and a module go together"),
        ({"module": "a:B"}, "kind custom and a module go together"),
        ({"kwargs": {"a": 1}}, "are for kind custom"),
        ({"kind": "gcn", "edge_weights": True}, "edge_weights is for kind sage"),
        ({"dropout": 1.0}, "less than 1"),
        ({"num_layers": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_configs_are_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(value)


def test_numbers_of_layers_have_to_agree(blocks: list[Block], x: Tensor) -> None:
    with pytest.raises(ValueError, match="num_layers=3, but there are 2 fanouts"):
        build_model(ModelConfig(), FEATURES, CLASSES, num_layers=2)
    with pytest.raises(ValueError, match="2 blocks, the model 3 layers"):
        build_model(ModelConfig(), FEATURES, CLASSES)(blocks[:2], x)


def test_needs_degrees_matches_what_the_layers_say() -> None:
    assert [needs_degrees(ModelConfig(kind=kind)) for kind in KINDS] == [False, True, False, True]  # type: ignore[arg-type]
    for kind in KINDS:
        model: Any = build_model(ModelConfig(kind=kind), FEATURES, CLASSES)  # type: ignore[arg-type]
        assert model.needs_degrees == any(getattr(layer, "needs_degrees", False) for layer in model.layers)


USER_MODULE = """
import torch
from torch import nn
from penstock.engine.layers import SAGEConv

class Plain(nn.Module):
    needs_degrees = True
    def __init__(self, num_features, num_classes, hidden=5, relu=False):
        super().__init__()
        self.relu = relu
        self.layers = nn.ModuleList([SAGEConv(num_features, hidden), SAGEConv(hidden, num_classes)])
    def forward(self, blocks, x):
        x = self.layers[0](blocks[0], x)
        return self.layers[1](blocks[1], torch.relu(x) if self.relu else x)

class Opaque(nn.Module):
    def __init__(self, num_features, num_classes):
        super().__init__()
        self.linear = nn.Linear(num_features, num_classes)
    def forward(self, blocks, x):
        return self.linear(x[: blocks[-1].num_dst])

constant = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_models.py").write_text(USER_MODULE)
    (tmp_path / "lame.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_models", "lame"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "my_models"


def custom(module: str, **kwargs: Any) -> ModelConfig:
    return ModelConfig(kind="custom", module=module, kwargs=kwargs)


def test_a_users_module_comes_by_import_path(user_module: str, x: Tensor) -> None:
    blocks = make_blocks(40, 20, 4)
    config = custom("my_models:Plain", hidden=7)
    model: Any = build_model(config, FEATURES, CLASSES, num_layers=2)
    assert model.layers[0].own.out_features == 7
    assert model(blocks, x).shape == (4, CLASSES)
    assert needs_degrees(config) and not needs_degrees(custom("my_models:Opaque"))
    check_layer_forward(model, blocks, x)


def test_a_module_that_is_not_its_layers_is_found_out(user_module: str, x: Tensor) -> None:
    blocks = make_blocks(40, 20, 4)
    with pytest.raises(ValueError, match="does not give layer by layer"):
        check_layer_forward(build_model(custom("my_models:Plain", relu=True), FEATURES, CLASSES), blocks, x)
    with pytest.raises(ValueError, match=r"Opaque has neither layer_forward\(layer, block, x\) nor layers"):
        layer_forward(build_model(custom("my_models:Opaque"), FEATURES, CLASSES), 0, blocks[0], x)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_models", "write pkg.mod:Class"),
        ("my_models:", "write pkg.mod:Class"),
        ("my_model:Plain", "no module 'my_model'; did you mean my_models?"),
        ("penstock.engin:Plain", r"no module 'penstock.engin'; did you mean penstock.engine\?"),
        ("my_models:Plane", "'Plane' in my_models does not exist; it has Plain"),
        ("my_models:constant", "'constant' in my_models is no subclass of torch.nn.Module"),
    ],
)
def test_wrong_import_paths_name_the_nearest(user_module: str, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_class(path)


def test_a_dependency_that_the_users_module_lacks_is_not_hidden(user_module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_class("lame:Model")


def test_transposing_twice_gives_the_block_back() -> None:
    """Up to the order of edges within a row, which becomes ascending."""
    block = make_blocks(30, 12)[0]
    by_source = transpose(block, edges=True)
    back = transpose(Block(num_src=12, num_dst=30, indptr=by_source.indptr, indices=by_source.indices))
    assert torch.equal(back.indptr, block.indptr)
    assert torch.equal(back.indices.view(12, 3), block.indices.view(12, 3).sort(dim=1).values)
    assert by_source.edges is not None and torch.equal(by_source.edges.sort().values, torch.arange(36).int())
