"""A small graph and runs over its chunks.

`Case` says what is run: `Case.run` trains it over ranks that are threads, `Case.probe` opens its only rank to look into
it, `Case.reference` is the dense program that it has to equal.
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

from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.ownership import hidden_layers
from penstock.engine.chunked.rank import Rank, open_rank
from penstock.engine.chunked.schedule import EpochPlan, chunk_order, plan_epoch, plan_exact
from penstock.engine.chunked.setup import make_specs
from penstock.engine.chunked.spec import FeatureSpec, RankReport, RankSpec
from penstock.engine.chunked.state import ChunkedResult
from penstock.engine.chunked.threads import open_threads
from penstock.engine.chunked.trainer import ChunkedTrainer, initial_weights
from penstock.engine.chunked.transport import ThreadHub, ThreadTransport
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.trainer import TrainConfig
from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.write import write_chunks
from penstock.storage.chunks import ChunkStore
from penstock.storage.graph import GraphStore, Split
from tests.engine.chunked.dense_program import Reference, Rows

Weights = dict[str, Tensor]  # or their gradients, by name
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
    replicas: int = 1
    history_memory: int = 1 << 26
    poison: bool = True
    numbers: Iterator[int]

    def but(self, **options: Any) -> "Case":
        """The same with other options, of whatever configuration has them; `parts=1` puts the parts together."""
        ways = {"parts": options.pop("parts")} if isinstance(options.get("parts"), int) else {}
        own = {key: options.pop(key) for key in list(options) if key in Case.__dataclass_fields__}
        split = _split_options({**options, **ways})
        if "chunks" in own:
            split["chunked"]["chunks"] = int(own["chunks"].max()) + 1
        if "parts" in own:
            split["chunked"]["parts"] = int(own["parts"].max()) + 1
        for name, config in _CONFIGS.items():
            if split[name]:
                own[name] = config(**{**getattr(self, name).model_dump(), **split[name]})
        return replace(self, **own)

    @staticmethod
    def distance(left: Weights, right: Weights) -> float:
        """Largest difference over the largest value of `right`; NaN where one is."""
        scale = max(float(tensor.abs().max()) for tensor in right.values())
        return (
            float(np.max([float((left[name].double() - t.double()).abs().max()) for name, t in right.items()])) / scale
        )

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
        return Layout(self.chunked.stages, self.chunked.parts, self.replicas)

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
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
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
            features=[FeatureSpec(kind="memory")] * (self.chunked.parts * self.replicas),
            recompute=self.recompute,
            history_memory=self.history_memory,
            dtype=self.dtype,
            poison=self.poison,
            replicas=self.replicas,
        )

    def trainer(self, folder: Path | None = None, evaluate: tuple[Split, ...] = (), **options: Any) -> ChunkedTrainer:
        """A trainer over threads, with its checkpoints in `folder`."""
        folder = folder or self.fresh_folder()
        options |= {"checkpoints": folder / "checkpoints", "metrics": folder / "metrics.jsonl", "evaluate": evaluate}
        return ChunkedTrainer(self.specs(), open_threads, **options)

    def run(self, **options: Any) -> ChunkedResult:
        """Train to the end."""
        return self.trainer(**options).run()

    def order(self, epoch: int) -> tuple[int, ...]:
        """The order of chunks that a trainer takes."""
        config = self.chunked
        return chunk_order(self.train.seed, epoch, config.chunks, config.cycle_orders, shuffle=config.shuffle_chunks)

    def reference(self) -> Reference:
        """The same mathematics, with first weights and zero histories."""
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


@pytest.fixture(scope="session")
def lab_graph(make_graph: Callable[..., GraphStore]) -> GraphStore:
    """90 nodes: a hub that half of them reach, ten without any edge, parallel edges, self-loops, 3 classes."""
    rng = np.random.default_rng(3)
    edges = rng.integers(0, 80, (300, 2))
    hub = np.stack([np.arange(0, 80, 2), np.full(40, 7)], axis=1)
    every = np.concatenate([edges[edges[:, 0] != edges[:, 1]], edges[:4], hub, [[5, 5], [7, 7], [7, 7]]])
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
        defaults: dict[str, Any] = {"evaluate_every": 0, "lr": 0.01, "epochs": 4, "hidden": 8, "dropout": 0.0}
        case = Case(
            graph=graph,
            chunks=chunks,
            parts=parts,
            folder=tmp_path,
            stores=stores,
            numbers=numbers,
            model=ModelConfig(kind="gcn"),
            chunked=ChunkedConfig(chunks=int(chunks.max()) + 1, parts=int(parts.max()) + 1),
            train=TrainConfig(),
        )
        return case.but(**{**defaults, "timeout_s": 20.0, **options})

    return make
