"""The same training over threads, processes and Ray actors: the same bits, also when a stage is killed on the way."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.chunked.backend import OpenBackend, Poll, RankFailed, open_board
from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.processes import open_processes
from penstock.engine.chunked.setup import make_specs
from penstock.engine.chunked.spec import FeatureSpec, RankSpec
from penstock.engine.chunked.state import ChunkedResult
from penstock.engine.chunked.threads import open_threads
from penstock.engine.chunked.trainer import ChunkedTrainer, initial_weights
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.trainer import TrainConfig
from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.write import write_chunks
from penstock.storage.graph import GraphStore

RAY = pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.ray])


def find_backend(name: str) -> OpenBackend:
    """What opens ranks; Ray is imported by the tests that need it."""
    if name != "ray":
        return open_processes
    pytest.importorskip("ray")
    from penstock.cluster.pipeline import open_ray

    return open_ray


def trainer(
    graph: GraphStore, folder: Path, open_backend: OpenBackend, *, parts: int, device: str = "cpu", retries: int = 0
) -> ChunkedTrainer:
    """GCNII of 4 layers in 2 stages over 4 chunks, with dropout and clipped gradients."""
    partition = PartitionConfig(chunks=4, parts=parts, method="random")
    model_config = ModelConfig(kind="gcnii", num_layers=4, hidden=8, dropout=0.3)
    torch.manual_seed(2)
    model = build_model(model_config, graph.meta.num_features, graph.meta.num_classes)
    specs = make_specs(
        graph=graph,
        chunks=write_chunks(graph, folder / "chunks", partition, host_memory=1 << 26, threads=1),
        scratch=folder / "scratch",
        weights=initial_weights(folder / "initial.safetensors", model),
        model=model,
        model_config=model_config,
        train=TrainConfig(epochs=4, device=device, evaluate_every=2, checkpoint_items=1, grad_clip=0.5),
        chunked=ChunkedConfig(chunks=4, stages=2, parts=parts, timeout_s=60.0, retries=retries),
        features=[FeatureSpec(kind="memory")] * parts,
        recompute=True,
        history_memory=1 << 26,
        poison=True,
    )
    return ChunkedTrainer(
        specs, open_backend, checkpoints=folder / "checkpoints", metrics=folder / "metrics.jsonl", evaluate=("valid",)
    )


def assert_same(found: ChunkedResult, wanted: ChunkedResult) -> None:
    assert found.losses == wanted.losses and found.weights.keys() == wanted.weights.keys()
    for name, tensor in wanted.weights.items():
        assert torch.equal(found.weights[name], tensor), name


HYBRID = [
    pytest.param("processes", 2, marks=pytest.mark.slow),
    pytest.param("ray", 2, marks=[pytest.mark.slow, pytest.mark.ray]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parts"), [("processes", 1), *HYBRID])
def test_every_backend_ends_with_the_same_bits(tiny_graph: GraphStore, tmp_path: Path, name: str, parts: int) -> None:
    wanted = trainer(tiny_graph, tmp_path / "threads", open_threads, parts=parts).run()
    found = trainer(tiny_graph, tmp_path / name, find_backend(name), parts=parts).run()
    assert_same(found, wanted)
    for left, right in zip(found.reports, wanted.reports, strict=True):
        assert (left.bytes_sent, left.loss, left.kinds) == (right.bytes_sent, right.loss, right.kinds)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2])
def test_training_on_gpus_follows_that_on_the_cpu(tiny_graph: GraphStore, tmp_path: Path, parts: int) -> None:
    """Over NCCL where there is a GPU for each rank."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    wanted = trainer(tiny_graph, tmp_path / "cpu", open_threads, parts=parts).run()
    found = trainer(tiny_graph, tmp_path / "gpu", open_processes, parts=parts, device="cuda").run()
    assert found.losses == pytest.approx(wanted.losses, rel=1e-3)


class Killed:
    """A backend with `pids` whose stage 1 is killed amid epoch 2 of stage 0, which has to be told in time."""

    def __init__(self, backend: Any, specs: Sequence[RankSpec]) -> None:
        self.backend, self.board = backend, open_board(specs)
        self.killed_at = 0.0

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None, poll: Poll | None = None) -> Any:
        if method != "train_epoch" or not arguments or arguments[0][0].epoch != 2:
            return self.backend.call(method, arguments, poll)
        victim = self.backend.pids[1]
        os.kill(victim, signal.SIGSTOP)  # so that stage 0 cannot come to the end of the epoch

        def kill() -> None:
            if not self.killed_at and self.board.read()[0][0] > 0:
                os.kill(victim, signal.SIGKILL)
                self.killed_at = time.monotonic()

        try:
            return self.backend.call(method, arguments, kill)
        finally:
            assert self.killed_at and time.monotonic() - self.killed_at < 5  # the limit; timeout_s is 60


def open_killed(open_backend: Callable[..., AbstractContextManager[Any]]) -> OpenBackend:
    @contextmanager
    def opened(specs: Sequence[RankSpec]) -> Iterator[Killed]:
        with open_backend(specs) as backend:
            yield Killed(backend, specs)

    return opened


@pytest.mark.slow
@pytest.mark.parametrize("name", ["processes", RAY])
def test_a_killed_stage_is_named_and_the_rerun_ends_the_same(tiny_graph: GraphStore, tmp_path: Path, name: str) -> None:
    wanted = trainer(tiny_graph, tmp_path / "threads", open_threads, parts=1).run()
    with pytest.raises(RankFailed, match=r"rank 1 \(stage 1 of 0..1, part 0 of 0..0\) was (ended by SIGKILL|lost)"):
        trainer(tiny_graph, tmp_path / name, open_killed(find_backend(name)), parts=1).run()
    found = trainer(tiny_graph, tmp_path / name, open_threads, parts=1).run()
    assert found.resumed_from == 2
    assert_same(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["processes", RAY])
def test_with_retries_the_run_goes_on_by_itself(tiny_graph: GraphStore, tmp_path: Path, name: str) -> None:
    wanted = trainer(tiny_graph, tmp_path / "threads", open_threads, parts=1).run()
    opened: list[Any] = []

    @contextmanager
    def killed_once(specs: Sequence[RankSpec]) -> Iterator[Any]:
        with find_backend(name)(specs) as backend:
            opened.append(backend)
            yield Killed(backend, specs) if len(opened) == 1 else backend

    found = trainer(tiny_graph, tmp_path / name, killed_once, parts=1, retries=1).run()
    assert len(opened) == 2
    assert_same(found, wanted)
