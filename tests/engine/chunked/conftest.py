"""A small graph, runs over its chunks, and the same mathematics as one dense program that shares nothing with ours.

`Case` says what is run; `Case.run` trains it over ranks that are threads, `Case.probe` opens its only rank to look into
it, `Case.reference` is the dense program: whole tables of rows by node, one autograd graph per epoch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from penstock.engine import layered
from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.ownership import hidden_layers
from penstock.engine.chunked.rank import Rank, open_rank
from penstock.engine.chunked.schedule import EpochPlan, chunk_order, cut_groups, plan_epoch, plan_exact
from penstock.engine.chunked.setup import make_specs
from penstock.engine.chunked.spec import FeatureSpec, RankReport, RankSpec
from penstock.engine.chunked.threads import open_threads
from penstock.engine.chunked.trainer import ChunkedResult, ChunkedTrainer, initial_weights
from penstock.engine.chunked.transport import ThreadHub, ThreadTransport
from penstock.engine.dropout import Draws, epoch_key
from penstock.engine.minibatch import Block
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.trainer import TrainConfig
from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.write import write_chunks
from penstock.storage.chunks import ChunkStore
from penstock.storage.graph import GraphStore, Split

Weights = dict[str, Tensor]  # or their gradients, by name
Rows = dict[int, Tensor]  # by layer, [N, H]
_CONFIGS: dict[str, Any] = {"model": ModelConfig, "chunked": ChunkedConfig, "train": TrainConfig}


def _split_options(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort options by the configuration that has a field of the name."""
    found: dict[str, dict[str, Any]] = {
        name: {key: value for key, value in options.items() if key in config.model_fields}
        for name, config in _CONFIGS.items()
    }
    unknown = set(options) - set().union(*found.values())
    assert not unknown, f"no configuration has {unknown}"
    return found


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: `chunks` and `parts` [N] are the logical chunk and the part of every node."""

    graph: GraphStore
    chunks: NDArray[np.int32]
    parts: NDArray[np.int32]
    folder: Path
    stores: Path
    model: ModelConfig
    chunked: ChunkedConfig
    train: TrainConfig
    dtype: Any = "float64"
    recompute: bool = True
    history_memory: int = 1 << 26
    poison: bool = True
    numbers: Iterator[int]

    def but(self, **options: Any) -> "Case":
        """The same with other options, of whatever configuration has them; `parts=1` puts the parts together."""
        ways = {"parts": options.pop("parts")} if options.get("parts") == 1 else {}
        own = {key: options.pop(key) for key in list(options) if key in Case.__dataclass_fields__}
        split = _split_options({**options, **ways})
        if "chunks" in own:
            split["chunked"]["chunks"] = int(own["chunks"].max()) + 1
        for name, config in _CONFIGS.items():
            if split[name]:
                own[name] = config(**{**getattr(self, name).model_dump(), **split[name]})
        return replace(self, **own)

    @staticmethod
    def distance(left: Weights, right: Weights) -> float:
        """Largest difference over the largest value of `right`; NaN where one is."""
        scale = max(float(tensor.abs().max()) for tensor in right.values())
        return float(np.max([float((left[name].double() - t.double()).abs().max()) for name, t in right.items()])) / scale

    @staticmethod
    def equal(left: ChunkedResult, right: ChunkedResult) -> bool:
        """Whether two runs had the same losses, and ended with the same bits."""
        same = [torch.equal(tensor, right.weights[name]) for name, tensor in left.weights.items()]
        return left.losses == right.losses and all(same)

    @property
    def num_chunks(self) -> int:
        return self.chunked.chunks

    @property
    def layout(self) -> Layout:
        return Layout(self.chunked.stages, self.chunked.parts)

    def fresh_folder(self) -> Path:
        return self.folder / f"run-{next(self.numbers)}"

    def store(self) -> ChunkStore:
        """The chunks as they lie on disk."""
        config = PartitionConfig(chunks=self.num_chunks, parts=self.chunked.parts)
        parts = self.parts if self.chunked.parts > 1 else np.zeros_like(self.parts)
        assignment = parts.astype(np.int32), self.chunks.astype(np.int32)
        digest = xxhash.xxh3_64_hexdigest(b"".join(labels.tobytes() for labels in assignment))
        path = self.stores / f"{self.graph.path.parent.name}-{digest}"  # once per session: all cases only read it
        return write_chunks(self.graph, path, config, host_memory=1 << 26, threads=1, assignment=assignment)

    def build(self) -> nn.Module:
        """The model with its first weights: none of them zero, the same for every case with such a model."""
        torch.manual_seed(1)
        model = build_model(self.model, self.graph.meta.num_features, self.graph.meta.num_classes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    def specs(self) -> list[RankSpec]:
        """What the ranks are told; what is dead in their tables is NaN."""
        model, folder = self.build(), self.fresh_folder()
        return make_specs(
            graph=self.graph,
            chunks=self.store(),
            scratch=folder / "scratch",
            weights=initial_weights(folder / "initial.safetensors", model),
            model=model,
            model_config=self.model,
            train=self.train,
            chunked=self.chunked,
            features=[FeatureSpec(kind="memory")] * self.chunked.parts,
            recompute=self.recompute,
            history_memory=self.history_memory,
            dtype=self.dtype,
            poison=self.poison,
        )

    def trainer(self, folder: Path | None = None, evaluate: tuple[Split, ...] = (), **options: Any) -> ChunkedTrainer:
        """A trainer over threads, with its checkpoints in `folder`."""
        folder = folder or self.fresh_folder()
        paths = {"checkpoints": folder / "checkpoints", "metrics": folder / "metrics.jsonl"}
        return ChunkedTrainer(self.specs(), open_threads, evaluate=evaluate, **paths, **options)

    def run(self, **options: Any) -> ChunkedResult:
        """Train to the end."""
        return self.trainer(**options).run()

    def order(self, epoch: int) -> tuple[int, ...]:
        """The order of chunks that a trainer takes."""
        config = self.chunked
        return chunk_order(
            self.train.seed, epoch, config.chunks, config.cycle_orders, shuffle=config.shuffle_chunks
        )

    def reference(self) -> "Reference":
        return Reference(self)

    @contextmanager
    def probe(self) -> Iterator["Probe"]:
        """Open the only rank of a case with one stage and one part."""
        assert self.layout.num_ranks == 1
        (spec,) = self.specs()
        with open_rank(spec, ThreadTransport(ThreadHub(), 0, 20)) as rank:
            yield Probe(self, rank, self.store())


class Probe:
    """One rank, epoch by epoch, with its histories and gradients laid bare. Gradients need optimizer sgd."""

    def __init__(self, case: Case, rank: Rank, store: ChunkStore) -> None:
        self.case, self.rank, self.epochs = case, rank, 0
        self.layers = hidden_layers(rank.model)
        self._chunks = [store.part(0).chunk(c) for c in range(case.num_chunks)]

    def plan(self, order: Sequence[int]) -> EpochPlan:
        config = self.case.chunked
        return plan_epoch(
            Layout(1, 1),
            epoch=self.epochs,
            order=order,
            updates=config.updates_per_epoch,
            gradient_mode=config.gradient_mode,
            recompute=self.case.recompute,
        )

    def exact(self) -> None:
        """Make histories exact."""
        plan = plan_exact(Layout(1, 1), (self.layers,), self.case.num_chunks, self.epochs - 1)
        self.rank.exact_pass(plan, True, (), None)

    def epoch(self, order: Sequence[int], rate: float = 0.0, plan: EpochPlan | None = None) -> RankReport:
        report = self.rank.train_epoch(plan or self.plan(order), (rate,) * self.case.chunked.updates_per_epoch)
        self.epochs += 1
        return report

    def weights(self) -> Weights:
        return {name: tensor.clone() for name, tensor in self.rank.model.state_dict().items()}

    def gradient(self, order: Sequence[int], plan: EpochPlan | None = None) -> Weights:
        """Run an epoch and return its gradient; the weights are as before."""
        before = self.weights()
        self.epoch(order, 1.0, plan)
        found = {name: before[name] - after for name, after in self.weights().items()}
        self.rank.model.load_state_dict(before)
        return found

    def set_history(self, rows: Rows) -> None:
        """Let past rows be those of tables [N, H]."""
        for layer, table in rows.items():
            runs = self.rank.tables[f"history-{layer}"]
            for c, chunk in enumerate(self._chunks):
                ids = chunk.node_ids[chunk.send_rows]
                runs.push(c, np.ascontiguousarray(table.numpy()[ids]), self.epochs - 1)
            runs.end_period(exact=True)

    def history_error(self, layer: int, exact: Tensor, *, fresh: bool = False) -> float:
        """Largest distance of the rows that chunks read of each other, past or fresh ones, from a table [N, H]."""
        worst = 0.0
        for c, chunk in enumerate(self._chunks):
            rows = np.empty((chunk.num_halo, exact.shape[1]))
            side = np.full(self.case.num_chunks, fresh)
            self.rank.tables[f"history-{layer}"].pull(c, side, rows, epoch=self.epochs - 1, bound=1 << 30)
            worst = max(worst, float(np.abs(rows - exact.numpy()[chunk.halo_ids]).max(initial=0)))
        return worst


@dataclass(frozen=True)
class _Piece:
    ids: Tensor
    block: Block

    @property
    def own(self) -> Tensor:
        return self.ids[: self.block.num_dst]

    def drawn(self, key: int, layer: int) -> Block:
        return replace(self.block, draws=Draws(key=key, layer=layer, src_ids=self.ids))


class Reference:
    """Chunked training as one dense program in float64 that autograd differentiates.

    `history` are rows of all nodes by layer; what chunk d found for the rows that it read is `messages[layer, d]`.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.model, self.epochs = case, case.build().double(), 0
        self.features = torch.from_numpy(np.array(case.graph.features)).double()
        self.labels = torch.from_numpy(np.array(case.graph.labels))
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        self.optimizer: torch.optim.Optimizer = kinds[case.train.optimizer](
            self.model.parameters(), lr=case.train.lr, weight_decay=case.train.weight_decay
        )
        self.pieces = [self._piece(np.flatnonzero(case.chunks == c)) for c in range(case.num_chunks)]
        self.whole = self._piece(np.arange(case.graph.num_nodes))
        self.is_train = torch.zeros(case.graph.num_nodes, dtype=torch.bool)
        self.is_train[torch.from_numpy(np.array(case.graph.split_ids("train"))).long()] = True
        if self.labels.ndim == 1:
            self.is_train &= self.labels >= 0
        self.layers = hidden_layers(self.model)
        self.history: Rows = {layer: torch.zeros_like(rows) for layer, rows in self.exact().items()}
        self.messages: dict[tuple[int, int], Tensor] = {}

    def _piece(self, own: NDArray[np.int64]) -> _Piece:
        graph = self.case.graph
        edges = [np.arange(graph.indptr[node], graph.indptr[node + 1]) for node in own]
        sources = np.asarray(graph.indices)[np.concatenate(edges)].astype(np.int64)
        ids = np.concatenate([own, np.setdiff1d(sources, own)])
        at = np.full(graph.num_nodes, -1)
        at[ids] = np.arange(len(ids))
        block = Block(
            num_src=len(ids),
            num_dst=len(own),
            indptr=torch.tensor([0, *np.cumsum([len(e) for e in edges])], dtype=torch.int32),
            indices=torch.from_numpy(at[sources].astype(np.int32)),
            src_degrees=torch.from_numpy(np.diff(graph.indptr)[ids].astype(np.int32)),
        )
        return _Piece(torch.from_numpy(ids), block)

    def loss(self, scores: Tensor, ids: Tensor, nodes: int) -> Tensor:
        """Sum over the training nodes among `ids`, over `nodes`."""
        chosen = self.is_train[ids]
        labels = self.labels[ids][chosen]
        if labels.ndim == 2:
            value = functional.binary_cross_entropy_with_logits(scores[chosen], labels.double(), reduction="sum")
            return value / (max(1, nodes) * labels.shape[1])
        return functional.cross_entropy(scores[chosen], labels, reduction="sum") / max(1, nodes)

    def full_loss(self) -> Tensor:
        """Plain full-graph training's loss in the model's mode, dropout as drawn for this epoch."""
        key, num_layers = epoch_key(self.case.train.seed, self.epochs), len(self.model.layers)  # type: ignore[arg-type]
        scores = self.model([self.whole.drawn(key, layer) for layer in range(num_layers)], self.features)
        return self.loss(scores, self.whole.ids, int(self.is_train.sum()))

    def full_gradient(self) -> Weights:
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(self.full_loss(), parameters), strict=True))

    def plain_epoch(self) -> float:
        """One step of plain full-graph training."""
        self.model.train()
        loss = self.full_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self._step()
        self.epochs += 1
        return float(loss.detach())

    def exact(self) -> Rows:
        """Rows of all nodes that enter every hidden layer, in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            h, initial = layered.enter(self.model, self.whole.block, self.features)
            found = {}
            for layer in self.layers:
                found[layer] = h
                h, initial = layered.apply_layer(self.model, layer, self.whole.block, h, initial)
        return found

    def _step(self) -> None:
        if self.case.train.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.case.train.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self, order: Sequence[int] | None = None) -> float:
        """One epoch over chunks."""
        self.model.train()
        config, losses = self.case.chunked, []
        order = self.case.order(self.epochs) if order is None else order
        tables = {layer: rows.clone() for layer, rows in self.history.items()}  # what is read of other chunks
        for group in cut_groups(order, config.updates_per_epoch):
            losses.append(self._group(group, order, tables))
            self._step()
        if (self.epochs + 1) % config.period == 0:
            share = config.ema_gamma if config.push == "ema" else 1.0
            self.history = {n: share * rows + (1 - share) * self.history[n] for n, rows in tables.items()}
        self.epochs += 1
        return sum(losses) / len(losses)

    def _group(self, group: Sequence[int], order: Sequence[int], tables: Rows) -> float:
        """Forward and backward of one group of chunks; `tables` go from past rows to fresh ones."""
        fresh, stale = self.case.chunked.message_weights()
        key = epoch_key(self.case.train.seed, self.epochs)
        nodes = sum(int(self.is_train[self.pieces[c].own].sum()) for c in group)
        reads: dict[tuple[int, int], Tensor] = {}
        losses, objective = [], torch.zeros((), dtype=torch.float64)
        for c in group:
            piece = self.pieces[c]
            h, initial = layered.enter(self.model, piece.drawn(key, 0), self.features[piece.ids])
            for layer in self.layers:
                tables[layer] = tables[layer].index_copy(0, piece.own, fresh * h + (1 - fresh) * h.detach())
                for earlier in order[: list(order).index(c)]:  # not done before c in backward: last epoch's gradients
                    if (layer, earlier) in self.messages:
                        objective = objective + stale * (self.messages[layer, earlier][piece.own] * h).sum()
                x = reads[layer, c] = torch.cat([h, tables[layer][piece.ids[len(h) :]]])
                x.retain_grad()
                h, initial = layered.apply_layer(self.model, layer, piece.drawn(key, layer), x, initial)
            losses.append(self.loss(layered.leave(self.model, h, initial), piece.own, nodes))
        (objective + torch.stack(losses).sum()).backward()  # type: ignore[no-untyped-call]
        for (layer, c), x in reads.items():
            piece, table = self.pieces[c], torch.zeros_like(self.history[layer])
            assert x.grad is not None
            table[piece.ids[piece.block.num_dst :]] = x.grad[piece.block.num_dst :]
            self.messages[layer, c] = table
        for layer, rows in tables.items():
            tables[layer] = rows.detach()
        return float(torch.stack(losses).detach().sum())


@pytest.fixture(scope="session")
def lab_graph(make_graph: Callable[..., GraphStore]) -> GraphStore:
    """90 nodes: a hub that half of them reach, ten nodes without any edge, parallel edges, a self-loop, 3 classes."""
    rng = np.random.default_rng(3)
    edges = rng.integers(0, 80, (300, 2))
    hub = np.stack([np.arange(0, 80, 2), np.full(40, 7)], axis=1)
    every = np.concatenate([edges[edges[:, 0] != edges[:, 1]], edges[:4], hub, [[5, 5]]])
    features = rng.standard_normal((90, 5)).astype(np.float32)
    return make_graph(90, every, features=features, labels=rng.integers(-1, 3, 90), train=np.arange(0, 90, 2))


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where chunk stores are kept."""
    return tmp_path_factory.mktemp("chunks")


@pytest.fixture
def make_case(lab_graph: GraphStore, tmp_path: Path, stores: Path) -> Callable[..., Case]:
    """A function of options that makes a case: GCN of 3 layers, 8 wide, over 4 chunks of uneven sizes at random."""

    numbers = count()

    def make(graph: GraphStore = lab_graph, chunks: Any = 4, parts: Any = 1, **options: Any) -> Case:
        rng, num_nodes = np.random.default_rng(5), graph.num_nodes
        if isinstance(chunks, int):
            chunks = chunks * rng.random(num_nodes) ** 1.4
        if isinstance(parts, int):
            parts = rng.integers(0, parts, num_nodes)
        chunks, parts = np.asarray(chunks, np.int32), np.asarray(parts, np.int32)
        defaults = {"timeout_s": 20.0, "evaluate_every": 0, "lr": 0.01, "epochs": 4, "hidden": 8, "dropout": 0.0}
        split = {"chunks": int(chunks.max()) + 1, "parts": int(parts.max()) + 1}
        case = Case(
            graph=graph,
            chunks=chunks,
            parts=parts,
            folder=tmp_path,
            stores=stores,
            numbers=numbers,
            model=ModelConfig(kind="gcn"),
            chunked=ChunkedConfig(**split),
            train=TrainConfig(),
        )
        return case.but(**{**defaults, **options})

    return make
