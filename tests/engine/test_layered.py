"""Models taken apart: whole against parts, whole graph against chunks with a full halo, in float64 on torch's path."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock.engine.blockcache import BlockCache
from penstock.engine.deferred import Linear, WeightGradients
from penstock.engine.dropout import Draws, NodeDropout
from penstock.engine.layered import (
    LayeredModel,
    apply_layer,
    boundary_widths,
    check_chunkable,
    enter,
    first_hidden,
    frozen_statistics,
    leave,
    uses_initial,
)
from penstock.engine.layers import SAGEConv
from penstock.engine.minibatch import Block
from penstock.engine.models import ModelConfig, build_model, layer_forward

FEATURES, CLASSES, NODES, LAYERS = 6, 3, 40, 4
KINDS: list[dict[str, Any]] = [
    {"kind": "sage"},
    {"kind": "sage", "aggregator": "max", "residual": True},
    {"kind": "gcn", "norm": "layer"},
    {"kind": "gat", "heads": 2, "attention_dropout": 0.4},
    {"kind": "gin"},
    {"kind": "gcnii"},
    {"kind": "resgcn"},
    {"kind": "dagnn"},
]
every_kind = pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))


def make_model(options: dict[str, Any], dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    torch.manual_seed(2)
    config = ModelConfig(**{"num_layers": LAYERS, "hidden": 8, "dropout": 0.4, "input_dropout": 0.2, **options, **more})
    return build_model(config, FEATURES, CLASSES).to(dtype)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(NODES, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def graph() -> Block:
    """All nodes as sources and destinations; in-degrees 0 to 6, some edges twice, some from a node to itself."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 7, (NODES,), generator=generator)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    indices = torch.randint(0, NODES, (int(indptr[-1]),), generator=generator, dtype=torch.int32)
    dst = torch.repeat_interleave(torch.arange(NODES), counts)
    loops = torch.bincount(dst[indices == dst], minlength=NODES).int()
    return Block(
        num_src=NODES, num_dst=NODES, indptr=indptr, indices=indices, src_degrees=counts.int(), src_loops=loops
    )


def drawn(block: Block, layer: int, ids: Tensor | None = None) -> Block:
    return replace(block, draws=Draws(key=99, layer=layer, src_ids=torch.arange(NODES) if ids is None else ids))


def cut(graph: Block, own: Tensor) -> tuple[Block, Tensor]:
    """The block of some nodes, and the ids of its sources: the nodes, then those that they read, descending."""
    spans = [graph.indices[int(graph.indptr[v]) : int(graph.indptr[v + 1])] for v in own.tolist()]
    edges = torch.cat(spans).long()
    halo = torch.tensor(sorted(set(edges.tolist()) - set(own.tolist()), reverse=True), dtype=torch.int64)
    ids = torch.cat([own, halo])
    local = torch.full((NODES,), -1).index_copy(0, ids, torch.arange(len(ids)))
    assert graph.src_degrees is not None and graph.src_loops is not None
    return Block(
        num_src=len(ids),
        num_dst=len(own),
        indptr=torch.tensor([0, *(len(span) for span in spans)]).cumsum(0).int(),
        indices=local[edges].int(),
        src_degrees=graph.src_degrees[ids],
        src_loops=graph.src_loops[ids],
    ), ids


def run_parts(model: nn.Module, graph: Block, x: Tensor, *, draws: bool = False) -> Tensor:
    def block(layer: int) -> Block:
        return drawn(graph, layer) if draws else graph

    h, initial = enter(model, block(0), x)
    for layer in range(first_hidden(model), LAYERS):
        h, initial = apply_layer(model, layer, block(layer), h, initial)
    return leave(model, h, initial)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_parts_are_the_whole(options: dict[str, Any], dtype: torch.dtype, graph: Block, x: Tensor) -> None:
    model, x = make_model(options, dtype).eval(), x.to(dtype)
    whole = model([graph] * LAYERS, x)
    assert torch.equal(run_parts(model, graph, x), whole)
    state = x
    for layer in range(LAYERS):
        state = layer_forward(model, layer, graph, state)
    assert torch.equal(state, whole) and whole.shape == (NODES, CLASSES)


@every_kind
def test_chunks_with_a_full_halo_give_the_whole_graphs_training_step(
    options: dict[str, Any], graph: Block, x: Tensor
) -> None:
    """Rows, and all gradients, with dropout: no mask depends on how the graph is cut."""
    model = make_model(options)
    whole = run_parts(model, graph, x, draws=True)
    weight = torch.randn(whole.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (whole * weight).sum().backward()  # type: ignore[no-untyped-call]
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    order = torch.randperm(NODES, generator=torch.Generator().manual_seed(5))
    pieces = [own.sort().values for own in order.tensor_split(3)]
    chunks = [cut(graph, own) for own in pieces]
    back = torch.argsort(torch.cat(pieces))
    rows = [enter(model, drawn(block, 0, ids), x[ids]) for block, ids in chunks]
    for layer in range(first_hidden(model), LAYERS):
        table = torch.cat([h for h, _ in rows])[back]
        rows = [
            apply_layer(model, layer, drawn(block, layer, ids), table[ids], initial)
            for (block, ids), (_, initial) in zip(chunks, rows, strict=True)
        ]
    out = torch.cat([leave(model, h, initial) for h, initial in rows])[back]
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    (out * weight).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-11, atol=1e-12)


@every_kind
def test_a_forward_pass_without_gradients_has_the_bits_of_the_one_with(
    options: dict[str, Any], graph: Block, x: Tensor
) -> None:
    model, x = make_model(options, torch.float32), x.float()
    out = run_parts(model, graph, x, draws=True)
    with torch.no_grad():
        assert torch.equal(run_parts(model, graph, x, draws=True), out)


@every_kind
def test_a_cache_changes_no_bit(options: dict[str, Any], graph: Block, x: Tensor) -> None:
    model = make_model(options, torch.float32)
    cached = replace(graph, cache=BlockCache())
    found = []
    for block in (graph, cached, cached):
        model.zero_grad()
        out = run_parts(model, block, x.float(), draws=True)
        out.sum().backward()  # type: ignore[no-untyped-call]
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, first, second in zip(*found, strict=True):
        assert torch.equal(plain, first) and torch.equal(plain, second)


def refuse() -> Any:
    raise AssertionError("made twice")


def test_what_is_derived_from_a_block_is_made_once(graph: Block, x: Tensor) -> None:
    expected = {"sage": ["by source"], "gcn": ["by source", "gcn torch.float32"], "gat": ["with self-loops"]}
    for kind, names in expected.items():
        cache = BlockCache()
        run_parts(make_model({"kind": kind}, torch.float32), replace(graph, cache=cache), x.float()).sum().backward()  # type: ignore[no-untyped-call]
        made = [cache.get(name, refuse) for name in names]
        if kind == "gat":  # the block with self-loops has a cache of its own, and never an old pass's draws
            assert made[0].draws is None and made[0].cache.get("edges by source", refuse) is not None


@every_kind
def test_gradients_of_all_matrices_wait(options: dict[str, Any], graph: Block, x: Tensor) -> None:
    model = make_model(options)
    run_parts(model, graph, x, draws=True).square().sum().backward()  # type: ignore[no-untyped-call]
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with WeightGradients() as due:
        out = run_parts(model, graph, x, draws=True)
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    waiting = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert waiting == {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    due.flush()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-11, atol=1e-12)


def test_where_hidden_rows_begin_and_how_wide_they_are() -> None:
    for options in KINDS:
        model, deep = make_model(options), options["kind"] in ("gcnii", "resgcn", "dagnn")
        initial = options["kind"] in ("gcnii", "dagnn")
        width = CLASSES + 1 if options["kind"] == "dagnn" else 8
        assert (first_hidden(model), uses_initial(model)) == (0 if deep else 1, initial)
        assert boundary_widths(model, FEATURES) == ([width] * (LAYERS if deep else LAYERS - 1), initial * width)
        check_chunkable(model, FEATURES)
        assert model.training


def test_an_encoder_draws_unlike_layer_0(graph: Block) -> None:
    """Both drop their input; with one mask for both, a node would lose the same columns twice."""

    class Encoder(nn.Module):
        takes_block = True

        def __init__(self) -> None:
            super().__init__()
            self.dropout = NodeDropout(0.5)

        def forward(self, block: Block, x: Tensor) -> Tensor:
            out: Tensor = self.dropout(block, x)
            return out

    model = nn.Module()
    model.encoder = Encoder()
    ones = torch.ones(NODES, 16)
    block = drawn(graph, 0)
    encoded, _ = enter(model, block, ones)
    assert not torch.equal(encoded, NodeDropout(0.5)(block, ones)) and 0.3 < float((encoded == 0).float().mean()) < 0.7


class Mine(LayeredModel):
    """A user's model: plain parts, the initial rows changed on the way."""

    uses_initial = True

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = SAGEConv(width, width)

        def forward(self, block: Block, x: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
            h = self.conv(block, x).tanh()
            return h, h if initial is None else 0.5 * initial + h

    class Head(nn.Module):
        def forward(self, h: Tensor, initial: Tensor) -> Tensor:
            return h - initial

    def __init__(self, encoder: nn.Module | None, width: int = 5, num_layers: int = 3) -> None:
        super().__init__()
        if encoder is not None:
            self.encoder = encoder
        self.layers = nn.ModuleList(self.Layer(width) for _ in range(num_layers))
        self.head = self.Head()


@pytest.mark.parametrize("has_encoder", [False, True])
def test_a_users_parts_with_initial_rows(has_encoder: bool, graph: Block, x: Tensor) -> None:
    width = 5 if has_encoder else FEATURES
    model = Mine(nn.Linear(FEATURES, 5) if has_encoder else None, width).double()
    check_chunkable(model, FEATURES)
    assert boundary_widths(model, FEATURES) == ([width] * (3 if has_encoder else 2), width)
    whole, state = model([graph] * 3, x), x
    for layer in range(3):
        state = layer_forward(model, layer, graph, state)
        assert state.shape[1] == (2 * width if layer < 2 else width)
    torch.testing.assert_close(state, whole, rtol=1e-12, atol=1e-12)  # products of torch: bits vary with alignment
    with pytest.raises(ValueError, match="2 blocks, the model 3 layers"):
        model([graph] * 2, x)


class Between(nn.Module):
    """Something is done between the layers, and `layer_forward` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([SAGEConv(FEATURES, 8), SAGEConv(8, CLASSES)])

    def layer_forward(self, layer: int, block: Block, x: Tensor) -> Tensor:
        out: Tensor = self.layers[layer](block, x)
        return out if layer else out.relu()

    def forward(self, blocks: list[Block], x: Tensor) -> Tensor:
        return self.layer_forward(1, blocks[1], self.layer_forward(0, blocks[0], x))


class Silent(Between):
    """The same, but not said: the encoder makes the layers be called themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Linear(FEATURES, FEATURES)

    def forward(self, blocks: list[Block], x: Tensor) -> Tensor:
        return super().forward(blocks, self.encoder(x))


def test_a_model_with_layer_forward_is_used_through_it(graph: Block, x: Tensor) -> None:
    model = Between().double()
    check_chunkable(model, FEATURES)
    h, initial = enter(model, graph, x)
    assert initial is None and float(h.detach().min()) == 0
    out, _ = apply_layer(model, 1, graph, h, None)
    assert torch.equal(leave(model, out, None), model([graph] * 2, x))


def test_what_cannot_be_chunked_is_named() -> None:
    with pytest.raises(ValueError, match="Linear has no `layers`"):
        check_chunkable(nn.Linear(2, 2))
    model: Any = Between()
    model.layers[0].drop = nn.Dropout(0.3)
    with pytest.raises(ValueError, match=r"Between.layers.0.drop is Dropout\(p=0.3\).*NodeDropout\(0.3\)"):
        check_chunkable(model)
    model.layers[0].drop = nn.Dropout(0.0)
    check_chunkable(model)
    with pytest.raises(ValueError, match="the encoder, layers and head of Silent.*do not give what Silent gives"):
        check_chunkable(Silent(), FEATURES)
    narrow = Mine(nn.Linear(FEATURES, 5))
    narrow.uses_initial = False
    narrow.layers = nn.ModuleList([SAGEConv(5, 4), SAGEConv(4, 2), SAGEConv(2, 2)])
    narrow.head = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"hidden rows of Mine are \[5, 4, 2\] wide"):
        check_chunkable(narrow, FEATURES)


def test_frozen_statistics_normalise_alike_and_stay_as_they_are(graph: Block, x: Tensor) -> None:
    model = make_model({"kind": "gcn", "norm": "batch"})
    first = run_parts(model, graph, x, draws=True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with frozen_statistics(model):
        assert torch.equal(run_parts(model, graph, x, draws=True), first)
        model.eval()
        quiet = run_parts(model, graph, x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()) and before
    assert torch.equal(run_parts(model, graph, x), quiet)
    model.train()
    run_parts(model, graph, x, draws=True)
    assert not torch.equal(model.norms[0].running_mean, before["norms.0.running_mean"])
